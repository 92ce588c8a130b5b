"""Builds the emulated kernels with a host compiler, once per process, and runs the checks of a build.

Modes: "plain"; "address" (address and undefined-behaviour sanitizers); "thread" (thread sanitizer). A sanitizer's
library must be loaded before Python starts, so such a build runs in a child process with `sanitizer_environment`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
KERNELS = ("grad_stats.cu", "magnitudes.cu", "scale.cu", "clip_coefficient.cu", "residual_add.cu", "branch_stats.cu")
HARNESS = ("scheduler.cpp", "exports.cpp")

_FLAGS = {
    "plain": ["-O1"],
    "address": [
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fsanitize-sections=emulated_shared",
        "-fno-sanitize-recover=undefined",
    ],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
_DEFINES = {"plain": [], "address": ["-DEMULATION_ASAN"], "thread": ["-DEMULATION_TSAN"]}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def compiler() -> str | None:
    """Returns the host compiler's path, or None."""
    return shutil.which("g++")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(folder: Path, mode: str = "plain", csrc: Path = CSRC, kernels: Sequence[str] = KERNELS) -> Path:
    """Builds the library of `mode` in `folder` from the kernels in `csrc`; keeps objects that exist already."""
    library = folder / f"libkernels-{mode}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    common = [
        "g++",
        "-std=c++20",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        f"-I{HERE / 'include'}",
        *_DEFINES[mode],
    ]
    jobs = []
    built: list[str] = []
    kept: list[str] = []
    for source in [HERE / name for name in HARNESS] + [csrc / "cuda" / name for name in kernels]:
        target = folder / f"{source.stem}-{mode}.o"
        (kept if target.exists() else built).append(str(target))
        if target.exists():
            continue
        # The thread sanitizer would report the scheduler's switching between fibers.
        instrumented = source.name != "scheduler.cpp"
        flags = _FLAGS[mode] if instrumented else ["-O2", "-g"]
        jobs.append([*common, *flags, f"-I{csrc}", "-x", "c++", "-c", str(source), "-o", str(target)])
    running = [subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for job in jobs]
    for job, process in zip(jobs, running, strict=True):
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(job)}\n{output}")
    # New objects first: if several objects define an inline function, the linker uses the first.
    _run(["g++", "-shared", *_FLAGS[mode], *built, *kept, "-o", str(library)])
    return library


def keep_objects(source: Path, folder: Path, mode: str, rebuilt: Sequence[str]) -> None:
    """Copies the objects of a build, except those of `rebuilt`, to the folder of the next build."""
    if unknown := set(rebuilt) - {*HARNESS, *KERNELS}:
        raise ValueError(f"no such sources: {unknown}")  # would compile nothing
    for name in (*HARNESS, *KERNELS):
        if name not in rebuilt:
            shutil.copy(source / f"{Path(name).stem}-{mode}.o", folder)


def build_operators(folder: Path, torch_root: Path) -> Path:
    """Builds a library that registers the operators of csrc/stable/register_cuda.cpp for CPU tensors.

    The operators' namespace is gradprobe_emulated. The caller defines their schemas.
    """
    library = folder / "liboperators.so"
    if library.exists():
        return library
    build(folder)
    _run(
        [
            *("g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
            *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
            f'-DGRADPROBE_TORCH_DEVICE="{HERE / "torch_device.h"}"',
            *(f"-I{HERE / 'include'}", f"-I{CSRC}", "-isystem", str(torch_root / "include")),
            str(CSRC / "stable" / "register_cuda.cpp"),
            *(str(folder / f"{Path(name).stem}-plain.o") for name in ("scheduler.cpp", *KERNELS)),
            *(f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs", "-o", str(library)),
        ]
    )
    return library


@cache
def session_folder() -> Path:
    """Returns a folder for builds, which is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="gradprobe-emulation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def session_build(mode: str = "plain") -> Path:
    """Returns the library of `mode`, built once per process."""
    return build(session_folder(), mode)


def run_sweep(library: Path, mode: str = "plain", *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the checks of sweep.py on a library in a child process."""
    command = [sys.executable, "-m", "emulation.sweep", str(library), *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent,
        env=sanitizer_environment(mode),
        timeout=900,
    )


def sanitizer_environment(mode: str) -> dict[str, str]:
    """Returns the environment of a child process that loads a library of `mode`."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    paths = []
    for name in _RUNTIMES.get(mode, ()):
        path = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        paths.append(str(Path(path).resolve()))
    if paths:
        environment["LD_PRELOAD"] = " ".join(paths)
    environment["ASAN_OPTIONS"] = "detect_leaks=0:exitcode=66:detect_stack_use_after_return=0"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1:exitcode=66"
    environment["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66:report_signal_unsafe=0"
    return environment
