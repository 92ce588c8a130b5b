"""The tensors that two runs recorded under the same names, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gradprobe.snapshot.records import JUNCTION_KINDS, FloatArray, IntArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats

Site: TypeAlias = "tuple[str, str]"  # kind, as in `SiteStats`, and name
BoolArray: TypeAlias = "npt.NDArray[np.bool_]"

_MOST_STEPS = 256  # that are stacked at a time
_POWERS = np.array([1, 1, 2, 1, 0, 0])  # of the scale in each statistic of a raw row


@dataclass(frozen=True, eq=False)
class Recorded:
    """The tensors of one run in T steps that have the same S sites.

    Attributes:
        sites: The sites. Length S.
        rows: Raw statistics in the order of `gradprobe.STATS`. [T, S, 6]
        scales: Factors that undo loss scaling. [T, S]
        present: Which tensors there were. [T, S]
        numels: Their sizes. [T, S]
    """

    sites: tuple[Site, ...]
    rows: FloatArray
    scales: FloatArray
    present: BoolArray
    numels: IntArray

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> Recorded:
        """Stacks steps that have the same layout."""
        sites = _sites(snapshots[0])
        parts = [list(_parts(one)) for one in snapshots]
        rows, scales, present, numels = (
            np.stack([np.concatenate([part[k] for part in step]) for step in parts]) for k in range(4)
        )
        return cls(sites, rows, scales, present, numels)

    @cached_property
    def norms(self) -> FloatArray:
        """Norms, NaN where there was no tensor, shape [T, S]."""
        return np.where(self.present, finish_rows(self.rows, self.numels, self.scales, ("norm",))["norm"], np.nan)

    def at(self, places: Sequence[int]) -> Recorded:
        """Returns some sites."""
        take = np.asarray(places, dtype=np.int64)
        sites = tuple(self.sites[k] for k in places)
        return Recorded(sites, self.rows[:, take], self.scales[:, take], self.present[:, take], self.numels[:, take])

    def stats(self, step: int, place: int) -> SiteStats | None:
        """Returns the statistics of a tensor, None if there was none."""
        if not self.present[step, place]:
            return None
        chosen = (slice(step, step + 1), place)
        columns = finish_rows(self.rows[chosen], self.numels[chosen], self.scales[chosen])
        kind, name = self.sites[place]
        return site_stats(name, kind, columns, 0)


@dataclass(frozen=True, eq=False)
class Pair:
    """What two runs recorded in the same T steps at the same S sites.

    Attributes:
        steps: Numbers of the steps. Length T.
        a: One run.
        b: The other run.
    """

    steps: tuple[int, ...]
    a: Recorded
    b: Recorded

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites. Length S."""
        return self.a.sites

    @cached_property
    def equal(self) -> BoolArray:
        """Whether all raw statistics are the same; NaN equals NaN. Shape [T, S]."""
        a, b = (_unscaled(one) for one in (self.a, self.b))
        same = ((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=-1) & (self.a.numels == self.b.numels)
        return np.asarray((same & self.a.present & self.b.present) | ~(self.a.present | self.b.present))

    @cached_property
    def sizes(self) -> FloatArray:
        """Relative differences of the norms, shape [T, S]."""
        sizes = relative(self.a.norms, self.b.norms)
        return np.where(self.a.present | self.b.present, sizes, np.nan)


def pairs(a: Sequence[Snapshot], b: Sequence[Snapshot]) -> Iterator[Pair]:
    """Puts the steps of two runs side by side.

    Args:
        a: Steps of one run.
        b: The same steps of the other run.

    Yields:
        Consecutive steps with the same sites.
    """
    both = list(zip(a, b, strict=True))
    for _, group in groupby(both, key=lambda pair: (_layout(pair[0]), _layout(pair[1]))):
        same = list(group)
        for start in range(0, len(same), _MOST_STEPS):
            chosen = same[start : start + _MOST_STEPS]
            one, other = (Recorded.of([pair[side] for pair in chosen]) for side in (0, 1))
            place = {site: k for k, site in enumerate(other.sites)}
            shared = [k for k, site in enumerate(one.sites) if site in place]
            there = [place[one.sites[k]] for k in shared]
            yield Pair(tuple(pair[0].step for pair in chosen), one.at(shared), other.at(there))


def relative(a: FloatArray, b: FloatArray, least: float = 0.0) -> FloatArray:
    """Returns the difference divided by the larger magnitude.

    Args:
        a: Numbers; NaN counts as not finite.
        b: As many numbers.
        least: Smallest divisor.

    Returns:
        The relative differences: 0 where the numbers are equal, infinite where they differ and one is not finite.

    Example:
        >>> nan = float("nan")
        >>> relative(np.array([4.0, 0.0, nan, nan]), np.array([5.0, 0.0, nan, 1.0])).tolist()
        [0.2, 0.0, 0.0, inf]
    """
    is_same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        larger = np.maximum(np.maximum(np.abs(a), np.abs(b)), least)
        found = np.abs(a - b) / larger
    return np.where(is_same, 0.0, np.where(np.isfinite(found), found, np.inf))


def _unscaled(one: Recorded) -> FloatArray:
    return one.rows if (one.scales == 1.0).all() else one.rows * one.scales[..., None] ** _POWERS


def _layout(one: Snapshot) -> tuple[int, int | None, int | None]:
    """Identifies the sites of a step by the objects that it shares with other steps."""
    updates, signals = one.parameter_updates, one.signals
    return id(one.table), None if updates is None else id(updates.names), None if signals is None else id(signals.table)


def _sites(one: Snapshot) -> tuple[Site, ...]:
    sites = [("parameter", name) for name in one.table.names]
    if one.parameter_updates is not None:
        sites += [(kind, name) for kind in ("weight", "update") for name in one.parameter_updates.names]
    if one.signals is not None:
        table = one.signals.table
        sites += [
            pair for pair in zip(table.kinds, table.names, strict=True) if pair[0] != JUNCTION_KINDS[-1]
        ]  # the last is no tensor
    return tuple(sites)


def _parts(one: Snapshot) -> Iterator[tuple[FloatArray, FloatArray, BoolArray, IntArray]]:
    """Yields rows, scales, presence and sizes of the gradients, weights, updates and signals, in the order of sites."""
    measured = one.measured
    yield one.rows, np.full(len(one.rows), one.scale), measured.present, measured.numels
    updates = one.parameter_updates
    if updates is not None:
        for rows in (updates.weight_rows, updates.update_rows):
            yield rows, np.ones(len(rows)), updates.measured.present, updates.measured.numels
    if one.signals is not None:
        table, measured = one.signals.table, one.signals.events.measured
        keep = np.array([kind != JUNCTION_KINDS[-1] for kind in table.kinds], dtype=np.bool_)
        scales = np.where(table.is_gradient, one.signals.scale, 1.0)
        yield one.signals.rows[keep], scales[keep], measured.present[keep], measured.numels[keep]
