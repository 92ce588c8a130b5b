"""Values over seeds: their spread, their median, and when one net's are clearly above another's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN_PCT = 2.0
"""With several seeds, a smaller difference of mean training errors (percentage points) never counts, however even."""

SINGLE_SEED_MARGIN_PCT = 3.0
"""With one seed on a side the spread is unknown: only a difference of training errors this large (points) counts."""

# One-sided 95 % quantile of Student's t by degrees of freedom; between two entries the lower degree's value is used.
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 8: 1.860, 10: 1.812, 20: 1.725, 30: 1.697}


@dataclass(frozen=True)
class Spread:
    """Values over seeds, with their mean and sample standard deviation (None for a single seed)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; NaN when any value is not finite."""
        return statistics.fmean(self.values) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one value, NaN when any is not finite."""
        if len(self.values) < 2:
            return None
        return math.nan if math.isnan(self.mean) else statistics.stdev(self.values)


def median(values: Sequence[float]) -> float:
    """Median that is NaN when any value is NaN, where sorting would hide it.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def clearly_above(deeper: Sequence[float], shallower: Sequence[float]) -> bool:
    """Says whether the deeper net's training error is higher by more than seeds explain.

    With two or more seeds on both sides: Welch's one-sided t-test at 95 %, and at least `MARGIN_PCT` points between the
    means. With one seed on a side: at least `SINGLE_SEED_MARGIN_PCT` points.

    Args:
        deeper: Training errors of the deeper net, one per seed, in percent.
        shallower: The same of the shallower net.

    Returns:
        True when the difference is clear; False also where an error is missing or not finite.

    Source:
        Welch, "The generalization of 'Student's' problem when several different population variances are involved",
        Biometrika 34, 1947.

    >>> clearly_above([67.0], [0.3]), clearly_above([2.0], [0.3]), clearly_above([2.9, 3.1], [0.2, 0.4])
    (True, False, True)
    """
    if not deeper or not shallower or not all(map(math.isfinite, (*deeper, *shallower))):
        return False
    difference = statistics.fmean(deeper) - statistics.fmean(shallower)
    if len(deeper) < 2 or len(shallower) < 2:
        return difference >= SINGLE_SEED_MARGIN_PCT
    if difference < MARGIN_PCT:
        return False
    sides = [(statistics.variance(values) / len(values), len(values) - 1) for values in (deeper, shallower)]
    squared_error = sum(square for square, _ in sides)
    weight = sum(square * square / degrees for square, degrees in sides)
    # Equal seeds have no variance (or one whose square underflows): then any difference is clear.
    degrees_of_freedom = squared_error * squared_error / weight if weight > 0 else math.inf
    # The small addend keeps a rounded 1.9999999 in its place.
    quantile = _T95[max(known for known in _T95 if known <= max(1.0, degrees_of_freedom + 1e-9))]
    return difference > quantile * math.sqrt(squared_error)
