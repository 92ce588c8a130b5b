"""Arithmetic on raw rows on the device: true values, norms, one row for several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradprobe.ops.rows import (
    ABS_MAX,
    LARGEST,
    N_ZERO,
    STATS,
    SUM_FOURTH,
    SUM_SQ,
    SUM_SQUARE,
    range_exponent,
)


def true_rows(rows: Tensor) -> Tensor:
    """Converts raw rows to rows of true values.

    Args:
        rows: [..., 6] float64, as `grad_stats_into` writes them.

    Returns:
        [..., 6] float64. Sums beyond the range of float64 become infinite or zero; `norms` stays exact.

    Example:
        >>> true_rows(torch.tensor([[2.0, 2.0, 2.0, 2.0**601, 0.0, 0.0]], dtype=torch.float64))[0, 0].item() == 2.0**601
        True
    """
    factor = torch.exp2(range_exponent(rows[..., ABS_MAX]).double())
    sums = rows[..., :SUM_SQ] * factor.unsqueeze(-1)
    # The squared factor itself may be out of range: multiply twice.
    sum_sq = rows[..., SUM_SQ : SUM_SQ + 1] * factor.unsqueeze(-1) * factor.unsqueeze(-1)
    return torch.cat((sums, sum_sq, rows[..., ABS_MAX:]), dim=-1)


def norms(rows: Tensor) -> Tensor:
    """Computes Euclidean norms from raw rows, exact even if the sum of squares leaves the range of float64.

    Args:
        rows: [..., 6] float64, as `grad_stats_into` writes them.

    Returns:
        [...] float64.

    Example:
        >>> from gradprobe.ops import reference
        >>> raw = torch.empty(1, 6, dtype=torch.float64)
        >>> reference.grad_stats_into([torch.tensor([3e300, 4e300], dtype=torch.float64)], raw)
        >>> f"{norms(raw).item():.6e}"
        '5.000000e+300'
    """
    return rows[..., SUM_SQ].sqrt() * torch.exp2(range_exponent(rows[..., ABS_MAX]).double())


def merge_rows(rows: Tensor) -> Tensor:
    """Merges the raw rows of each group of tensors into one raw row, in a fixed order of summation.

    Args:
        rows: [S, M, 6] float64, raw rows of S groups of M tensors. A row of zeros adds nothing.

    Returns:
        [S, 6] float64, raw rows.

    Example:
        >>> row = torch.tensor([[1.0, 7.0, 25.0, 4.0, 0.0, 0.0], [2.0, 2.0, 4.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
        >>> merge_rows(row.unsqueeze(0)).tolist()
        [[3.0, 9.0, 29.0, 4.0, 1.0, 0.0]]
    """
    abs_max = rows[..., ABS_MAX].amax(dim=1)  # [S]; a NaN stays
    # A row is only ever scaled down, to the exponent of its group's largest magnitude. If that is NaN or infinite, the
    # finite sums do not matter.
    shift = range_exponent(rows[..., ABS_MAX]) - range_exponent(abs_max).unsqueeze(1)  # [S, M]
    shift = torch.where(rows[..., ABS_MAX] == 0, 0, shift.clamp(max=0))
    factor = torch.exp2(shift.double())
    sums = (rows[..., :SUM_SQ] * factor.unsqueeze(-1)).sum(dim=1)
    sum_sq = (rows[..., SUM_SQ] * factor * factor).sum(dim=1)
    counts = rows[..., N_ZERO:].sum(dim=1)
    return torch.cat((sums, sum_sq.unsqueeze(1), abs_max.unsqueeze(1), counts), dim=1)


def magnitude_exponent(largest: Tensor) -> Tensor:
    """Returns the exponent e of the power of two over which a row of magnitudes sums, given its largest magnitude.

    Args:
        largest: Float64, any shape.

    Returns:
        Int64 of the same shape, from -1000 to 1000.

    Example:
        >>> magnitude_exponent(torch.tensor([0.0, 3.0, 1e308], dtype=torch.float64)).tolist()
        [-1000, 1, 1000]
    """
    return ((largest.view(torch.int64) >> 52) - 1023).clamp(-1000, 1000)


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns 2**exponent as float64, exactly, of int64 exponents from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def merge_magnitudes(one: Tensor, other: Tensor) -> Tensor:
    """Merges two rows of magnitudes into that of both tensors together.

    Args:
        one: [285] float64, as `magnitudes_into` writes it.
        other: Another, on the same device.

    Returns:
        [285] float64.
    """
    rows = torch.stack((one, other))
    # compared as integers, since torch may flush subnormal numbers
    largest = rows[:, LARGEST].contiguous().view(torch.int64).amax(0, keepdim=True).view(torch.float64)  # [1]
    shift = magnitude_exponent(rows[:, LARGEST].contiguous()) - magnitude_exponent(largest)  # [2], at most 0
    factor = power_of_two(shift.clamp(min=-500))  # below, nothing is left of a sum
    squares = (rows[:, SUM_SQUARE] * factor.square()).sum(0, keepdim=True)
    fourths = (rows[:, SUM_FOURTH] * factor.square().square()).sum(0, keepdim=True)
    return torch.cat((rows[:, :LARGEST].sum(0), largest, squares, fourths))


def clip_of(row: Tensor, max_norm: float) -> Tensor:
    """Computes the total norm and the factor that clips it, [2], from the raw row [1, 6] of all elements together."""
    total = norms(row)  # [1]
    return torch.cat((total, (max_norm / (total + 1e-6)).clamp(max=1.0)))


def empty_rows(n_tensors: int, like: Tensor) -> Tensor:
    """Allocates rows [n_tensors, 6], float64, not initialised, on the device of `like`."""
    return torch.empty(n_tensors, len(STATS), dtype=torch.float64, device=like.device)


def rows_by(kernel: Callable[[Sequence[Tensor], Tensor], None], tensors: Sequence[Tensor]) -> Tensor:
    """Computes the raw rows [K, 6] of K tensors, at least one, with a `grad_stats_into`."""
    rows = empty_rows(len(tensors), tensors[0])
    kernel(tensors, rows)
    return rows
