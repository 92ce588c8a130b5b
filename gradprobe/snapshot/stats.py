"""Statistics of one tensor, computed from its raw row on the host. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradprobe.ops.rows import ABS_MAX, N_NONFINITE, N_ZERO, SUM, SUM_ABS, SUM_SQ, range_exponent
from gradprobe.snapshot.records import FloatArray

COLUMNS = ("norm", "rms", "abs_max", "abs_mean", "mean", "std", "zero_fraction", "nonfinite", "numel")


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Statistics of one tensor.

    Attributes:
        name: Name of the parameter or module.
        kind: "parameter" for the gradient of a parameter, "weight" and "update" for its value and update; at modules
            one of `ACTIVATION_KINDS` and `JUNCTION_KINDS`.
        norm: Euclidean norm.
        rms: Root mean square, which is comparable between layers of different size.
        abs_max: Largest magnitude.
        abs_mean: Mean magnitude.
        mean: Mean.
        std: Population standard deviation (divided by n), computed from the mean and the mean square; below about 3e-4
            of the mean it is rounding error.
        zero_fraction: Share of elements that are exactly zero.
        nonfinite: Number of elements that are NaN or infinite.
        numel: Number of elements.
    """

    name: str
    kind: str
    norm: float
    rms: float
    abs_max: float
    abs_mean: float
    mean: float
    std: float
    zero_fraction: float
    nonfinite: int
    numel: int


def finish_rows(
    rows: FloatArray,
    numels: npt.NDArray[np.int64],
    scale: float | FloatArray,
    columns: Sequence[str] = COLUMNS,
) -> dict[str, FloatArray]:
    """Computes statistics from raw rows.

    Args:
        rows: Raw rows of one step or several. [..., K, 6]
        numels: Number of elements of each tensor. [..., K]
        scale: Factor to apply to the tensors; it has to broadcast to [..., K].
        columns: The statistics to compute, of `COLUMNS`.

    Returns:
        Each of these statistics. Values of shape [..., K].
    """
    n = np.maximum(numels, 1).astype(np.float64)
    unit = np.ldexp(1.0, range_exponent(rows[..., ABS_MAX])) * scale  # [..., K]

    def scaled_variance() -> FloatArray:
        variance = np.maximum(rows[..., SUM_SQ] / n - (rows[..., SUM] / n) ** 2, 0.0)
        variance = np.where(numels > 1, variance, 0.0)  # for one element the difference above is only rounding error
        return np.where(np.isfinite(rows[..., SUM_SQ]), variance, np.nan)

    formulas: dict[str, Callable[[], FloatArray]] = {
        "norm": lambda: np.sqrt(rows[..., SUM_SQ]) * unit,
        "rms": lambda: np.sqrt(rows[..., SUM_SQ] / n) * unit,
        "abs_max": lambda: rows[..., ABS_MAX] * scale,
        "abs_mean": lambda: rows[..., SUM_ABS] / n * unit,
        "mean": lambda: rows[..., SUM] / n * unit,
        "std": lambda: np.sqrt(scaled_variance()) * unit,
        "zero_fraction": lambda: rows[..., N_ZERO] / n,
        "nonfinite": lambda: rows[..., N_NONFINITE].copy(),
        "numel": lambda: numels.astype(np.float64),
    }
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return {name: formulas[name]() for name in columns}


_SAFE_SQUARES = (1e-250, 1e250)  # between these, no square that matters has left the range of floats


def total_norms(norms: FloatArray, present: npt.NDArray[np.bool_]) -> FloatArray:
    """Computes the Euclidean norms of all tensors of a step together, without overflow.

    Args:
        norms: Norms of the tensors of one step or several. [..., K]
        present: Which tensors there were. [..., K]

    Returns:
        The norms, NaN where there was no tensor. [...]

    Example:
        >>> total_norms(np.array([[1e200, 0.0, 1.0], [3.0, np.inf, np.nan]]), np.array([True, True, False])).tolist()
        [1e+200, inf]
    """
    known = np.where(present, norms, 0.0)
    squares = np.asarray(np.einsum("...k,...k->...", known, known))
    is_rest = np.asarray(~((squares > _SAFE_SQUARES[0]) & (squares < _SAFE_SQUARES[1])))
    totals: FloatArray = np.asarray(np.sqrt(squares))
    if is_rest.any():
        rest = known[is_rest]
        largest = rest.max(axis=1, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        totals[is_rest] = unit * np.sqrt(((rest / unit[:, None]) ** 2).sum(axis=1))
    return np.where(present.any(axis=-1), totals, np.nan)


def site_stats(name: str, kind: str, columns: Mapping[str, FloatArray], k: int) -> SiteStats:
    """Picks one tensor's statistics.

    Args:
        name: Name of the parameter or module.
        kind: Kind, as in `SiteStats`.
        columns: Each statistic of `COLUMNS`. Values of shape [K].
        k: Position of the tensor.

    Returns:
        Its statistics.
    """
    values = {name: float(column[k]) for name, column in columns.items()}
    nonfinite, numel = int(values.pop("nonfinite")), int(values.pop("numel"))
    return SiteStats(name, kind, **values, nonfinite=nonfinite, numel=numel)
