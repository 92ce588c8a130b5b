"""What was measured in one step, as frozen host data that needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradprobe.snapshot.records import FloatArray, Measured, Provenance
from gradprobe.snapshot.signals import Activation, Junction, Signals
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats
from gradprobe.snapshot.updates import Update, Updates

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class SiteTable:
    """Names that the snapshots of one probe share: K sites in model order.

    Attributes:
        names: First names. Length K.
        kinds: Kinds. Length K.
        ndims: Number of dimensions of each tensor. Length K.
        index: Every name, ties included, to its position.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ndims: tuple[int, ...]
    index: Mapping[str, int]


_WORDS = {
    "parameter": "gradient of",
    "activation": "output of",
    "activation_grad": "gradient at the output of",
    "junction_x": "shortcut into",
    "junction_f": "branch into",
    "junction_y": "output of",
    "junction_grad": "gradient at the output of",
    "shortcut_grad": "gradient by the shortcut of",
    "branch_grad": "gradient through the branch of",
}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Where NaN or infinity was seen first in the order of execution.

    Attributes:
        step: Number of the step.
        site: Name of the site.
        kind: Kind of the site, as in `SiteStats`.
        phase: Whether it was in the forward or the backward pass.
        module: The module that made it, as far as what is observed tells: the one whose output it is; for the gradient
            of an output the one that ran next and sent it back, "" for the loss; for a parameter its own.
        nonfinite: Number of values there that are NaN or infinite.
        numel: Number of values there.
    """

    step: int
    site: str
    kind: str
    phase: Literal["forward", "backward"]
    module: str
    nonfinite: int
    numel: int

    def __str__(self) -> str:
        where = f"{_WORDS[self.kind]} {self.site}"
        maker = f", sent back by {self.module}" if self.kind == "activation_grad" and self.module else ""
        return f"step {self.step}, {self.phase}: {where} has {self.nonfinite} non-finite of {self.numel} values{maker}"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The gradients of one training step.

    Index it with a site name, or iterate over `sites`. A site without a gradient in this step is not in it.

    Attributes:
        step: Number of the step, counted from 0 at attach.
        loss: What was given to `Probe.step(loss=...)`, or None.
        provenance: Unscaled or scaled, local or averaged, before or after clipping.
        skipped: The gradient scaler skipped the optimizer's step, because a gradient was not finite.
        table: Site names.
        rows: Raw statistics in the order of `gradprobe.STATS`. [K, 6]
        measured: Which sites had a gradient, and their sizes.
        scale: Factor on the gradients that undoes loss scaling.
        signals: What passed by at activations and junctions, None where they were not observed in this step.
        changes: What the optimizer did to the parameters, None where that was not observed in this step.
    """

    step: int
    loss: float | None
    provenance: Provenance
    skipped: bool
    table: SiteTable
    rows: FloatArray
    measured: Measured
    scale: float = 1.0
    signals: Signals | None = None
    parameter_updates: Updates | None = None

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Each statistic of `COLUMNS` for all K sites, absent ones included. Values of shape [K]."""
        return finish_rows(self.rows, self.measured.numels, self.scale)

    @cached_property
    def sites(self) -> dict[str, SiteStats]:
        """The sites that had a gradient, by first name, in model order."""
        return {name: self._site(k) for k, name in enumerate(self.table.names) if self.measured.present[k]}

    @cached_property
    def total_norm(self) -> float:
        """Euclidean norm of all gradients together, tied parameters counted once."""
        norms = self.columns["norm"][self.measured.present]  # [K']
        largest = float(norms.max(initial=0.0))
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        return largest * float(np.sqrt(np.sum((norms / largest) ** 2)))

    @property
    def activations(self) -> dict[str, Activation]:
        """The observed modules that returned something, by name, in the order of execution."""
        return {} if self.signals is None else self.signals.activations

    @property
    def junctions(self) -> dict[str, Junction]:
        """The residual junctions that were passed, by name, in the order of execution."""
        return {} if self.signals is None else self.signals.junctions

    @property
    def updates(self) -> dict[str, Update]:
        """What the optimizer did to the parameters that it steps, by first name, in model order."""
        return {} if self.parameter_updates is None else self.parameter_updates.updates

    def first_nonfinite(self) -> NonFinite | None:
        """Tells where NaN or infinity came first in the order of execution, None where everything was finite."""
        if self.signals is not None:
            for site in self.signals.passed:
                stats = self.signals.stats(site)
                if stats is not None and stats.nonfinite:
                    phase: Literal["forward", "backward"] = "backward" if stats.kind.endswith("_grad") else "forward"
                    module = self.signals.sender(stats.name) if stats.kind == "activation_grad" else stats.name
                    return NonFinite(self.step, stats.name, stats.kind, phase, module, stats.nonfinite, stats.numel)
        for stats in reversed(self.sites.values()):  # a backward comes to the last parameters first
            if stats.nonfinite:
                module = stats.name.rpartition(".")[0]
                return NonFinite(self.step, stats.name, stats.kind, "backward", module, stats.nonfinite, stats.numel)
        return None

    def all_stats(self) -> Iterator[SiteStats]:
        """Yields the parameters' gradients in model order, what passed by in the order of execution, the updates."""
        yield from self.sites.values()
        if self.signals is not None:
            for site in self.signals.passed:
                stats = self.signals.stats(site)
                if stats is not None:
                    yield stats
        if self.parameter_updates is not None:
            yield from self.parameter_updates.all_stats()

    def reordered(self, order: Sequence[int]) -> Snapshot:
        """Puts the sites into another order, such as that of execution.

        Args:
            order: Positions of the K sites in the order wanted. Length K.

        Returns:
            A new snapshot.
        """
        names = self.table.names
        position = {names[k]: new for new, k in enumerate(order)}
        table = SiteTable(
            names=tuple(names[k] for k in order),
            kinds=tuple(self.table.kinds[k] for k in order),
            ndims=tuple(self.table.ndims[k] for k in order),
            index={name: position[names[k]] for name, k in self.table.index.items()},
        )
        take = np.asarray(order, dtype=np.int64)
        measured = Measured(self.measured.present[take], self.measured.numels[take])
        changes = None if self.parameter_updates is None else self.parameter_updates.reordered(order)
        return replace(self, table=table, rows=self.rows[take], measured=measured, parameter_updates=changes)

    def __getitem__(self, name: str) -> SiteStats:
        k = self.table.index.get(name)
        if k is None:
            known = self.table.names
            raise KeyError(f"no site {name!r}; there are {len(known)}: {', '.join(known[:5])}, …")
        if not self.measured.present[k]:
            raise KeyError(f"site {name!r} had no gradient in step {self.step}")
        return self._site(k)

    def __contains__(self, name: object) -> bool:
        k = self.table.index.get(name) if isinstance(name, str) else None
        return k is not None and bool(self.measured.present[k])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return int(self.measured.present.sum())

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.4g}"
        return f"Snapshot(step={self.step}{loss}, total_norm={self.total_norm:.4g}, sites={len(self)})"

    def _site(self, k: int) -> SiteStats:
        return site_stats(self.table.names[k], self.table.kinds[k], self.columns, k)
