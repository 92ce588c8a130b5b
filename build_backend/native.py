"""Plans and runs the native build: which modules, which flags, one ninja file."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from toolchain import (
    PINNED_TORCH,
    Cuda,
    ToolchainError,
    Torch,
    find_cuda,
    find_cxx,
    find_ninja,
    find_torch,
    python_headers,
)

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("native", "hooks", "cuda")
BUILT = "built"

# The kernels know nothing of Python, so their name has no tag of its version: torch.ops.load_library opens them.
_KERNELS_FILE = "_C.so"
_HOOKS_FILE = f"_hooks{sysconfig.get_config_var('EXT_SUFFIX')}"

# The oldest torch that the kernels load on: headers offer nothing newer than this.
_STABLE_ABI = "0x020b000000000000"
# Warnings stop our own builds, not those of whoever has another compiler.
_STRICT = bool(os.environ.get("GRADPROBE_WERROR"))
_WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if _STRICT else [])]
_CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", *_WARNINGS]
_RULES = """\
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = $cxx -shared $in -o $out $flags
  description = link $out
"""


@dataclass(frozen=True)
class Module:
    """One shared library: its name in the package, its sources (relative to the repository), flags by tool."""

    name: str
    file_name: str
    sources: list[str]
    cxx_flags: list[str]
    link_flags: list[str]
    nvcc_flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What will be built and, in a line each, why a part will not.

    setuptools loads setup.py also where nothing is built, before torch is fetched, so a missing torch only counts
    once a build starts.

    Attributes:
        modules: The libraries to build; none where there is no compiler.
        info: What goes into ``_build_info.json``: for each of ``PARTS`` "built" or the reason why not, and the
            versions of torch and of the compilers.
    """

    modules: list[Module]
    info: dict[str, str]
    cxx: list[str]
    torch: Torch | None
    cuda: Cuda | None = None

    def check(self) -> None:
        """Raises ToolchainError where there is a compiler but no torch to build against."""
        if self.cxx and self.torch is None:
            raise ToolchainError(
                "a build without isolation needs torch in the environment first: "
                f"pip install torch=={PINNED_TORCH}, or leave out --no-build-isolation"
            )


def _system_includes(*folders: Path) -> list[str]:
    # Their warnings are not ours: -isystem silences them.
    return [part for folder in folders for part in ("-isystem", str(folder))]


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def _kernels(torch: Torch, cuda: Cuda | None) -> Module:
    include = _system_includes(torch.root / "include")
    defines = [f"-DTORCH_TARGET_VERSION={_STABLE_ABI}"]
    # -z defs: a symbol that only libtorch_cuda has would keep the library from loading on a CPU wheel.
    link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-lc10", *(["-Wl,-z,defs"] if sys.platform == "linux" else [])]
    nvcc_flags = []
    sources = _sources("csrc/stable/register.cpp", "csrc/stable/register_residual.cpp", "csrc/cpu/*.cpp")
    if cuda is not None:
        sources += _sources("csrc/stable/register_cuda.cpp", "csrc/cuda/*.cu")
        include += _system_includes(cuda.root / "include")
        defines += ["-DUSE_CUDA", "-DGRADPROBE_WITH_CUDA"]
        libraries = next((folder for folder in ("lib64", "lib") if (cuda.root / folder).is_dir()), "lib64")
        link += [f"-L{cuda.root / libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        newest = cuda.targets[-1]
        nvcc_flags = ["-O3", "-std=c++20", "-Icsrc"]
        nvcc_flags += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in cuda.targets]
        nvcc_flags += [
            f"-gencode=arch=compute_{newest},code=compute_{newest}",
            "-cudart=static",
        ]
        nvcc_flags += ["-Xptxas=-warn-spills,-warn-lmem-usage", "-Xfatbin=-compress-all"]
        nvcc_flags += ["-Werror=all-warnings", "-Xptxas=-Werror"] if _STRICT else []
        nvcc_flags += [f"-Xcompiler=-fPIC,-fvisibility=hidden,-g0,{','.join(_WARNINGS)}"]
    return Module("gradprobe._C", _KERNELS_FILE, sources, [*_CXX_FLAGS, *defines, "-Icsrc", *include], link, nvcc_flags)


