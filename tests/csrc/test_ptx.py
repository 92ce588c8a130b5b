"""The PTX that nvcc generates for the CUDA kernels, translated to C++ and run on the CPU: values, and bytes moved.

The emulation compiles the kernels' source with the host compiler. Here nvcc compiles it: its arithmetic, branches and
inline assembly run, and the host code of its objects launches them.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from emulation.building import compiler, run_sweep, session_folder
from emulation.kernels import CHUNK_BYTES, ELEMENTS, ITEM_BYTES, WRITTEN, Block, encode
from emulation.mutants import MUTANTS, plant
from emulation.sweep import THREADS, all_checks, check_tensors, random_values
from numpy.typing import NDArray
from ptx.building import build, build_program
from ptx.kernels import PtxKernels, Traffic
from ptx.translator import UnknownInstruction, translated

NEWEST, OLDEST = 120, 75  # the library has PTX for these two
ROW = 48  # bytes of a row and of a partial result

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or compiler() is None or sys.platform != "linux", reason="needs nvcc and g++ on Linux"
)
# Two of the long ones too, for tables of the largest size.
CHECKS = all_checks(short=True) | {
    name: all_checks()[name] for name in ("grad_stats/many/3000-mostly-empty", "scale/many")
}
# For the oldest GPUs only the statistics are compiled, to save a minute.
OF_BOTH = [name for name in CHECKS if name.startswith("grad_stats/")]
EVERY_CHECK = [*((NEWEST, name) for name in CHECKS), *((OLDEST, name) for name in OF_BOTH)]
on_both = pytest.mark.parametrize("kernels", [NEWEST, OLDEST], indirect=True)
on_newest = pytest.mark.parametrize("kernels", [NEWEST], indirect=True)


# pytest builds each library once; if that fails, every test that needs it shows the compiler's error.
@pytest.fixture(scope="module")
def newest() -> Path:
    return build(session_folder() / "ptx-newest", NEWEST)


@pytest.fixture(scope="module")
def oldest(newest: Path) -> Path:
    return build(session_folder() / "ptx-oldest", OLDEST, rebuilt=["grad_stats.cu"], others=newest)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> PtxKernels:
    library = {NEWEST: "newest", OLDEST: "oldest"}[request.param]
    return PtxKernels(request.getfixturevalue(library))


@needs_nvcc
@pytest.mark.soak
@pytest.mark.timeout(900)  # the first test builds the library
class TestPtx:
    @pytest.mark.parametrize(("kernels", "name"), EVERY_CHECK, indirect=["kernels"])
    def test_matches_the_reference(self, kernels: PtxKernels, name: str) -> None:
        CHECKS[name](kernels)

    @on_both
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_long_tensors_of_extreme_values_match_the_reference(self, kernels: PtxKernels, element: str) -> None:
        blocks = [Block(encode(values, element), element) for values in long_extremes(element)]
        check_tensors(kernels, blocks, f"{element} long extremes")

    @on_both
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_statistics_read_each_element_once(self, kernels: PtxKernels, element: str) -> None:
        sizes = [0, 1, 1000, CHUNK_BYTES // ITEM_BYTES[element], 3 * CHUNK_BYTES // ITEM_BYTES[element] + 77, 5]
        blocks = [random_block(numel, element, offset=k % 2) for k, numel in enumerate(sizes)]
        data, rows = sum(sizes) * ITEM_BYTES[element], ROW * len(sizes)
        partials = ROW * 4  # the chunks of the one tensor with several
        flags = 4 * THREADS * (8 + 2)  # a block per chunk, then one for that tensor and one for the empty one

        kernels.take_traffic()
        kernels.grad_stats(blocks)
        assert kernels.take_traffic() == Traffic(data + partials, partials + rows)
        with kernels.counting_if(1):
            kernels.grad_stats(blocks)
        assert kernels.take_traffic() == Traffic(flags + data + partials, partials + rows)
        with kernels.counting_if(0):
            kernels.grad_stats(blocks)
        assert kernels.take_traffic() == Traffic(flags, 0)

    @on_newest
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_magnitudes_read_each_element_once(self, kernels: PtxKernels, element: str) -> None:
        """Those of float64 twice: their scale comes first."""
        sizes = [0, 1, 1000, 3 * CHUNK_BYTES // ITEM_BYTES[element] + 77]
        blocks = [random_block(numel, element, offset=k % 2) for k, numel in enumerate(sizes)]
        data = sum(sizes) * ITEM_BYTES[element] * (2 if element == "f64" else 1)
        n_chunks, counts, moments, rows = 6, 4 * 282, 28, 3 * 8 * 285
        padding = 4  # is stored with the moments
        kernels.take_traffic()
        kernels.magnitudes(blocks)
        partials = (counts + moments) * n_chunks
        assert kernels.take_traffic() == Traffic(data + partials, partials + padding * n_chunks + rows)

    @on_newest
    @pytest.mark.parametrize("element", WRITTEN)
    @pytest.mark.parametrize("n_chunks", [1, 3])
    def test_other_kernels_read_and_write_each_element_once(
        self, kernels: PtxKernels, element: str, n_chunks: int
    ) -> None:
        numel = (n_chunks - 1) * CHUNK_BYTES // ITEM_BYTES[element] + 1001
        data = numel * ITEM_BYTES[element]
        partials = ROW * n_chunks if n_chunks > 1 else 0
        a, b = random_block(numel, element, 1), random_block(numel, element, 1)
        coefficients = THREADS * n_chunks  # each thread reads it

        kernels.take_traffic()
        kernels.scale([a], 0.5)
        assert kernels.take_traffic() == Traffic(data + 4 * coefficients, data)
        kernels.scale([a], 1.0, "f64")
        assert kernels.take_traffic() == Traffic(8 * coefficients, 0)
        kernels.residual_add(a, b, relu=True)
        assert kernels.take_traffic() == Traffic(2 * data + partials, data + partials + ROW)
        kernels.residual_add(a, b, relu=True, counts=False)
        assert kernels.take_traffic() == Traffic(2 * data, data)
        kernels.residual_add_backward(a, b)
        assert kernels.take_traffic() == Traffic(2 * data + 2 * partials, data + 2 * partials + 2 * ROW)
        kernels.branch_stats(a, b)
        assert kernels.take_traffic() == Traffic(2 * data + 2 * partials, 2 * partials + 2 * ROW)
        kernels.clip_coefficient(np.ones((1000, 6)), 1.0)
        assert kernels.take_traffic() == Traffic(4 * 8 * 1000, 2 * 8)  # no counts; the norm and the factor

    def test_a_planted_bug_is_caught(self, tmp_path: Path, newest: Path) -> None:
        (mutant,) = (each for each in MUTANTS if each.name == "tail_off_by_one")
        csrc = plant(mutant, tmp_path)
        planted = build(tmp_path / "planted", NEWEST, csrc, rebuilt=[mutant.kernel], others=newest)
        done = run_sweep(planted, "plain", "--short", "--only", mutant.caught_by)
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"FAILED {mutant.caught_by}" in done.stdout


@pytest.mark.soak
@pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_a_build_that_fails_shows_its_error_in_every_test(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: planted' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    options = ("-q", "-p", "no:cacheprovider", "-m", "soak", "-k", "of_extreme_values")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    n_tests = 2 * len(ELEMENTS)
    assert f"{n_tests} errors" in done.stdout, done.stdout
    assert len(re.findall("^E +nvcc fatal: planted$", done.stdout, re.MULTILINE)) == n_tests
    assert "FileExistsError" not in done.stdout


INSTRUCTIONS = """
.version 9.0
.target sm_75
.address_size 64
.visible .entry instructions(
	.param .u64 instructions_param_0,
	.param .u64 instructions_param_1
)
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<4>;
	.reg .b32 	%f<6>;
	.reg .b64 	%rd<5>;
	ld.param.u64 	%rd1, [instructions_param_0];
	ld.param.u64 	%rd2, [instructions_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 8;
	add.s64 	%rd1, %rd1, %rd3;
	mul.wide.u32 	%rd4, %r1, 20;
	add.s64 	%rd2, %rd2, %rd4;
	ld.global.v2.f32 	{%f1, %f2}, [%rd1];
	max.f32 	%f3, %f1, %f2;
	min.f32 	%f4, %f1, %f2;
	fma.rn.f32 	%f5, %f1, %f2, 0fBF800000;
	setp.gtu.f32 	%p1, %f1, %f2;
	selp.b32 	%r2, 1, 0, %p1;
	setp.ne.f32 	%p2, %f1, %f2;
	selp.b32 	%r3, 1, 0, %p2;
	st.global.f32 	[%rd2], %f3;
	st.global.f32 	[%rd2+4], %f4;
	st.global.f32 	[%rd2+8], %f5;
	st.global.u32 	[%rd2+12], %r2;
	st.global.u32 	[%rd2+16], %r3;
	ret;
}
"""


@needs_nvcc
@pytest.mark.soak
def test_instructions_follow_the_standard_of_ptx(tmp_path: Path) -> None:
    """Of NaN, of zeros with a sign, and of a product that only a fused addition keeps exact."""
    program = ctypes.CDLL(str(build_program(tmp_path, INSTRUCTIONS)))
    nan, tiny, odd = np.nan, 2.0**-149, 1 + 2.0**-12
    pairs = np.array([(nan, 1), (1, nan), (nan, nan), (-0.0, 0.0), (0.0, -0.0), (tiny, 0.0), (odd, odd)], np.float32)
    out = np.zeros((len(pairs), 5), np.uint32)
    addresses = [ctypes.c_void_p(each.ctypes.data) for each in (pairs, out)]
    program.fake_launch(b"instructions", 1, len(pairs), (ctypes.c_void_p * 2)(*map(ctypes.addressof, addresses)))

    largest, smallest, fused = np.ascontiguousarray(out[:, :3].T).view(np.float32)
    exact = odd * odd - 1
    np.testing.assert_array_equal(largest, np.float32([1, 1, nan, 0, 0, tiny, odd]))
    np.testing.assert_array_equal(smallest, np.float32([1, 1, nan, 0, 0, 0, odd]))
    np.testing.assert_array_equal(fused, np.float32([nan, nan, nan, -1, -1, -1, exact]))
    assert np.signbit(largest[3:5]).tolist() == [False, False]
    assert np.signbit(smallest[3:5]).tolist() == [True, True]
    assert out[:, 3].tolist() == [1, 1, 1, 0, 0, 1, 0]  # greater, or unordered
    assert out[:, 4].tolist() == [0, 0, 0, 0, 0, 1, 0]  # unequal, and ordered
    assert out[2, 0] == 0x7FFFFFFF  # the only NaN that float instructions make


def random_block(numel: int, element: str, offset: int) -> Block:
    return Block(encode(random_values(np.random.default_rng(numel), numel), element), element, offset)


def long_extremes(element: str) -> list[NDArray[np.float64]]:
    """Returns tensors longer than a chunk: of one magnitude, of two, and with large elements that hide small ones."""
    exponents: Sequence[int] = {
        "f16": [-24, -19, -14, 0, 14],
        "bf16": [-133, -126, -71, -68, -60, -56, -55, 0, 54, 55, 58, 61, 62, 126],
        "f32": [-149, -126, -71, -68, -60, -56, -55, 0, 54, 55, 58, 61, 62, 126],
        "f64": [-1074, -1022, -540, -481, -480, -479, 0, 479, 480, 481, 511, 1022],
        "e4m3": [-9, -7, -6, 0, 7],
        "e5m2": [-16, -15, -14, 0, 14],
    }[element]
    rng = np.random.default_rng(12)
    numel = CHUNK_BYTES // ITEM_BYTES[element] + 16_384
    noise = rng.uniform(0.5, 1.5, numel) * rng.choice([-1, 1], numel)
    cases = [np.ldexp(noise, exponent) for exponent in exponents]
    rising = noise.copy()
    rising[numel // 2 :] *= 4
    cases += [np.ldexp(order, exponent - 1) for exponent in exponents[:-1] for order in (rising, rising[::-1])]
    for small in (0.99 * 2.0**-24, 0.99**0.5 * 2.0**-12):  # rounds away beside 1, or its square does
        rare = np.full(numel, small)
        rare[:2048:8] = 1.0
        cases.append(rare)
    return cases


def test_an_unknown_instruction_is_an_error() -> None:
    ptx = """
.version 9.0
.target sm_75
.address_size 64
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	.reg .b32 	%f<3>;
	mov.f32 	%f1, 0f3F800000;
	add.ftz.f32 	%f2, %f1, %f1;
	ret;
}
"""
    needed = r"flushing\.ptx:11: add\.ftz\.f32 .*: instructions\.h has no op_add_ftz"
    with pytest.raises(UnknownInstruction, match=needed):
        translated(ptx, "flushing.ptx")
    assert 'Kernel kernel_kernel{"kernel", run_kernel}' in translated(ptx.replace(".ftz", ""), "exact.ptx")


def test_an_unknown_directive_is_an_error() -> None:
    with pytest.raises(UnknownInstruction, match=r"f\.ptx:2: \.global \.b8 table"):
        translated(".version 9.0\n.global .b8 table[4];\n", "f.ptx")
