"""The code that nvcc generates for the CUDA kernels: warnings, spills, registers, wide loads. Needs no GPU."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from emulation.building import CSRC, KERNELS, session_folder
from sass import Instruction, cuobjdump, disassembled, is_wide_load, main_loop

import gradprobe
from gradprobe.ops import libraries

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Name of the kernel with the main loop of each file, and the loop's loads and stores.
MAIN_LOOPS = {
    "grad_stats.cu": ("sum_chunks", 4, 0),
    "scale.cu": ("scale_chunks", 4, 4),
    "residual_add.cu": ("join_chunks", 4, 2),
    "branch_stats.cu": ("branch_chunks", 4, 0),
}
# The most instructions per element in the main loop of `sum_chunks`, by type and elements of a 16-byte load.
INSTRUCTIONS = {
    ("float", 4): 7.5,
    ("__nv_bfloat16", 8): 7.0,
    ("__half", 8): 7.0,
    ("double", 2): 30.0,
    ("gradprobe::Float8E4M3", 16): 13.0,
    ("gradprobe::Float8E5M2", 16): 13.0,
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
        instructions: In order.
    """

    name: str
    registers: int
    instructions: tuple[Instruction, ...]

    def named(self, pattern: str) -> list[str]:
        """Returns the mnemonics that match a pattern at their start."""
        return [each.name for each in self.instructions if re.match(pattern, each.name)]


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

    tool = cuobjdump()
    instructions = {} if tool is None else disassembled(tool, target)
    return tuple(
        Kernel(readable, int(registers[name]), instructions.get(name, ()))
        for name, readable in zip(registers, demangled(list(registers)), strict=True)
    )


def kernels(source: str, architecture: int, name: str) -> list[Kernel]:
    found = [kernel for kernel in compiled(source, architecture) if name in kernel.name]
    assert found, f"{source} has no kernel {name}"
    return found


def loads_of(source: str, kernel: str) -> int:
    """Returns the loads of a kernel's main loop."""
    return 2 if "Float8" in kernel else MAIN_LOOPS[source][1]


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
            assert not kernel.named(r"(LDL|STL)\b|.*\.FTZ"), kernel.name

    def test_atomics_only_where_integers_are_counted(self, source: str, architecture: int) -> None:
        for kernel in compiled(source, architecture):
            found = set(kernel.named("ATOM|RED"))
            if "count_magnitudes" in kernel.name:  # in shared memory
                assert found, kernel.name
                assert all(re.fullmatch(r"ATOMS\.(ADD|POPC\.INC\.32)", name) for name in found), (kernel.name, found)
            else:
                assert not found, kernel.name

    def test_main_loop_moves_16_bytes_with_all_loads_in_flight(self, source: str, architecture: int) -> None:
        if source not in MAIN_LOOPS:
            pytest.skip("reads rows, or has one load in flight")
        name, _, stores = MAIN_LOOPS[source]
        for kernel in kernels(source, architecture, name):
            loads = loads_of(source, kernel.name)
            wide = [k for k, i in enumerate(kernel.instructions) if is_wide_load(i)]
            assert len(wide) > loads, kernel.name  # the main loop's, and the remainder's
            between = [i.name for i in kernel.instructions[wide[0] : wide[loads - 1]]]
            arithmetic = [
                name for name in between if re.match(r"(FADD|FMUL|FFMA|DADD|DMUL|DFMA|HADD2|HFMA2|STG)", name)
            ]
            # 7.5 has no bfloat16 arithmetic: the compiler starts on the first vector before it loads the last.
            if not (architecture == 75 and "bfloat16" in kernel.name):
                assert not arithmetic, f"{kernel.name}: {arithmetic} before the last of {loads} loads"
            assert len(kernel.named(r"STG.*\.128")) >= stores + bool(stores), kernel.name

    def test_statistics_take_few_instructions(self, source: str, architecture: int) -> None:
        if source != "grad_stats.cu":
            pytest.skip("has no limit")
        for (type_, vector), limit in INSTRUCTIONS.items():
            for kernel in kernels(source, architecture, f"sum_chunks<{type_},"):
                loop = main_loop(kernel.instructions, loads_of(source, kernel.name))
                # 12.0 pads float64 arithmetic with instructions that do nothing.
                issued = [each for each in loop if type_ != "double" or each.name != "NOP"]
                assert len(issued) <= limit * vector * sum(map(is_wide_load, loop)), (kernel.name, len(issued))


@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump from the CUDA toolkit or Triton")
def test_the_library_has_code_for_every_gpu_from_the_oldest_on() -> None:
    """Every file has machine code of each target, and PTX of the oldest and of the newest for all others."""
    if libraries.build_info().get("cuda") != "built":
        pytest.skip(libraries.parts()["cuda"])
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"sm_{target}" for target in ARCHITECTURES if f"sm_{target}" in known]
    library = Path(gradprobe.__file__).parent / "_C.so"
    tool = cuobjdump()
    assert tool is not None
    dump = subprocess.run([tool, "-lelf", "-lptx", str(library)], capture_output=True, text=True, check=True).stdout
    in_library = Counter(re.findall(r"\.(sm_\d+\.(?:cubin|ptx))$", dump, re.MULTILINE))
    n_files = len(list((CSRC / "cuda").glob("*.cu")))
    needed = [f"{target}.cubin" for target in targets] + [f"{target}.ptx" for target in (targets[0], targets[-1])]
    assert in_library == dict.fromkeys(needed, n_files)


def test_the_build_flushes_no_subnormals() -> None:
    text = (CSRC.parent / "build_backend" / "native.py").read_text()
    assert "fast_math" not in text
    assert "ftz" not in text
