"""A straight line through log-norms over depth. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Trend:
    """A least-squares line through log-norms over depth, told as a factor.

    Attributes:
        factor: by which the norm grows from one layer to the next on the way to the input; NaN where there are fewer
            than two layers, or a norm that is zero or not finite.
        std_error: of the factor; NaN below three layers.
        first: Norm that the line has at the layer next to the input.
        last: Norm that the line has at the layer next to the loss.
    """

    factor: float
    std_error: float
    first: float
    last: float


def fit_trend(log_norms: Sequence[float]) -> Trend:
    """Fits a line to natural logarithms of norms, from the layer next to the input to the one next to the loss.

    Args:
        log_norms: One for each layer.

    Returns:
        The factor per layer towards the input.

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
    left = y - y.mean() - slope * x
    with np.errstate(over="ignore"):
        factor, first, last = np.exp([slope, y.mean() + slope * x[0], y.mean() + slope * x[-1]]).tolist()
    std_error = factor * math.sqrt(float(left @ left) / (len(y) - 2) / float(x @ x)) if len(y) > 2 else math.nan
    return Trend(factor, std_error, first, last)
