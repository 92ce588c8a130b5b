"""Fits a line to log-norms over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradprobe.snapshot.records import FloatArray


@dataclass(frozen=True, slots=True)
class Trend:
    """A least-squares line through log-norms over depth, expressed as a factor per layer.

    Attributes:
        factor: Factor by which the norm grows from one layer to the next towards the input; NaN if there are fewer than
            two layers or a norm is zero or not finite.
        std_error: Standard error of the factor; NaN below three layers.
        first: Norm on the line at the layer next to the input.
        last: Norm on the line at the layer next to the loss.
    """

    factor: float
    std_error: float
    first: float
    last: float


class Trends(NamedTuple):
    """The lines of T sets of log-norms; each attribute is that of `Trend`, of shape [T]."""

    factor: FloatArray
    std_error: FloatArray
    first: FloatArray
    last: FloatArray


def fit_trend(log_norms: Sequence[float]) -> Trend:
    """Fits a line to natural logarithms of norms.

    Args:
        log_norms: One per layer, from the layer next to the input to the one next to the loss. Length L.

    Returns:
        The line.

    Example:
        >>> round(fit_trend([math.log(0.5) * k for k in (3, 2, 1)]).factor, 6)
        0.5
    """
    return Trend(*(float(values[0]) for values in fit_trends(np.array([log_norms], dtype=np.float64))))


def fit_trends(log_norms: FloatArray) -> Trends:
    """Fits lines to T sets of natural logarithms of norms, as `fit_trend` does to one.

    Args:
        log_norms: From the layer next to the input to the one next to the loss. [T, L]

    Returns:
        The lines.
    """
    n_sets, n_layers = log_norms.shape
    is_usable = np.isfinite(log_norms).all(axis=1) & (n_layers >= 2)  # [T]
    y = np.where(is_usable[:, None], log_norms, 0.0)  # [T, L]
    x = _positions(n_layers)  # [L]
    n_squares = max(float(x @ x), 1.0)  # 1 below two layers, whose lines are not used
    slopes = y @ x / n_squares  # [T]
    means = y.mean(axis=1) if n_layers else np.zeros(n_sets)
    residuals = y - means[:, None] - slopes[:, None] * x  # [T, L]
    ends = (x[0], x[-1]) if n_layers else (0.0, 0.0)
    with np.errstate(over="ignore"):
        factors, firsts, lasts = (np.exp(each) for each in (slopes, *(means + slopes * end for end in ends)))
    variances = np.full(n_sets, math.nan)
    if n_layers > 2:
        variances = (residuals**2).sum(axis=1) / (n_layers - 2) / n_squares
    found = (factors, factors * np.sqrt(variances), firsts, lasts)
    return Trends(*(np.where(is_usable, each, math.nan) for each in found))


def rises(log_norms: FloatArray) -> FloatArray:
    """Returns by how much each line of `fit_trends` rises from its first layer to its last, NaN if it has no line.

    Args:
        log_norms: As for `fit_trends`. [T, L]
    """
    x = _positions(log_norms.shape[1])  # [L]
    return np.asarray(log_norms @ x / max(float(x @ x), 1.0) * (x[-1] - x[0]))


def _positions(n_layers: int) -> FloatArray:
    """Returns the layers' positions, counted towards the input from their mean. Shape [L]."""
    towards_input = -np.arange(n_layers, dtype=np.float64)
    return towards_input - (towards_input.mean() if n_layers else 0.0)
