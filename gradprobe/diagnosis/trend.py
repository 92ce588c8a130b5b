"""Fits a line to log-norms over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    y = np.asarray(log_norms, dtype=np.float64)  # [L]
    if len(y) < 2 or not np.isfinite(y).all():
        return Trend(math.nan, math.nan, math.nan, math.nan)
    towards_input = -np.arange(len(y), dtype=np.float64)
    x = towards_input - towards_input.mean()
    slope = float(x @ y / (x @ x))
    residuals = y - y.mean() - slope * x
    with np.errstate(over="ignore"):
        factor, first, last = np.exp([slope, y.mean() + slope * x[0], y.mean() + slope * x[-1]]).tolist()
    variance = float(residuals @ residuals) / (len(y) - 2) / float(x @ x) if len(y) > 2 else math.nan
    return Trend(factor, factor * math.sqrt(variance), first, last)
