"""The CUDA kernels, run on the CPU by the emulation, against a reference: values, thread order, launches, limits."""

import re
import sys

import numpy as np
import pytest
from emulation.building import CSRC, compiler, session_build
from emulation.kernels import ELEMENTS, ITEM_BYTES, VECTOR_BYTES, Block, Kernels, encode
from emulation.sweep import all_checks, check_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    compiler() is None or sys.platform != "linux", reason="the emulation needs g++ on Linux"
)

SLOW = {"grad_stats/many_chunks", "grad_stats/many/3000-mostly-empty"}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(session_build())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in SLOW else name for name in all_checks()]
)
def test_kernels_match_the_reference(kernels: Kernels, name: str) -> None:
    all_checks()[name](kernels)


@st.composite
def groups_of_tensors(draw: st.DrawFn) -> list[Block]:
    """Tensors of one type with any size, alignment and magnitude, and special values at random places."""
    element = draw(st.sampled_from(ELEMENTS))
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        numel = draw(st.one_of(st.integers(0, 70), st.integers(0, 20_000)))
        low, high = sorted(draw(st.tuples(st.integers(-1075, 1023), st.integers(-1075, 1023))))
        values = (
            rng.uniform(1, 2, numel) * np.ldexp(1.0, rng.integers(low, high + 1, numel)) * rng.choice([-1, 1], numel)
        )
        for special in draw(st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf]), max_size=3)):
            if numel:
                values[rng.integers(numel)] = special
        offset = draw(st.integers(0, VECTOR_BYTES // ITEM_BYTES[element] - 1))
        blocks.append(Block(encode(values, element), element, offset))
    return blocks


@given(blocks=groups_of_tensors())
@settings(max_examples=150)
def test_any_tensors_match_the_reference(kernels: Kernels, blocks: list[Block]) -> None:
    check_tensors(kernels, blocks, "random tensors")


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [([], 0), ([0], 1), ([5] * 100, 1), ([20_000, 5], 2), ([5] * 600, 1), ([5] * 2000, 1), ([5] * 2050, 2)],
    ids=["none", "empty", "100-small", "two-chunks", "600-small", "2000-small", "2050-small"],
)
def test_launches_stay_few(kernels: Kernels, sizes: list[int], launches: int) -> None:
    blocks = [Block(encode(np.ones(n), "f32"), "f32") for n in sizes]
    kernels.take_launches()
    kernels.grad_stats(blocks)
    assert kernels.take_launches() == launches


@pytest.mark.parametrize(("n_tensors", "most_kib"), [(128, 3), (129, 9), (512, 9), (513, 32)])
def test_a_launch_passes_the_smallest_table_that_fits(kernels: Kernels, n_tensors: int, most_kib: int) -> None:
    blocks = [Block(encode(np.ones(5), "f32"), "f32") for _ in range(n_tensors)]
    kernels.take_launches()
    kernels.grad_stats(blocks)
    launches, parameter_bytes = kernels.take_launches_and_bytes()
    assert launches == 1
    assert 16 * n_tensors < parameter_bytes <= 1024 * most_kib


def test_all_shared_memory_is_poisoned(kernels: Kernels) -> None:
    """The emulation poisons one linker section, which must hold all shared memory that the sources declare."""
    declared = [
        line for path in (CSRC / "cuda").iterdir() for line in path.read_text().splitlines() if "__shared__" in line
    ]
    assert sorted(line.strip() for line in declared) == [
        "__shared__ Moments of_thread[kThreads];",
        "__shared__ Stats of_thread[kThreads];",
        "__shared__ int32_t of_warp[kWarps * kCounts];",
    ]
    # One copy per file that calls merge_block.
    users = [path for path in (CSRC / "cuda").glob("*.cu") if re.search(r"\bmerge_block<", path.read_text())]
    assert kernels.shared_bytes() - len(users) * 256 * 48 == pytest.approx(256 * 32 + 8 * 282 * 4, abs=64)  # aligned
