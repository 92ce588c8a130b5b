"""The true statistics of a tensor, computed without gradprobe: numpy and exact sums in Python."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from csrc.emulation.float8 import NUMBERS
from numpy.typing import NDArray

from gradprobe import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
MEASURED = (*DTYPES, *FLOAT8)
NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class Target:
    """A back end on a device."""

    backend: str
    device: str


def _target(backend: str, device: str) -> object:
    name = f"{backend}-{device}"
    if device == "cuda":
        return pytest.param(Target(backend, device), id=name, marks=pytest.mark.gpu)
    reason = ops.backends()[backend]
    ready = reason.startswith("ready")
    return pytest.param(Target(backend, device), id=name, marks=[] if ready else pytest.mark.skip(reason=reason))


TARGETS = [
    _target(*pair)
    for pair in (("native", "cpu"), ("reference", "cpu"), ("native", "cuda"), ("triton", "cuda"), ("reference", "cuda"))
]


@dataclass(frozen=True)
class Truth:
    """The six statistics, with the norm instead of the sum of squares, which may leave the range of float64."""

    sum: float
    sum_abs: float
    norm: float
    abs_max: float
    n_zero: int
    n_nonfinite: int


def as_float64(tensor: torch.Tensor) -> NDArray[np.float64]:
    """Returns the elements, flat; converts the types that numpy lacks through their bits."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.dtype in FLOAT8:
        return NUMBERS[FLOAT8[flat.dtype]][flat.view(torch.uint8).numpy()]
    if flat.dtype == torch.bfloat16:
        return (flat.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32).astype(np.float64)
    return flat.numpy().astype(np.float64)


def _scaled_up(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def truth(tensor: torch.Tensor) -> Truth:
    """Computes exact sums of the elements, divided by a power of two near their maximum so that no square overflows."""
    x = as_float64(tensor)
    n_zero, n_nonfinite = int((x == 0).sum()), int((~np.isfinite(x)).sum())
    if x.size == 0 or not np.any(x):
        return Truth(0.0, 0.0, 0.0, 0.0, n_zero, 0)
    if n_nonfinite:
        special = x[~np.isfinite(x)]
        with np.errstate(invalid="ignore"):
            total, largest = float(special.sum()), float(np.abs(special).max())
        return Truth(total, largest, largest, largest, n_zero, n_nonfinite)
    largest = float(np.abs(x).max())
    exponent = math.frexp(largest)[1]
    y = np.ldexp(x, -exponent) if exponent > -1000 else np.ldexp(np.ldexp(x, 900), -exponent - 900)
    return Truth(
        _scaled_up(math.fsum(y), exponent),
        _scaled_up(math.fsum(np.abs(y)), exponent),
        _scaled_up(math.sqrt(math.fsum(y * y)), exponent),
        largest,
        n_zero,
        0,
    )


def scaled_by_torch(tensor: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """Returns the product by torch, rounded once to the tensor's dtype.

    `mul_` itself will not do for half precision: on a GPU it rounds the coefficient to the tensor's dtype first.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return (tensor.detach().float() * coefficient.float()).to(tensor.dtype)
    return tensor.detach().clone().mul_(coefficient)


def same(actual: float, expected: float, tolerance: float) -> bool:
    """Returns whether two numbers agree within an absolute tolerance; NaN equals NaN, infinity the same infinity."""
    if math.isnan(expected) or math.isinf(expected):
        return math.isnan(actual) if math.isnan(expected) else actual == expected
    return abs(actual - expected) <= tolerance


def measure(tensors: list[torch.Tensor], target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows [K, 6] and norms [K] from a back end, on the CPU. `out` starts as NaN, to detect a missing row."""
    backend = ops.resolve(target.backend, torch.device(target.device))
    out = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=target.device)
    ops.grad_stats_into(tensors, out, backend)
    return ops.true_rows(out).cpu(), ops.norms(out).cpu()


def assert_right(tensors: list[torch.Tensor], target: Target, expected: list[Truth] | None = None) -> None:
    """Checks every statistic: relative error below 1e-6 (of sum_abs for the sum), maximum and counts exact."""
    rows, norms = measure(tensors, target)
    for k, tensor in enumerate(tensors):
        want = truth(tensor) if expected is None else expected[k]
        total, sum_abs, sum_sq, abs_max, n_zero, n_nonfinite = rows[k].tolist()
        what = f"tensors[{k}] {tensor.dtype} {list(tensor.shape)}: {rows[k].tolist()}, norm {norms[k]}, expected {want}"
        smallest = 5e-324
        assert same(norms[k].item(), want.norm, 1e-6 * want.norm + smallest), what
        assert same(sum_abs, want.sum_abs, 1e-6 * want.sum_abs + smallest), what
        assert same(total, want.sum, 1e-6 * want.sum_abs + smallest), what
        assert same(abs_max, want.abs_max, 0.0), what
        assert (n_zero, n_nonfinite) == (want.n_zero, want.n_nonfinite), what
        if 1e-150 < want.norm < 1e150 or math.isnan(want.norm) or want.norm == 0.0:
            assert same(sum_sq, want.norm**2, 2.1e-6 * want.norm**2), what


def of_bits(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns the numbers of a dtype whose bits are the lowest of 64 bits."""
    words = np.array(values, dtype=np.int64).astype({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize])
    return torch.from_numpy(words).view(dtype)
