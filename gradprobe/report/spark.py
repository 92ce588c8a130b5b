"""Curves and profiles in one line of text: a curve of any length in constant memory, bars for its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
"""Characters for values from low to high, and those for a terminal that has ASCII only."""

ODD, ZERO = "!", "0"
"""Characters for values that are not finite, and for zeros where the scale is logarithmic."""

_MOST_CELLS = 512
_LOG_FROM = 100.0  # ratio of the largest to the smallest value from which a scale is logarithmic


@dataclass(slots=True)
class _Cell:
    """Successive points of a curve."""

    last: int
    count: int = 0
    total: float = 0.0
    n_finite: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, step: int, value: float) -> None:
        self.last = step
        self.count += 1
        if math.isfinite(value):
            self.n_finite += 1
            self.total += value
            self.low, self.high = min(self.low, value), max(self.high, value)

    def join(self, other: _Cell) -> _Cell:
        low, high = min(self.low, other.low), max(self.high, other.high)
        total, n_finite = self.total + other.total, self.n_finite + other.n_finite
        return _Cell(other.last, self.count + other.count, total, n_finite, low, high)


class Curve:
    """A quantity over the steps of a run. Long ones are thinned: neighbouring points are joined to cells.

    Args:
        peaks: Show the largest value of a cell, so that a spike stays visible, instead of the mean.

    Example:
        >>> curve = Curve()
        >>> for step in range(100_000):
        ...     curve.add(step, 1 / (step + 1))
        >>> curve.last, curve.low, len(curve.shown(40)) <= 40
        (1e-05, 1e-05, True)
    """

    def __init__(self, peaks: bool = False) -> None:
        self._peaks = peaks
        self._cells: list[_Cell] = []
        self._size = 1  # points in a full cell
        self.last = math.nan

    def add(self, step: int, value: float) -> None:
        """Appends a point; one with the number of an earlier step, or a lower one, replaces those from there on.

        Points joined to one of these go too.

        Args:
            step: Number of the step.
            value: The value.
        """
        while self._cells and self._cells[-1].last >= step:
            self._cells.pop()
        if not self._cells:
            self._size = 1
        if not self._cells or self._cells[-1].count >= self._size:
            if len(self._cells) >= _MOST_CELLS:
                pairs = zip(self._cells[::2], self._cells[1::2], strict=True)
                self._cells = [former.join(latter) for former, latter in pairs]
                self._size *= 2
            self._cells.append(_Cell(step))
        self._cells[-1].add(step, value)
        self.last = value

    @property
    def is_empty(self) -> bool:
        """Whether it has no points."""
        return not self._cells

    @property
    def low(self) -> float:
        """The least finite value, infinite if there is none."""
        return min((cell.low for cell in self._cells), default=math.inf)

    @property
    def high(self) -> float:
        """The greatest finite value, minus infinity if there is none."""
        return max((cell.high for cell in self._cells), default=-math.inf)

    def shown(self, width: int) -> list[float]:
        """Returns at most so many values, in order of the steps; infinite where a value was not finite."""
        per_value = max(1, -(-len(self._cells) // max(1, width)))
        values = []
        for first in range(0, len(self._cells), per_value):
            cell, *others = self._cells[first : first + per_value]
            for other in others:
                cell = cell.join(other)
            if cell.n_finite < cell.count:
                values.append(math.inf)
            else:
                values.append(cell.high if self._peaks else cell.total / cell.n_finite)
        return values


def is_logarithmic(low: float, high: float) -> bool:
    """Returns whether a scale from the least to the greatest value is logarithmic: if all are above zero and far apart.

    >>> is_logarithmic(0.1, 5.0), is_logarithmic(1e-4, 5.0), is_logarithmic(0.0, 5.0)
    (False, True, False)
    """
    return low > 0 and high / low >= _LOG_FROM


def bars(values: Sequence[float], log: bool, ascii_only: bool = False, decades: float = 0.0) -> Text:
    """Draws one bar per value; one that is not finite is a red exclamation mark.

    The scale begins at the least value, a linear one of positive values at zero.

    Args:
        values: The values.
        log: Whether the scale is logarithmic; zeros are then the character 0.
        ascii_only: Use no block characters.
        decades: Least range of a logarithmic scale in powers of ten, so that noise does not fill it.

    Returns:
        Text of as many characters.

    Example:
        >>> bars([0.0, 1.0, 10.0, 1000.0, float("nan")], log=True).plain
        '0▁▃█!'
    """
    heights = [math.log10(value) if log else value for value in values if _has_height(value, log)]
    low, high = (min(heights), max(heights)) if heights else (0.0, 0.0)
    low = min(low, high - decades if log else 0.0)
    characters = PLAIN_BARS if ascii_only else BARS
    text = Text()
    for value in values:
        if not math.isfinite(value):
            text.append(ODD, "bold red")
        elif not _has_height(value, log):
            text.append(ZERO, "red")
        else:
            height = math.log10(value) if log else value
            share = (height - low) / (high - low) if high > low else 0.0
            text.append(characters[min(len(characters) - 1, int(share * len(characters)))])
    return text


def _has_height(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)
