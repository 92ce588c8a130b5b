"""Plans the native build (libraries, sources, flags) and runs it with ninja."""

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

# _C does not depend on Python, so its name has no tag of Python's version. torch.ops.load_library opens it.
_STABLE_FILE = "_C.so"
_HOOKS_FILE = f"_hooks{sysconfig.get_config_var('EXT_SUFFIX')}"
_REGISTER_CUDA = "csrc/stable/register_cuda.cpp"
_THREADS = "csrc/stable/threads.cpp"

# The oldest torch that _C loads on: torch's headers then declare nothing newer.
_STABLE_ABI = "0x020b000000000000"
# Warnings fail our own builds, but not those of users with other compilers.
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
class Objects:
    """Sources that are compiled once, with the same flags; several libraries may link the objects.

    Attributes:
        folder: Where the objects go, relative to the build folder.
        sources: Relative to the repository.
    """

    folder: str
    sources: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Module:
    """One shared library: its name, its file in the package, the objects that it links, and the linker's flags."""

    name: str
    file_name: str
    objects: list[Objects]
    link_flags: list[str]

    @property
    def sources(self) -> list[str]:
        """The sources of all objects."""
        return [source for objects in self.objects for source in objects.sources]


@dataclass(frozen=True)
class Plan:
    """The libraries to build, and the reasons why others are not built.

    setuptools also loads setup.py without building, before torch is installed, so a missing torch is an error only once
    a build starts.

    Attributes:
        modules: The libraries to build; empty without a compiler.
        info: The content of ``_build_info.json``: for each of ``PARTS`` "built" or the reason it was not, and the
            versions of torch and of the compilers.
    """

    modules: list[Module]
    info: dict[str, str]
    cxx: list[str]
    torch: Torch | None
    cuda: Cuda | None = None

    def check(self) -> None:
        """Raises ToolchainError if there is a compiler but no torch to build against."""
        if self.cxx and self.torch is None:
            raise ToolchainError(
                "a build without isolation needs torch in the environment first: "
                f"pip install torch=={PINNED_TORCH}, or leave out --no-build-isolation"
            )


def _system_includes(*folders: Path) -> list[str]:
    # -isystem silences warnings in headers that are not ours.
    return [part for folder in folders for part in ("-isystem", str(folder))]


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def _cpu_kernels() -> Objects:
    # Both libraries link these. No folder of torch: csrc/core and csrc/cpu must compile without it.
    return Objects("cpu", _sources("csrc/cpu/*.cpp"), [*_CXX_FLAGS, "-Icsrc"])


def _stable_library(torch: Torch, cuda: Cuda | None) -> Module:
    include = _system_includes(torch.root / "include")
    defines = [f"-DTORCH_TARGET_VERSION={_STABLE_ABI}"]
    # -z defs: with an undefined symbol, e.g. one of libtorch_cuda, the library would not load on a CPU build of torch.
    link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-lc10", *(["-Wl,-z,defs"] if sys.platform == "linux" else [])]
    nvcc_flags = []
    sources = [source for source in _sources("csrc/stable/*.cpp") if source != _REGISTER_CUDA]
    if cuda is not None:
        sources += [_REGISTER_CUDA, *_sources("csrc/cuda/*.cu")]
        include += _system_includes(cuda.root / "include")
        defines += ["-DUSE_CUDA"]
        libraries = next((folder for folder in ("lib64", "lib") if (cuda.root / folder).is_dir()), "lib64")
        link += [f"-L{cuda.root / libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        nvcc_flags = ["-O3", "-std=c++20", "-Icsrc", "-cudart=static"]
        nvcc_flags += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in cuda.targets]
        # PTX of the newest target for GPUs that come later, of the oldest for those between (8.7, 11.0).
        for target in sorted({cuda.targets[0], cuda.targets[-1]}, reverse=True):
            nvcc_flags += [f"-gencode=arch=compute_{target},code=compute_{target}"]
        nvcc_flags += ["-Xptxas=-warn-spills,-warn-lmem-usage", "-Xfatbin=-compress-all"]
        nvcc_flags += ["-Werror=all-warnings", "-Xptxas=-Werror"] if _STRICT else []
        nvcc_flags += [f"-Xcompiler=-fPIC,-fvisibility=hidden,-g0,{','.join(_WARNINGS)}"]
    objects = Objects("stable", sources, [*_CXX_FLAGS, *defines, "-Icsrc", *include], nvcc_flags)
    return Module("gradprobe._C", _STABLE_FILE, [objects, _cpu_kernels()], link)


