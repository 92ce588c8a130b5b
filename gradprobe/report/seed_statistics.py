"""Statistics over seeds: spread, median, and a test for clearly higher errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 2.0
"""Smallest difference of mean errors that counts with several seeds, in units of `clearly_above`."""

SINGLE_SEED_MARGIN = 3.0
"""Smallest difference that counts if one side has a single seed, whose spread is unknown, in the same units."""

# One-sided 95 % quantile of Student's t by degrees of freedom; between two entries, the one of fewer degrees applies.
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 8: 1.860, 10: 1.812, 20: 1.725, 30: 1.697}


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; NaN if any value is not finite."""
        return statistics.fmean(self.values) if all(map(math.isfinite, self.values)) else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for a single value, NaN if any is not finite."""
        if len(self.values) < 2:
            return None
        return math.nan if math.isnan(self.mean) else statistics.stdev(self.values)


def median(values: Sequence[float]) -> float:
    """Computes a median that is NaN if any value is NaN; sorting would hide it.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def sampling_error_pct(one: Spread, other: Spread, n_images: int) -> float:
    """Computes the standard error of the difference of two test errors due to the choice of test images.

    It assumes independent test images for each network; sharing images that are hard for both makes it smaller.

    Args:
        one: Test errors of one network, in percent.
        other: Test errors of the other network, in percent.
        n_images: Number of test images.

    Returns:
        Percentage points; NaN if an error is not finite.

    Source:
        The difference of two proportions. Dietterich, "Approximate Statistical Tests for Comparing Supervised
        Classification Learning Algorithms", Neural Computation 10, 1998, warns against it as the only test, since it
        ignores the variation of training: `clearly_above` also tests the seeds, and requires several such errors.

    >>> round(sampling_error_pct(Spread((6.43,)), Spread((7.93,)), 10_000), 2)
    0.37
    """
    wrong = (one.mean + other.mean) / 200  # share
    return 100 * math.sqrt(2 * wrong * (1 - wrong) / n_images)


def clearly_above(higher: Sequence[float], lower: Sequence[float], unit_pct: float = 1.0) -> bool:
    """Returns whether errors are higher by more than the spread over seeds explains, and by enough to matter.

    With two or more seeds on both sides: Welch's one-sided t-test at 95 %, and at least `MARGIN` units between the
    means. With one seed on a side: at least `SINGLE_SEED_MARGIN` units. The margins are ours.

    Args:
        higher: Errors of the side tested to be higher, one per seed, in percent.
        lower: Errors of the other side.
        unit_pct: Percentage points per unit: 1 for training errors, `sampling_error_pct` for test errors.

    Returns:
        True if the difference is clear; False also if an error is missing or not finite.

    Source:
        Welch, "The generalization of 'Student's' problem when several different population variances are involved",
        Biometrika 34, 1947.

    >>> clearly_above([67.0], [0.3]), clearly_above([2.0], [0.3]), clearly_above([2.9, 3.1], [0.2, 0.4])
    (True, False, True)
    """
    if not higher or not lower or not all(map(math.isfinite, (*higher, *lower))):
        return False
    difference = statistics.fmean(higher) - statistics.fmean(lower)
    if difference <= 0:
        return False
    if len(higher) < 2 or len(lower) < 2:
        return difference >= SINGLE_SEED_MARGIN * unit_pct
    if difference < MARGIN * unit_pct:
        return False
    sides = [(statistics.variance(values) / len(values), len(values) - 1) for values in (higher, lower)]
    squared_error = sum(square for square, _ in sides)
    weight = sum(square * square / degrees for square, degrees in sides)
    # Equal seeds have no variance (or one whose square underflows): any difference is clear.
    degrees_of_freedom = squared_error * squared_error / weight if weight > 0 else math.inf
    # The small addend keeps a rounded 1.9999999 at 2 degrees.
    quantile = _T95[max(known for known in _T95 if known <= max(1.0, degrees_of_freedom + 1e-9))]
    return difference > quantile * math.sqrt(squared_error)
