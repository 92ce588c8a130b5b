"""Quantiles and shares against the values themselves, and against torch's conversions to each format."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradprobe.errors import ArgumentError
from gradprobe.ops.rows import N_MAGNITUDES
from gradprobe.ops.schemas import MAGNITUDES_INTO
from gradprobe.snapshot import Bounds, GradientMagnitudes, Magnitudes

FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
LARGEST = {"float16": 65504.0, "bfloat16": float(torch.finfo(torch.bfloat16).max), "e4m3": 448.0, "e5m2": 57344.0}


def magnitudes_of(values: list[float] | torch.Tensor, scale: float = 1.0) -> Magnitudes:
    rows = torch.empty(1, N_MAGNITUDES, dtype=torch.float64)
    MAGNITUDES_INTO([torch.as_tensor(values, dtype=torch.float32)], rows)
    return GradientMagnitudes(("x",), rows.numpy(), np.ones(1, dtype=np.bool_), scale).magnitudes["x"]


def converted_shares(x: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Returns the shares of the finite values other than zero that become zero, and that stay finite no longer."""
    x = x[torch.isfinite(x) & (x != 0)]
    there = x.to(dtype).float()
    # torch 2.13 saturates here; what lies above the middle of 448 and 480 has no nearest number
    is_beyond = x.abs() > 464 if dtype == torch.float8_e4m3fn else ~torch.isfinite(there)
    return float((there == 0).double().mean()), float(is_beyond.double().mean())


# float32 numbers of any magnitude, and those on both sides of where the formats round to zero or to infinity
floats = st.floats(width=32) | st.sampled_from(
    [
        float(neighbour)
        for middle in (2.0**-25, 2.0**-134, 2.0**-10, 2.0**-17, 65504, 65520, 448, 464, 57344, 61440)
        for neighbour in (*np.nextafter(np.float32(middle), [0, np.inf]).tolist(), middle)
    ]
)


@given(values=st.lists(floats, min_size=1, max_size=40), power=st.integers(-30, 30), scales=st.booleans())
@pytest.mark.parametrize("name", FORMATS)
def test_shares_are_those_of_a_conversion(name: str, values: list[float], power: int, scales: bool) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    scale = 2.0**power if scales else 1.0
    scaled = x * scale
    assume(np.array_equal(scaled.double(), x.double() * scale, equal_nan=True))  # exact in float32
    found = magnitudes_of(x)
    assume(found.counts.sum() > 0)
    vanished, beyond = converted_shares(scaled, FORMATS[name])
    assert found.underflow_share(name, scale) == found.underflow_share(FORMATS[name], scale) == (vanished, vanished)
    overflow = found.overflow_share(name, scale)
    assert overflow.lower <= beyond <= overflow.upper
    if beyond == 0 and not (scaled[torch.isfinite(scaled)].abs() > LARGEST[name]).any():
        assert overflow == (0.0, 0.0)


@given(values=st.lists(floats, min_size=1, max_size=40))
@pytest.mark.parametrize("name", FORMATS)
def test_the_best_scale_is_the_largest_power_of_two_without_overflow(name: str, values: list[float]) -> None:
    found = magnitudes_of(values)
    scale = found.best_scale(name)
    assert math.frexp(scale)[0] == 0.5
    if found.abs_max == 0:
        assert scale == 1.0
        return
    assert found.abs_max * scale <= LARGEST[name] < found.abs_max * scale * 2
    assert found.overflow_share(name, "best") == (0.0, 0.0)
    assert found.underflow_share(name, "best") == found.underflow_share(name, scale)


@given(values=st.lists(floats, min_size=1, max_size=40), q=st.floats(0, 1))
def test_a_quantile_lies_within_its_bounds(values: list[float], q: float) -> None:
    x = np.sort(np.abs(np.array(values, dtype=np.float32).astype(np.float64)))
    x = x[np.isfinite(x)]
    bounds = magnitudes_of(values).quantile_bounds(q)
    if len(x) == 0:
        assert all(math.isnan(bound) for bound in bounds)
        return
    quantile = x[max(math.ceil(q * len(x)), 1) - 1]
    assert bounds.lower < quantile <= bounds.upper <= 2 * bounds.lower or (quantile == 0.0 and bounds == (0.0, 0.0))


def test_a_scaler_that_multiplied_by_no_power_of_two() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-5
    found = magnitudes_of((x * 1000.0).float(), scale=1 / 1000.0)
    assert found.abs_max == pytest.approx(x.abs().max().item(), rel=1e-6)
    assert found.edges[1:-1] == pytest.approx(np.exp2(np.arange(-150, 129)) / 1000.0, rel=1e-15)
    bounds = found.quantile_bounds(0.5)
    assert bounds.lower < x.abs().median().item() < bounds.upper < 2.01 * bounds.lower
    shares = found.underflow_share("e5m2")
    assert shares.lower < converted_shares(x.float(), torch.float8_e5m2)[0] < shares.upper


def test_what_the_numbers_of_a_known_tensor_are() -> None:
    found = magnitudes_of([0.0, 1.0, -2.0, 3.0, 500.0, math.inf, math.nan])
    assert (found.zeros, found.nonfinite, found.numel, found.abs_max) == (1, 2, 7, 500.0)
    assert found.quantile_bounds(0.2) == (0.0, 0.0)
    assert [found.quantile_bounds(q) for q in (0.4, 0.6, 0.8, 1.0)] == [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (256, 500)]
    assert found.overflow_share("e4m3") == (0.0, 0.25)  # 464 is in the bin
    assert found.overflow_share("e4m3", 2.0) == (0.25, 0.25)
    assert found.best_scale("e4m3") == 0.5
    assert math.isnan(found.kurtosis)
    assert magnitudes_of([0.0, 0.0, 0.0, -3.0]).kurtosis == 4.0
    assert repr(magnitudes_of([2.0])) == (
        "Magnitudes(name='x', zeros=0, nonfinite=0, numel=1, abs_max=2.0, kurtosis=1.0)"
    )


def test_of_nothing_nothing_is_known() -> None:
    for values in ([], [math.nan], [0.0]):
        shares = magnitudes_of(values)
        assert all(math.isnan(bound) for bound in (*shares.underflow_share("e4m3"), *shares.overflow_share("e4m3")))
    assert magnitudes_of([0.0]).quantile_bounds(0.5) == Bounds(0.0, 0.0)


def test_bad_arguments_are_named() -> None:
    found = magnitudes_of([1.0])
    with pytest.raises(ArgumentError, match=r"dtype: needed one of float16, bfloat16, e4m3, e5m2, got torch\.int8"):
        found.underflow_share(torch.int8)
    for scale in (0.0, -1.0, math.inf, math.nan, "worst"):
        with pytest.raises(ArgumentError, match="scale: needed 'best' or a finite number above 0, got"):
            found.overflow_share("e4m3", scale)  # type: ignore[arg-type]
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match="q: needed a number from 0 to 1, got"):
            found.quantile_bounds(q)