def _hooks(torch: Torch, python_includes: list[Path]) -> Module:
    include = _system_includes(torch.root / "include", torch.root / "include/torch/csrc/api/include", *python_includes)
    link = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    flags = [*_CXX_FLAGS, "-DTORCH_EXTENSION_NAME=_hooks", "-Icsrc", *include]
    objects = Objects("hooks", _sources("csrc/hooks/*.cpp", _THREADS), flags)
    return Module("gradprobe._hooks", _HOOKS_FILE, [objects, _cpu_kernels()], link)


def _left_out() -> set[str]:
    asked = {name.strip() for name in os.environ.get("GRADPROBE_WITHOUT", "").split(",")} - {""}
    if unknown := asked - set(PARTS):
        raise ToolchainError(
            f"GRADPROBE_WITHOUT: needed a comma-separated list of {', '.join(PARTS)}, got {sorted(unknown)}"
        )
    # The CUDA kernels are part of _C.
    return asked | ({"cuda"} if "native" in asked else set())


def make_plan() -> Plan:
    """Decides what to build on this machine.

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
        if not (_sources("csrc/cuda/*.cu") and _sources(_REGISTER_CUDA)):
            info["cuda"] = "this source tree has no CUDA kernels"
        else:
            cuda, info["cuda"] = find_cuda()
            if cuda is not None:
                info |= {"cuda": BUILT, "nvcc": info["cuda"]}
    includes, no_headers = python_headers()
    modules = []
    if "native" not in left_out:
        modules.append(_stable_library(torch, cuda))
    if no_headers and "hooks" not in left_out:
        info["hooks"] = no_headers
    if info["hooks"] == BUILT:
        modules.append(_hooks(torch, includes))
    return Plan(modules, info, cxx, torch, cuda)


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _target(objects: Objects, source: str) -> str:
    return _escape(f"{objects.folder}/{source}.o")


def _ninja_file(plan: Plan) -> str:
    lines = [f"cxx = {shlex.join(plan.cxx)}", f"nvcc = {shlex.quote(plan.cuda.nvcc)}" if plan.cuda else "", _RULES]
    by_folder = {objects.folder: objects for module in plan.modules for objects in module.objects}
    for objects in by_folder.values():
        for source in objects.sources:
            rule, flags = ("nvcc", objects.nvcc_flags) if source.endswith(".cu") else ("cxx", objects.cxx_flags)
            lines += [f"build {_target(objects, source)}: {rule} {_escape(str(ROOT / source))}"]
            lines += [f"  flags = {shlex.join(flags)}".replace("-Icsrc", f"-I{shlex.quote(str(ROOT / 'csrc'))}")]
    for module in plan.modules:
        linked = [_target(objects, source) for objects in module.objects for source in objects.sources]
        lines += [f"build {_escape(module.file_name)}: link {' '.join(linked)}"]
        lines += [f"  flags = {shlex.join(module.link_flags)}"]
    return "\n".join(lines) + "\n"


def build(plan: Plan) -> dict[str, Path]:
    """Builds the modules of a plan; compiles only what has changed since the last build.

    Returns:
        The path of each module's library, by the module's name.

    Raises:
        ToolchainError: The compilation failed; the compiler's output is on the terminal.
    """
    plan.check()
    assert plan.torch is not None
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{plan.torch.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # ninja does not lock its folder, and an editor and a terminal may both start an install.
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
    """Removes libraries of an earlier build that this plan does not build."""
    for name in {_STABLE_FILE, _HOOKS_FILE} - {module.file_name for module in plan.modules}:
        (package / name).unlink(missing_ok=True)


def write_info(package: Path, info: dict[str, str]) -> None:
    """Records what was built, and why a part was not, for ``gradprobe.backends()`` and ``gradprobe doctor``."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