def _hooks(torch: Torch, python_includes: list[Path]) -> Module:
    include = _system_includes(torch.root / "include", torch.root / "include/torch/csrc/api/include", *python_includes)
    link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    flags = [*_CXX_FLAGS, "-DTORCH_EXTENSION_NAME=_hooks", "-Icsrc", *include]
    sources = [*_sources("csrc/hooks/*.cpp"), "csrc/cpu/grad_stats.cpp", "csrc/cpu/residual_add.cpp"]
    return Module("gradprobe._hooks", _HOOKS_FILE, sources, flags, link)


def _left_out() -> set[str]:
    asked = {name.strip() for name in os.environ.get("GRADPROBE_WITHOUT", "").split(",")} - {""}
    if unknown := asked - set(PARTS):
        raise ToolchainError(f"GRADPROBE_WITHOUT names {sorted(unknown)}; it takes a comma list of {', '.join(PARTS)}")
    # The CUDA kernels live in the native library.
    return asked | ({"cuda"} if "native" in asked else set())


def make_plan() -> Plan:
    """Looks at the machine and decides what to build.

    Raises:
        ToolchainError: ``GRADPROBE_WITHOUT`` names an unknown part.
    """
    torch, left_out = find_torch(), _left_out()
    cxx, compiler = find_cxx()
    info = dict.fromkeys(PARTS, BUILT) | {"torch": torch.version if torch else "", "compiler": compiler}
    for part in left_out:
        info[part] = "left out by GRADPROBE_WITHOUT"
    if cxx is None or left_out >= {"native", "hooks"}:
        missing = dict.fromkeys(PARTS, compiler) if cxx is None else {}
        return Plan([], info | missing | {"torch": ""}, [], torch)
    if torch is None:
        return Plan([], info, cxx, None)
    cuda = None
    if "cuda" not in left_out:
        if not (_sources("csrc/cuda/*.cu") and _sources("csrc/stable/register_cuda.cpp")):
            info["cuda"] = "this source tree has no CUDA kernels"
        else:
            cuda, info["cuda"] = find_cuda()
            if cuda is not None:
                info |= {"cuda": BUILT, "nvcc": info["cuda"]}
    includes, no_headers = python_headers()
    modules = []
    if "native" not in left_out:
        modules.append(_kernels(torch, cuda))
    if no_headers and "hooks" not in left_out:
        info["hooks"] = no_headers
    if info["hooks"] == BUILT:
        modules.append(_hooks(torch, includes))
    return Plan(modules, info, cxx, torch, cuda)


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(plan: Plan) -> str:
    lines = [f"cxx = {shlex.join(plan.cxx)}", f"nvcc = {shlex.quote(plan.cuda.nvcc)}" if plan.cuda else "", _RULES]
    for module in plan.modules:
        objects = []
        for source in module.sources:
            target = f"{module.name}/{source}.o"
            rule, flags = ("nvcc", module.nvcc_flags) if source.endswith(".cu") else ("cxx", module.cxx_flags)
            lines += [f"build {_escape(target)}: {rule} {_escape(str(ROOT / source))}"]
            lines += [f"  flags = {shlex.join(flags)}".replace("-Icsrc", f"-I{shlex.quote(str(ROOT / 'csrc'))}")]
            objects.append(_escape(target))
        lines += [f"build {_escape(module.file_name)}: link {' '.join(objects)}"]
        lines += [f"  flags = {shlex.join(module.link_flags)}"]
    return "\n".join(lines) + "\n"


def build(plan: Plan) -> dict[str, Path]:
    """Builds the modules of a plan, only what changed since the last time.

    Returns:
        For each module's name the library that was built.

    Raises:
        ToolchainError: A compiler refused our sources; its own output is on the terminal.
    """
    plan.check()
    assert plan.torch is not None
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{plan.torch.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # ninja does not guard its folder, and an editor and a terminal may both start an install.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(_ninja_file(plan))
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        finished = subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=False)
    if finished.returncode != 0:
        raise ToolchainError(
            "the native build failed, see the compiler's output above; "
            "GRADPROBE_WITHOUT=cuda (or hooks, or native) installs without that part"
        )
    return {module.name: folder / module.file_name for module in plan.modules}


def remove_stale(package: Path, plan: Plan) -> None:
    """Removes libraries of an earlier build that this plan does not make again."""
    for name in {_KERNELS_FILE, _HOOKS_FILE} - {module.file_name for module in plan.modules}:
        (package / name).unlink(missing_ok=True)


def write_info(package: Path, info: dict[str, str]) -> None:
    """Records what was built and why a part was not, for ``gradprobe.backends()`` and ``gradprobe doctor``."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
