"""Finds what a native build needs: torch, a C++ compiler, Python's headers, nvcc; says in a line what is missing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from target import find_uv_target

PINNED_TORCH = "2.13.0"
SUPPORTED_TORCH = ">=2.11,<2.16"

_CXX_CANDIDATES = ("c++", "g++", "clang++")
_CUDA_TARGETS = (75, 80, 86, 89, 90, 100, 120)
# torch/version.py tells +cu130 from +cpu; the metadata of a wheel may leave that out.
_FIND_TORCH = """
import importlib.util, json, pathlib, runpy, sys
sys.path.pop(0)
spec = importlib.util.find_spec("torch")
root = pathlib.Path(spec.origin).parent if spec and spec.origin else None
print(json.dumps(root and [str(root), runpy.run_path(str(root / "version.py"))["__version__"]]))
"""


class ToolchainError(RuntimeError):
    """Something that the build cannot do without is missing; the message says what to do."""


@dataclass(frozen=True)
class Torch:
    """The torch to build against.

    Attributes:
        root: Folder of the installed package.
        version: Full version, local part included, as in ``2.13.0+cpu``.
        in_target: True where the environment that gradprobe goes into has this torch; False where only the
            throw-away build environment has it.
    """

    root: Path
    version: str
    in_target: bool

    @property
    def requirement(self) -> str:
        """The run-time dependency: any supported torch, or exactly the one that was fetched for the build."""
        return f"torch{SUPPORTED_TORCH}" if self.in_target else f"torch=={self.version.partition('+')[0]}"


@dataclass(frozen=True)
class Cuda:
    """An nvcc with its toolkit folder and the compute capabilities (80 for sm_80) that it can compile for."""

    nvcc: str
    root: Path
    targets: tuple[int, ...]


def _run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def find_torch() -> Torch | None:
    """Looks in the target environment first, then on this process's own path.

    pip isolates a build through ``PYTHONPATH``, so the same interpreter with ``-E`` sees the environment that the
    package goes into, ``.pth`` files and system site-packages included. uv builds with an interpreter of its own.
    """
    target = find_uv_target() or sys.executable
    for command, in_target in (([target, "-E"], True), ([sys.executable], False)):
        answer = _run([*command, "-c", _FIND_TORCH])
        found = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 and answer.stdout else None
        if found:
            return Torch(Path(found[0]), found[1], in_target)
    return None


def find_cxx() -> tuple[list[str] | None, str]:
    """Finds a working C++20 compiler: ``$CXX`` where set, otherwise the usual names.

    Returns:
        The command (None where there is none) and its version line (or the reason why there is none).
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [[name] for name in _CXX_CANDIDATES]
    reason = f"no C++ compiler found (looked for {', '.join(command[0] for command in candidates)})"
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <concepts>\n#include <vector>\nstd::vector<int> answer() { return {42}; }\n")
            flags = ["-std=c++20", "-shared", "-fPIC", str(source), "-o", str(Path(folder, "probe.so"))]
            attempt = _run([*command, *flags])
        if attempt.returncode == 0:
            return command, _run([*command, "--version"]).stdout.partition("\n")[0].strip()
        complaint = next((line for line in attempt.stderr.splitlines() if "error" in line), attempt.stderr.strip())
        reason = f"{command[0]} cannot build a C++20 library: {complaint[:200]}"
    return None, reason


def python_headers() -> tuple[list[Path], str]:
    """Returns the include folders of this Python, or none and the reason why not."""
    folders = [Path(sysconfig.get_path(name)) for name in ("include", "platinclude")]
    if not any((folder / "Python.h").is_file() for folder in folders):
        return [], f"Python.h not found in {folders[0]} (install your system's python3-dev or python3-devel)"
    return list(dict.fromkeys(folders)), ""


def find_cuda() -> tuple[Cuda | None, str]:
    """Finds nvcc through ``$CUDA_HOME``, ``$CUDA_PATH``, the path or the usual folder.

    Returns:
        The toolkit (None where there is none) and nvcc's version line (or the reason why there is none).
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] or ["/usr/local/cuda"]
    nvcc = next((found for home in homes if (found := shutil.which("nvcc", path=f"{home}/bin"))), shutil.which("nvcc"))
    if nvcc is None:
        return None, "nvcc not found (set CUDA_HOME or put nvcc on PATH)"
    # nvcc may be a wrapper script outside of its toolkit: it says itself where the toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]).stderr, re.MULTILINE)
    known = {int(code) for code in re.findall(r"sm_(\d+)$", _run([nvcc, "--list-gpu-code"]).stdout, re.MULTILINE)}
    targets = tuple(target for target in _CUDA_TARGETS if target in known)
    if top is None or not targets:
        return None, f"{nvcc} does not answer as nvcc 11.5 or newer does"
    version = re.search(r"release .*", _run([nvcc, "--version"]).stdout)
    return Cuda(nvcc, Path(top[1].strip()).resolve(), targets), f"nvcc {version[0]}" if version else "nvcc"


def find_ninja() -> str:
    """Returns ninja's path: on PATH in an isolated build, beside Python in an environment that is not activated."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise ToolchainError("the native build needs ninja: pip install ninja")
    return found
