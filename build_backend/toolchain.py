"""Finds what the native build needs (torch, a C++ compiler, Python's headers, nvcc), or gives the reason."""

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
# torch/version.py has the local version (+cu130, +cpu), which the wheel's metadata may omit.
_FIND_TORCH = """
import importlib.util, json, pathlib, runpy, sys
sys.path.pop(0)
spec = importlib.util.find_spec("torch")
root = pathlib.Path(spec.origin).parent if spec and spec.origin else None
print(json.dumps(root and [str(root), runpy.run_path(str(root / "version.py"))["__version__"]]))
"""


class ToolchainError(RuntimeError):
    """The build lacks something that it needs; the message says what to do."""


@dataclass(frozen=True)
class Torch:
    """The torch to build against.

    Attributes:
        root: Folder of the installed package.
        version: Full version including the local part, e.g. ``2.13.0+cpu``.
        in_target: Whether the target environment has this torch, not just the temporary build environment.
    """

    root: Path
    version: str
    in_target: bool

    @property
    def requirement(self) -> str:
        """The run-time dependency: any supported torch, or exactly the one that was installed for the build."""
        return f"torch{SUPPORTED_TORCH}" if self.in_target else f"torch=={self.version.partition('+')[0]}"


@dataclass(frozen=True)
class Cuda:
    """An nvcc, its toolkit's folder, and the compute capabilities that it can compile for (80 for sm_80)."""

    nvcc: str
    root: Path
    targets: tuple[int, ...]


def _run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def find_torch() -> Torch | None:
    """Finds torch in the target environment, else on this process's own path.

    pip isolates a build through ``PYTHONPATH``, so the same interpreter with ``-E`` sees the target environment and its
    ``.pth`` files and system site-packages. uv builds with a separate interpreter, see ``find_uv_target``.
    """
    target = find_uv_target() or sys.executable
    for command, in_target in (([target, "-E"], True), ([sys.executable], False)):
        answer = _run([*command, "-c", _FIND_TORCH])
        found = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 and answer.stdout else None
        if found:
            return Torch(Path(found[0]), found[1], in_target)
    return None


def find_cxx() -> tuple[list[str] | None, str]:
    """Finds a working C++20 compiler: ``$CXX`` if set, else one of the usual names.

    Returns:
        The command, or None, and its version line, or the reason why there is none.
    """
    if sys.platform == "win32":
        return None, "not built on Windows"
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
    """Returns this Python's include folders, or none and the reason why."""
    folders = [Path(sysconfig.get_path(name)) for name in ("include", "platinclude")]
    if not any((folder / "Python.h").is_file() for folder in folders):
        return [], f"Python.h not found in {folders[0]} (install your system's python3-dev or python3-devel)"
    return list(dict.fromkeys(folders)), ""


def find_cuda() -> tuple[Cuda | None, str]:
    """Finds nvcc in ``$CUDA_HOME``, in ``$CUDA_PATH``, in the default folder or on ``PATH``.

    Returns:
        The toolkit, or None, and nvcc's version line, or the reason why there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] or ["/usr/local/cuda"]
    nvcc = next((found for home in homes if (found := shutil.which("nvcc", path=f"{home}/bin"))), shutil.which("nvcc"))
    if nvcc is None:
        return None, "nvcc not found (set CUDA_HOME or put nvcc on PATH)"
    # nvcc may be a wrapper script outside its toolkit, so ask it where the toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]).stderr, re.MULTILINE)
    known = {int(code) for code in re.findall(r"sm_(\d+)$", _run([nvcc, "--list-gpu-code"]).stdout, re.MULTILINE)}
    targets = tuple(target for target in _CUDA_TARGETS if target in known)
    if top is None or not targets:
        return None, f"{nvcc}: needed nvcc 11.5 or newer, which lists its toolkit and its targets"
    version = re.search(r"release .*", _run([nvcc, "--version"]).stdout)
    return Cuda(nvcc, Path(top[1].strip()).resolve(), targets), f"nvcc {version[0]}" if version else "nvcc"


def find_ninja() -> str:
    """Returns ninja's path: on PATH, or beside Python if the environment is not activated."""
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise ToolchainError("the native build needs ninja: pip install ninja")
    return found
