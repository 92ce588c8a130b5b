"""The statistics of one step, as frozen host data. Needs no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.snapshot.magnitudes import ActivationMagnitudes, GradientMagnitudes, Magnitudes
from gradprobe.snapshot.metrics import Detail, metrics
from gradprobe.snapshot.notebook import snapshot_form
from gradprobe.snapshot.records import FloatArray, Measured, Provenance
from gradprobe.snapshot.signals import Activation, Junction, Signals
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats, total_norms
from gradprobe.snapshot.updates import Update, Updates
from gradprobe.text.words import quoted


@dataclass(frozen=True, slots=True)
class SiteTable:
    """The K parameters of a probe, in model order, shared by its snapshots.

    Attributes:
        names: First names. Length K.
        kinds: Kinds, as in `SiteStats`. Length K.
        ndims: Number of dimensions of each parameter. Length K.
        index: Position of each name; a tied parameter has several.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ndims: tuple[int, ...]
    index: Mapping[str, int]


_KIND_PHRASES = {
    "parameter": "gradient of",
    "activation": "output of",
    "activation_grad": "gradient at the output of",
    "junction_x": "shortcut into",
    "junction_f": "branch into",
    "junction_y": "output of",
    "junction_grad": "gradient at the output of",
    "shortcut_grad": "gradient through the shortcut of",
    "branch_grad": "gradient through the branch of",
}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first tensor with NaN or infinity, in order of execution.

    Attributes:
        step: Number of the step.
        site: Name of the parameter or module.
        kind: Kind of the tensor, as in `SiteStats`.
        phase: Pass in which it was computed.
        module: The observed module that computed it: for an output, the module itself; for the gradient of an output,
            the module that ran next, "" for the loss; for the gradient of a parameter, the parameter's module.
        nonfinite: Number of elements that are NaN or infinite.
        numel: Number of elements.
    """

    step: int
    site: str
    kind: str
    phase: Literal["forward", "backward"]
    module: str
    nonfinite: int
    numel: int

    def __str__(self) -> str:
        origin = f", sent back by {quoted(self.module)}" if self.kind == "activation_grad" and self.module else ""
        count = f"{self.nonfinite} of {self.numel} values are not finite"
        return f"step {self.step}, {self.phase}: {count} in the {self.tensor}{origin}"

    @property
    def tensor(self) -> str:
        """The tensor in words, such as "output of layer1"."""
        return f"{_KIND_PHRASES[self.kind]} {quoted(self.site)}"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Statistics of the gradients of one training step.

    Maps each parameter that had a gradient in this step to its statistics.

    Attributes:
        step: Number of the step, counted from `attach(start_step=...)` on, which is 0 unless given.
        loss: The mean of the losses given to `Probe.step(loss=...)` in this step, or None.
        provenance: Scale, reduction and state of the gradients.
        skipped: The gradient scaler skipped the optimizer's step because a gradient was not finite.
        table: The parameters.
        rows: Raw statistics in the order of `gradprobe.STATS`. [K, 6]
        measured: Which parameters had a gradient, and their sizes.
        scale: Factor that undoes loss scaling on the gradients.
        signals: Statistics of activations and residual adds, None if they were not observed in this step.
        parameter_updates: Statistics of the optimizer's updates, None if they were not observed in this step.
        clip_factor: Factor by which all gradients were multiplied after they were measured, as by clipping; 1.0 if they
            were not changed, None if the state is "modified".
        differ: For each parameter, whether ranks that hold a copy of its gradient hold different ones; None if the
            gradients were not reduced over ranks. [K]
        is_accumulated: The gradients were added to those that an optimizer had already used, as without zero_grad.
        is_contested: An optimizer of parameters outside the model has stepped since the step before, so that the loss
            is not this model's alone, as in a GAN.
        gradient_magnitudes: How the magnitudes of the gradients spread, None if they were not counted in this step.
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
    clip_factor: float | None = 1.0
    differ: npt.NDArray[np.bool_] | None = None
    is_accumulated: bool = False
    is_contested: bool = False
    gradient_magnitudes: GradientMagnitudes | None = None

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Each statistic of `COLUMNS` for all K parameters, with or without a gradient. Values of shape [K]."""
        return finish_rows(self.rows, self.measured.numels, self.scale)

    @cached_property
    def sites(self) -> dict[str, SiteStats]:
        """Statistics of the gradients, by the parameter's first name, in model order."""
        return {name: self._site(k) for k, name in enumerate(self.table.names) if self.measured.present[k]}

    @cached_property
    def total_norm(self) -> float:
        """Euclidean norm of all gradients together, as they were measured; tied parameters count once. NaN if none was.

        That is before clipping, except with `when="step"`, and for gradients that fire no hook, such as those of
        `torch.autograd.grad` and of compiled autograd.
        """
        # the other columns may never be asked for
        norms = finish_rows(self.rows, self.measured.numels, self.scale, ("norm",))["norm"]
        return float(total_norms(norms, self.measured.present))

    @property
    def activations(self) -> dict[str, Activation]:
        """The observed modules that returned tensors, by name, in order of execution."""
        return {} if self.signals is None else self.signals.activations

    @property
    def junctions(self) -> dict[str, Junction]:
        """The residual adds that were called, by name, in order of execution."""
        return {} if self.signals is None else self.signals.junctions

    @property
    def updates(self) -> dict[str, Update]:
        """The optimizer's updates, by the parameter's first name, in model order."""
        return {} if self.parameter_updates is None else self.parameter_updates.updates

    @property
    def magnitudes(self) -> dict[str, Magnitudes]:
        """How the magnitudes of the gradients spread, by the parameter's first name, in model order."""
        found = {} if self.gradient_magnitudes is None else self.gradient_magnitudes.magnitudes
        return {name: found[name] for name in self.table.names if name in found}

    @property
    def activation_magnitudes(self) -> dict[str, ActivationMagnitudes]:
        """How the magnitudes of module outputs and of their gradients spread, by module, in order of execution."""
        return {} if self.signals is None else self.signals.activation_magnitudes

    @property
    def changes(self) -> Updates | None:
        """Deprecated name of `parameter_updates`."""
        warnings.warn("Snapshot.changes is deprecated; use parameter_updates", DeprecationWarning, stacklevel=2)
        return self.parameter_updates

    def first_nonfinite(self) -> NonFinite | None:
        """Returns the first tensor with NaN or infinity in order of execution, None if all values were finite."""
        if self.signals is not None:
            for stats in self.signals.all_stats():
                if stats.nonfinite:
                    phase: Literal["forward", "backward"] = "backward" if stats.kind.endswith("_grad") else "forward"
                    module = self.signals.sender(stats.name) if stats.kind == "activation_grad" else stats.name
                    return NonFinite(self.step, stats.name, stats.kind, phase, module, stats.nonfinite, stats.numel)
        for stats in reversed(self.sites.values()):  # a backward pass reaches the last parameters first
            if stats.nonfinite:
                module = stats.name.rpartition(".")[0]
                return NonFinite(self.step, stats.name, stats.kind, "backward", module, stats.nonfinite, stats.numel)
        return None

    def metrics(self, detail: Detail = "summary") -> dict[str, float]:
        """Returns the numbers of the step as one flat dictionary, for `wandb.log` and its like.

        Args:
            detail: "summary": the total norm, five quantiles of each quantity over the model, and the gradient norms of
                the ten weights that are furthest from the median. "all": each quantity at each place.

        Returns:
            Numbers under names such as `gradprobe/total_norm` and `gradprobe/grad_norm/layer1.weight`.

        Raises:
            ArgumentError: The detail is unknown.
        """
        return metrics(self, detail)

    def all_stats(self) -> Iterator[SiteStats]:
        """Yields statistics of the gradients in model order, the signals in order of execution, and the updates."""
        yield from self.sites.values()
        if self.signals is not None:
            yield from self.signals.all_stats()
        if self.parameter_updates is not None:
            yield from self.parameter_updates.all_stats()

    def reordered(self, order: Sequence[int]) -> Snapshot:
        """Puts the parameters into another order, such as that of execution.

        Args:
            order: Positions of the K parameters in the new order. Length K.

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
        updates = None if self.parameter_updates is None else self.parameter_updates.reordered(order)
        differ = None if self.differ is None else self.differ[take]
        rows = self.rows[take]
        return replace(self, table=table, rows=rows, measured=measured, parameter_updates=updates, differ=differ)

    def __getitem__(self, name: str) -> SiteStats:
        k = self.table.index.get(name)
        if k is None:
            known = self.table.names
            raise KeyError(f"no parameter {name!r}; the model has {len(known)}: {', '.join(known[:5])}, …")
        if not self.measured.present[k]:
            raise KeyError(f"parameter {name!r} had no gradient in step {self.step}")
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
        return f"Snapshot(step={self.step}{loss}, total_norm={self.total_norm:.4g}, parameters={len(self)})"

    def _repr_html_(self) -> str:
        return snapshot_form(self)

    def _site(self, k: int) -> SiteStats:
        return site_stats(self.table.names[k], self.table.kinds[k], self.columns, k)
