"""Time that a sweep still takes, by the measured time of an epoch of each of its networks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradprobe.report.formatting import duration
from gradprobe.report.records import Cell, EpochRow, Net


class Paces:
    """The seconds of an epoch of each network, measured with any seed."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Net, list[float]] = defaultdict(list)

    def add(self, cell: Cell, epochs: Iterable[EpochRow]) -> None:
        """Adds epochs of a training run."""
        seconds = [row.seconds for row in epochs if row.epoch > 0 and math.isfinite(row.seconds)]
        self._seconds[cell.net] += seconds

    def known(self) -> dict[Net, float]:
        """Returns the median of each network of which an epoch has been measured."""
        return {net: statistics.median(found) for net, found in self._seconds.items() if found}


@dataclass(frozen=True)
class TimeLeft:
    """Seconds, and whether it may be longer since some networks have not been timed."""

    seconds: float
    is_least: bool = False

    def __str__(self) -> str:
        return f"{'more than' if self.is_least else 'about'} {duration(self.seconds)} left"


def time_left(runs: Iterable[tuple[Net, float]], paces: Mapping[Net, float], n_at_once: int) -> TimeLeft | None:
    """Estimates the time left for some training runs.

    Args:
        runs: The network and the number of epochs left of each.
        paces: The seconds of an epoch of each network, as far as they are known.
        n_at_once: Number of runs that are trained in parallel.

    Returns:
        The time, no less than that of the longest run; None if it is known of no run.

    Example:
        >>> paces = {("plain", 20): 2.0}
        >>> str(time_left([(("plain", 20), 4.0), (("plain", 20), 1.5), (("plain", 56), 3.0)], paces, 2))
        'more than 8.0 s left'
    """
    runs = list(runs)
    known = [epochs * paces[net] for net, epochs in runs if net in paces]
    if not known:
        return None
    return TimeLeft(max(*known, sum(known) / max(1, n_at_once), 0.0), len(known) < len(runs))
