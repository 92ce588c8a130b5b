"""The bootstrap intervals of the benchmarks: rounds are resampled, since a disturbance affects a round as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000


def interval(rounds: NDArray[Any], statistic: Callable[[NDArray[Any]], Any] = np.median) -> tuple[float, float]:
    """Returns the bootstrapped 90 % interval of a statistic over the rounds.

    Args:
        rounds: One entry per round, [n_rounds, ...].
        statistic: Returns a number for such an array; the median by default.

    Returns:
        The 5th and 95th percentile of the statistic over resampled rounds.
    """
    choices = np.random.default_rng(1).integers(0, len(rounds), (N_RESAMPLES, len(rounds)))
    low, high = np.percentile([statistic(rounds[choice]) for choice in choices], [5, 95])
    return float(low), float(high)
