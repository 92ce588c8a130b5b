"""The optimizer's updates of one step, as frozen host data. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradprobe.snapshot.records import FloatArray, Measured
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats


@dataclass(frozen=True, slots=True)
class Update:
    """One parameter's update in an optimizer's step.

    Attributes:
        name: First name of the parameter.
        weight: Statistics of the parameter before the step.
        update: Statistics of the parameter after the step minus before it, after rounding to its dtype. Its
            `zero_fraction` is the share of the elements that did not move.
        ratio: Norm of the update over the norm of the parameter, healthy near 1e-3; infinite if the parameter was zero
            and moved, NaN if it stayed zero.

    Source:
        CS231n, "Neural Networks Part 3", ratio of updates to weights.
    """

    name: str
    weight: SiteStats
    update: SiteStats
    ratio: float


@dataclass(frozen=True, eq=False)
class Updates:
    """Statistics of K parameters before an optimizer's step, and of their updates.

    Attributes:
        names: First names of the parameters. Length K.
        weight_rows: Raw statistics in the order of `gradprobe.STATS`. [K, 6]
        update_rows: The same for the updates. [K, 6]
        measured: Which parameters the optimizer steps, and their sizes.
    """

    names: tuple[str, ...]
    weight_rows: FloatArray
    update_rows: FloatArray
    measured: Measured

    @cached_property
    def weight_columns(self) -> dict[str, FloatArray]:
        """Each statistic of `COLUMNS` for the K parameters, stepped or not. Values of shape [K]."""
        return finish_rows(self.weight_rows, self.measured.numels, 1.0)

    @cached_property
    def update_columns(self) -> dict[str, FloatArray]:
        """The same for the updates."""
        return finish_rows(self.update_rows, self.measured.numels, 1.0)

    @cached_property
    def ratios(self) -> FloatArray:
        """`Update.ratio` of the K parameters, stepped or not. Shape [K]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.update_columns["norm"] / self.weight_columns["norm"]

    @cached_property
    def updates(self) -> dict[str, Update]:
        """The updates of the parameters that the optimizer steps, by first name, in model order."""
        return {
            self.names[k]: Update(
                self.names[k],
                site_stats(self.names[k], "weight", self.weight_columns, k),
                site_stats(self.names[k], "update", self.update_columns, k),
                float(self.ratios[k]),
            )
            for k in np.flatnonzero(self.measured.present).tolist()
        }

    def all_stats(self) -> Iterator[SiteStats]:
        """Yields the statistics of the parameters in model order, then those of the updates."""
        yield from (update.weight for update in self.updates.values())
        yield from (update.update for update in self.updates.values())

    def reordered(self, order: Sequence[int]) -> Updates:
        """Puts the parameters into another order.

        Args:
            order: Positions of the K parameters in the new order. Length K.
        """
        take = np.asarray(order, dtype=np.int64)
        measured = Measured(self.measured.present[take], self.measured.numels[take])
        return Updates(tuple(self.names[k] for k in order), self.weight_rows[take], self.update_rows[take], measured)
