"""The code that nvcc generates for the CUDA kernels: warnings, spills, registers, wide loads. Needs no GPU."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from emulation.building import CSRC, KERNELS, session_folder

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Name of the kernel with the main loop of each file, and the loop's loads and stores.
MAIN_LOOPS = {
    "grad_stats.cu": ("sum_chunks", 4, 0),
    "scale.cu": ("scale_chunks", 4, 4),
    "residual_add.cu": ("join_chunks", 4, 2),
    "branch_stats.cu": ("branch_chunks", 4, 0),
}
THREADS = 256
REGISTERS = 64 * 1024  # per multiprocessor, on every architecture above

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# The others run with the long tests; a build with GRADPROBE_WERROR compiles all, with warnings as errors.
ALWAYS = ("grad_stats.cu", 90)
EVERY_BUILD = [
    pytest.param(source, architecture, marks=() if (source, architecture) == ALWAYS else pytest.mark.soak)
    for source in KERNELS
    for architecture in ARCHITECTURES
]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: As in the source, with its template arguments.
        registers: Per thread.
        instructions: SASS mnemonics, in order.
    """

    name: str
    registers: int
    instructions: tuple[str, ...]


def cuobjdump() -> str | None:
    """Finds the disassembler in the CUDA toolkit or in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin"]
    return shutil.which("cuobjdump") or next(
        (found for folder in folders if (found := shutil.which("cuobjdump", path=str(folder)))), None
    )


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|gradprobe::cuda::", "", name) for name in done.stdout.splitlines()]


@cache
def compiled(source: str, architecture: int) -> tuple[Kernel, ...]:
    """Compiles one file and returns its kernels; fails on any compiler warning."""
    target = session_folder() / f"{Path(source).stem}-sm{architecture}.o"
    command = ["nvcc", "-std=c++20", "-O3", f"-I{CSRC}", f"-arch=sm_{architecture}", "-Werror=all-warnings"]
    command += ["-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command += ["-c", str(CSRC / "cuda" / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    registers = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL))
    assert registers, report
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", report), report

    instructions: dict[str, list[str]] = {name: [] for name in registers}
    tool = cuobjdump()
    if tool is not None:
        dump = subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
        name = ""
        for line in dump.splitlines():
            if match := re.search(r"Function : (\w+)", line):
                name = match[1]
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", line):
                instructions[name].append(match[1])
    return tuple(
        Kernel(readable, int(registers[name]), tuple(instructions[name]))
        for name, readable in zip(registers, demangled(list(registers)), strict=True)
    )


def kernels(source: str, architecture: int, name: str) -> list[Kernel]:
    found = [kernel for kernel in compiled(source, architecture) if name in kernel.name]
    assert found, f"{source} has no kernel {name}"
    return found


@pytest.mark.parametrize(("source", "architecture"), EVERY_BUILD)
def test_registers_leave_room_for_the_claimed_occupancy(source: str, architecture: int) -> None:
    """Four blocks fit on a multiprocessor (half of an H100, all of a T4); fewer where docs/kernels.md says so."""
    for kernel in compiled(source, architecture):
        two_sums = "MaskGradient" in kernel.name and "(Counted)0" not in kernel.name
        merges = "merge_partials" in kernel.name or "clip_rows" in kernel.name
        blocks = 2 if two_sums or merges else 3 if "branch_chunks" in kernel.name else 4
        assert kernel.registers <= REGISTERS // THREADS // blocks, kernel.name


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump from the CUDA toolkit or Triton")
@pytest.mark.parametrize(("source", "architecture"), EVERY_BUILD)
class TestMachineCode:
    def test_no_local_memory_and_no_flushed_subnormals(self, source: str, architecture: int) -> None:
        for kernel in compiled(source, architecture):
            assert len(kernel.instructions) > 100, kernel.name
            assert not [i for i in kernel.instructions if re.match(r"(LDL|STL)\b", i) or ".FTZ" in i], kernel.name

    def test_no_atomics(self, source: str, architecture: int) -> None:
        for kernel in compiled(source, architecture):
            assert not [i for i in kernel.instructions if re.match(r"(ATOM|RED)", i)], kernel.name

    def test_main_loop_moves_16_bytes_with_all_loads_in_flight(self, source: str, architecture: int) -> None:
        if source not in MAIN_LOOPS:
            pytest.skip("reads rows, not tensors")
        name, loads, stores = MAIN_LOOPS[source]
        for kernel in kernels(source, architecture, name):
            wide = [k for k, i in enumerate(kernel.instructions) if i.startswith("LDG") and ".128" in i]
            assert len(wide) > loads, kernel.name  # the main loop's, and the remainder's
            between = kernel.instructions[wide[0] : wide[loads - 1]]
            arithmetic = [i for i in between if re.match(r"(FADD|FMUL|FFMA|DADD|DMUL|DFMA|HADD2|HFMA2|STG)", i)]
            # 7.5 has no bfloat16 arithmetic: the compiler starts on the first vector before it loads the last.
            if not (architecture == 75 and "bfloat16" in kernel.name):
                assert not arithmetic, f"{kernel.name}: {arithmetic} before the last of {loads} loads"
            written = [i for i in kernel.instructions if i.startswith("STG") and ".128" in i]
            assert len(written) >= stores + bool(stores), kernel.name


def test_the_build_flushes_no_subnormals() -> None:
    text = (CSRC.parent / "build_backend" / "native.py").read_text()
    assert "fast_math" not in text
    assert "ftz" not in text
