"""The gradient of one network over its depth, and its two parts at the residual adds, over all seeds of a sweep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradprobe.diagnosis.depth import flow_verdict
from gradprobe.report.records import Cell, JunctionRow, LayerRow, SweepRun
from gradprobe.report.seed_statistics import median

# From the mildest to the worst; the worst breaks a tie between seeds.
_SEVERITY = ("healthy", "vanishing", "exploding", "non-finite")


@dataclass(frozen=True)
class GradientProfile:
    """The gradient over depth at one epoch.

    Attributes:
        epoch: The epoch; 0 is the first step.
        layers_by_seed: For each seed, the weight layers in depth order.
        verdict_counts: Number of seeds by verdict on the gradient.
    """

    epoch: int
    layers_by_seed: tuple[tuple[LayerRow, ...], ...]
    verdict_counts: Mapping[str, int]

    @property
    def verdict(self) -> str:
        """The most frequent verdict over seeds; the worst breaks a tie."""
        return max(self.verdict_counts, key=lambda word: (self.verdict_counts[word], _SEVERITY.index(word)))

    @property
    def first(self) -> float:
        """Median over seeds of the L2 norm at the first weight layer."""
        return median([rows[0].norm_l2 for rows in self.layers_by_seed])

    @property
    def last(self) -> float:
        """Median over seeds of the L2 norm at the last weight layer."""
        return median([rows[-1].norm_l2 for rows in self.layers_by_seed])

    @property
    def ratio(self) -> float:
        """First norm over last; infinite if only the last is zero, NaN if both are."""
        if self.last == 0:
            return math.inf if self.first > 0 else math.nan
        return self.first / self.last

    @property
    def only_last(self) -> bool:
        """Whether every seed has a gradient in the last weight layer and exactly none before it."""
        return all(
            len(rows) > 1 and rows[-1].norm_l2 > 0 and not any(row.norm_l2 for row in rows[:-1])
            for rows in self.layers_by_seed
        )

    @property
    def when(self) -> str:
        """The epoch in words."""
        return "the first step" if self.epoch == 0 else f"epoch {self.epoch}"


@dataclass(frozen=True)
class ShortcutProfile:
    """The two parts of the gradient at every residual add, in the first step after an epoch.

    Attributes:
        epoch: Number of epochs completed before the step.
        junctions_by_seed: For each seed, the residual adds in depth order.
    """

    epoch: int
    junctions_by_seed: tuple[tuple[JunctionRow, ...], ...]

    @property
    def shares(self) -> dict[str, float]:
        """The median over seeds of the shortcut's share at each residual add, by name.

        NaN behind a shortcut that changes the shape, and if a part is not finite.
        """
        by_depth = zip(*self.junctions_by_seed, strict=True)
        return {rows[0].site: median([row.shortcut_share for row in rows]) for rows in by_depth}

    @property
    def when(self) -> str:
        """The epoch in words."""
        return "at the first step" if self.epoch == 0 else f"after epoch {self.epoch}"


def gradient_profile(run: SweepRun, cells: Sequence[Cell], epoch: int) -> GradientProfile | None:
    """Reads the gradient over depth of one network.

    Args:
        run: The recorded sweep.
        cells: The network's cells, one per seed.
        epoch: The epoch; 0 is the first step.

    Returns:
        The profile, without the seeds that did not record it; None if none did.
    """
    recorded = (run.layers(cell.id, epoch) for cell in cells)
    profiles = tuple(tuple(sorted(rows, key=lambda row: row.position)) for rows in recorded if rows)
    if not profiles:
        return None
    return GradientProfile(epoch, profiles, Counter(map(_flow, profiles)))


def shortcut_profiles(run: SweepRun, cells: Sequence[Cell], epoch: int) -> tuple[ShortcutProfile, ...]:
    """Reads the residual adds of one network at the first step, in the middle and at the end, as far as recorded.

    Args:
        run: The recorded sweep.
        cells: The network's cells, one per seed.
        epoch: Number of epochs that all of them have completed.
    """
    found = []
    # No step follows the last epoch.
    for done in sorted({0, epoch // 2, epoch - 1}) if epoch else ():
        recorded = (run.junctions(cell.id, done) for cell in cells)
        profiles = tuple(tuple(sorted(rows, key=lambda row: row.position)) for rows in recorded if rows)
        if profiles:
            found.append(ShortcutProfile(done, profiles))
    return tuple(found)


def _flow(rows: Sequence[LayerRow]) -> str:
    # A median over an epoch's steps can be finite although some step was not; the count shows it.
    return "non-finite" if any(row.nonfinite for row in rows) else flow_verdict([row.norm_l2 for row in rows])
