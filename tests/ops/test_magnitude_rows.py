"""Counts by magnitude against float64 and exact sums: every dtype, layouts, sizes, NaN and infinity, threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.ops_truth import DTYPES, FLOAT8, MEASURED, as_float64, of_bits
from hypothesis import given
from hypothesis import strategies as st

from gradprobe.errors import ArgumentError
from gradprobe.ops import reference
from gradprobe.ops.row_math import merge_magnitudes
from gradprobe.ops.rows import LARGEST, N_MAGNITUDES, NOT_FINITE, SUM_SQUARE, ZEROS
from gradprobe.ops.schemas import MAGNITUDES_INTO
from gradprobe.snapshot import FloatArray

KERNELS = {"dispatched": MAGNITUDES_INTO, "reference": reference.magnitudes_into}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LIMITS = [0.0, *(2.0**power for power in range(-150, 129)), math.inf]

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
with_each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def values(tensor: torch.Tensor) -> FloatArray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return as_float64(tensor.detach().resolve_neg())


def truth(tensor: torch.Tensor) -> list[float]:
    """Returns the row of magnitudes without the sums, counted in float64."""
    x = np.abs(values(tensor))
    finite = x[np.isfinite(x)]
    bins = np.searchsorted(LIMITS, finite[finite > 0], side="left") - 1
    counts = np.bincount(bins, minlength=len(LIMITS) - 1)
    return [(x == 0).sum(), *counts, len(x) - len(finite), finite.max(initial=0.0)]


def true_sums(tensor: torch.Tensor) -> list[float] | None:
    """Returns the exact sums of a row, None if they are not finite."""
    x = values(tensor)
    if not np.isfinite(x).all():
        return None
    exponent = max(-1000, min(1000, math.frexp(float(np.abs(x).max(initial=0.0)))[1] - 1)) if x.any() else 0
    y = np.ldexp(x, -exponent)
    return [math.fsum(y**2), math.fsum(y**4)]


def rows_of(tensors: list[torch.Tensor], kernel: str, device: str = "cpu") -> torch.Tensor:
    """Returns the rows on the host. `out` starts as NaN, to detect a missing number."""
    out = torch.full((len(tensors), N_MAGNITUDES), torch.nan, dtype=torch.float64, device=device)
    KERNELS[kernel]([tensor.to(device) for tensor in tensors], out)
    return out.cpu()


def assert_right(tensors: list[torch.Tensor], kernel: str, device: str = "cpu") -> None:
    for tensor, row in zip(tensors, rows_of(tensors, kernel, device), strict=True):
        assert_row_is(row, truth(tensor), true_sums(tensor))


def assert_row_is(row: torch.Tensor, counts: list[float], sums: list[float] | None) -> None:
    assert row[:SUM_SQUARE].tolist() == counts
    if sums is None:
        assert not row[SUM_SQUARE:].isfinite().any()
    else:
        assert row[SUM_SQUARE:].tolist() == pytest.approx(sums, rel=1e-12)


@on_each_device
@with_each_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8], ids=name)
def test_every_number_of_a_narrow_dtype(kernel: str, device: str, dtype: torch.dtype) -> None:
    numbers = of_bits([*range(256**dtype.itemsize)], dtype)
    assert_right([numbers, numbers[torch.isfinite(numbers.float())]], kernel, device)


@on_each_device
@with_each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_every_power_of_two_and_its_neighbours(kernel: str, device: str, dtype: torch.dtype) -> None:
    lowest, highest = (-149, 127) if dtype == torch.float32 else (-1074, 1023)
    powers = torch.from_numpy(np.ldexp(1.0, np.arange(lowest, highest + 1))).to(dtype)
    bits = powers.view(BITS[dtype.itemsize])
    numbers = torch.cat((bits - 1, bits, bits + 1)).view(dtype)
    ends = torch.tensor([torch.finfo(dtype).max, torch.inf, -torch.inf, torch.nan, 0.0], dtype=dtype)
    assert_right([numbers, -powers, ends], kernel, device)


@with_each_kernel
@given(
    dtype=st.sampled_from(MEASURED),
    bits=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60),
    stride=st.integers(1, 3),
)
def test_any_bits(kernel: str, dtype: torch.dtype, bits: list[int], stride: int) -> None:
    assert_right([of_bits(bits, dtype)[::stride]], kernel)


@on_each_device
@with_each_kernel
@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_sizes_around_every_boundary(kernel: str, device: str, dtype: torch.dtype) -> None:
    sizes = [0, *range(1, 20), 4095, 4096, 4097, 65535, 65536, 65537, 200_003]
    numbers = torch.from_numpy(np.random.default_rng(0).normal(0.0, 1e-3, max(sizes) + 3)).to(dtype)
    numbers[::7] = 0.0
    assert_right([numbers[n % 3 : n % 3 + n] for n in sizes], kernel, device)


@on_each_device
@with_each_kernel
def test_layouts(kernel: str, device: str) -> None:
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    layouts = [x[0, 0, 0, 0], x.transpose(1, 3), x[:, ::2, :, 1:], x[:1].expand(9, 6, 5, 7)]
    layouts += [x.to(memory_format=torch.channels_last), x[:, :0], torch._neg_view(x), x.clone().requires_grad_()]
    assert_right([tensor.detach() for tensor in layouts[:-1]], kernel, device)
    assert torch.equal(rows_of(layouts[-1:], kernel, device), rows_of([x], kernel, device))


@with_each_kernel
@pytest.mark.parametrize("magnitude", [1e-310, 1e-200, 1e-80, 1.0, 1e80, 1e200, 1e307])
def test_fourth_powers_that_no_float64_holds(kernel: str, magnitude: float) -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=150_000) * magnitude)
    y, z = x.clone(), x.clone()
    y[:140_000] *= 1e-30  # most chunks are far below the last
    z[:140_000] = 0.0
    assert_right([x, y, z], kernel)
    square, fourth = rows_of([x], kernel)[0, SUM_SQUARE:].tolist()
    assert len(x) * fourth / square**2 == pytest.approx(3.0, abs=0.1)


@with_each_kernel
def test_a_row_of_nothing_and_of_zeros(kernel: str) -> None:
    rows = rows_of([torch.zeros(0), torch.zeros(5), torch.full((3,), torch.nan)], kernel)
    assert [rows[0].sum().item(), rows[1].sum().item(), rows[2, NOT_FINITE].item()] == [0.0, 5.0, 3.0]
    assert rows[:, LARGEST].tolist() == [0.0, 0.0, 0.0]
    assert rows[1, ZEROS] == 5
    assert rows[2, SUM_SQUARE:].isnan().all()
    assert rows_of([], kernel).shape == (0, N_MAGNITUDES)


@with_each_kernel
@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_subnormal_numbers_count_while_torch_flushes_them(
    kernel: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    numbers = of_bits([*range(1, 64), 0, -1 << 8 * dtype.itemsize - 1], dtype)
    expected = truth(numbers), true_sums(numbers)
    request.getfixturevalue("flush_denormal")
    out = torch.empty(1, N_MAGNITUDES, dtype=torch.float64)
    KERNELS[kernel]([numbers], out)
    torch.set_flush_denormal(False)
    assert_row_is(out[0], *expected)


@given(
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    bits=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60),
    middle=st.integers(0, 60),
    flushes=st.booleans(),
)
def test_merged_rows_are_those_of_both_tensors(
    dtypes: tuple[torch.dtype, torch.dtype], bits: list[int], middle: int, flushes: bool
) -> None:
    parts = [of_bits(bits[:middle], dtypes[0]), of_bits(bits[middle:], dtypes[1])]
    both = torch.cat([torch.from_numpy(values(part)) for part in parts])
    expected = truth(both), true_sums(both)
    rows = rows_of(parts, "dispatched")
    torch.set_flush_denormal(flushes)
    try:
        merged = merge_magnitudes(*rows)
    finally:
        torch.set_flush_denormal(False)
    assert_row_is(merged, *expected)


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x = torch.randn(900_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, seen = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            seen.append(rows_of([x, x[:70_000], x[::3]], "dispatched"))
    finally:
        torch.set_num_threads(before)
    if torch._C._dispatch_has_kernel_for_dispatch_key("gradprobe::magnitudes_into", "CPU"):
        assert all(torch.equal(rows, seen[0]) for rows in seen)
    assert all(torch.equal(rows[:, :SUM_SQUARE], seen[0][:, :SUM_SQUARE]) for rows in seen)


@with_each_kernel
def test_what_does_not_fit_is_named(kernel: str) -> None:
    count, out = KERNELS[kernel], torch.empty(1, N_MAGNITUDES, dtype=torch.float64)
    errors = (ArgumentError, RuntimeError)
    with pytest.raises(errors, match=r"tensors\[0\]: needed a dtype of float16, .*, float8_e5m2, got .*"):
        count([torch.ones(2, dtype=torch.int32)], out)
    with pytest.raises(errors, match=rf"out: needed .*\[2, {N_MAGNITUDES}\], got .*\[1, {N_MAGNITUDES}\]"):
        count([torch.ones(2), torch.ones(2)], out)
    with pytest.raises(errors, match=r"out: needed .*float64.*"):
        count([torch.ones(2)], out.float())


@with_each_kernel
def test_rows_are_written_to_a_view_and_the_write_is_counted(kernel: str) -> None:
    whole = torch.full((3, 1, N_MAGNITUDES), -7.0, dtype=torch.float64)
    version = whole._version
    KERNELS[kernel]([torch.ones(4)], whole[1])
    assert (whole[[0, 2]] == -7.0).all()
    assert whole[1].sum() == 4 + 1 + 4 + 4
    assert whole._version > version
