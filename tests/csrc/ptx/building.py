"""Builds a library that runs the PTX of the CUDA kernels: nvcc's host code, a fake runtime, and translated kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from emulation.building import CSRC, KERNELS

from ptx.translator import translated

HERE = Path(__file__).resolve().parent
EMULATION = HERE.parent / "emulation"
HARNESS = ("fake_runtime.cpp", "emulation/exports.cpp", "emulation/scheduler.cpp", "ptx/machine.cpp")

_COMMON = ("-std=c++20", "-c")
_CUDA = ("-O3", "-Xcompiler=-fPIC", "--keep")
# nvcc gives host code the headers of the CUDA runtime; the emulation has its own of these names.
_HOST = ("-O1", f"-I{CSRC}", f"-Xcompiler=-fPIC,-Wall,-Wextra,-iquote,{EMULATION / 'include'}")
# Integers wrap around, and a product and a sum are rounded one by one. -O0: compiling takes longer than the tests.
_PROGRAM = ("-O0", "-fPIC", "-fwrapv", "-ffp-contract=off", f"-I{EMULATION / 'include'}", f"-I{HERE}")


def build(
    folder: Path, architecture: int, csrc: Path = CSRC, rebuilt: Sequence[str] = KERNELS, others: Path | None = None
) -> Path:
    """Builds the library for the PTX of one architecture.

    Args:
        folder: For the library; must not exist.
        architecture: As nvcc names it: 75 is compute capability 7.5.
        csrc: Where the kernels are.
        rebuilt: Files of csrc/cuda to compile.
        others: A library with all other objects beside it. Needed unless all files are compiled.
    """
    folder.mkdir()
    jobs = [partial(_compile_kernels, csrc / "cuda" / name, folder, architecture) for name in rebuilt]
    if others is None:
        jobs += [partial(_compile_harness, HERE.parent / name, folder) for name in HARNESS]
    else:
        for each in others.parent.glob("*.o"):
            shutil.copy(each, folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    return _linked(folder)


def build_program(folder: Path, ptx: str) -> Path:
    """Builds a library of PTX alone, whose kernels `fake_launch` runs by name."""
    _compile_program(ptx, "program.ptx", folder)
    for name in ("emulation/scheduler.cpp", "ptx/machine.cpp"):
        _compile_harness(HERE.parent / name, folder)
    return _linked(folder)


def _linked(folder: Path) -> Path:
    library = folder / "libptx.so"
    _run("g++", "-shared", "-Wl,-z,defs", *folder.glob("*.o"), "-o", library)
    return library


def _compile_kernels(source: Path, folder: Path, architecture: int) -> None:
    kept = folder / source.stem
    kept.mkdir()
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    options = (*_COMMON, *_CUDA, code, f"--keep-dir={kept}", f"-I{source.parents[1]}")
    _run("nvcc", *options, source, "-o", folder / f"{source.stem}.o")
    ptx = kept / f"{source.stem}.ptx"
    _compile_program(ptx.read_text(), ptx.name, folder)


def _compile_program(ptx: str, name: str, folder: Path) -> None:
    program = folder / f"{name}.cpp"
    program.write_text(translated(ptx, name))
    _run("g++", *_COMMON, *_PROGRAM, program, "-o", program.with_suffix(".o"))


def _compile_harness(source: Path, folder: Path) -> None:
    _run("nvcc", *_COMMON, *_HOST, source, "-o", folder / f"{source.stem}.o")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
