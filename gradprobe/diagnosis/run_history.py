"""The steps of a run as the rules read them: everything that several rules derive from the snapshots, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.depth import Flow, flow_verdict, weight_norms
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import Signals, SignalTable
from gradprobe.snapshot.snapshot import SiteTable, Snapshot

# Probe.step(loss=...), arguments of attach, and what only a sharded model has
Need = Literal["loss", "activations=True", "updates=True", "copies on several ranks"]

_MIN_LAYERS = 3  # that a comparison over depth needs


@dataclass(frozen=True, eq=False)
class RunHistory:
    """The snapshots of a run in order, and the quantities that rules share.

    A site is one place where statistics are taken: a parameter, an activation or an operand of a residual add.

    Attributes:
        snapshots: T steps in order, of one probe.
        limits: Limits of the rules.

    Raises:
        ArgumentError: The snapshots are of different probes.
    """

    snapshots: Sequence[Snapshot]
    limits: Thresholds = DEFAULTS

    def __post_init__(self) -> None:
        if any(one.table.names != self.snapshots[0].table.names for one in self.snapshots):
            raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different parameters")
        if any(signals.table != self.observed[0][1].table for _, signals in self.observed):
            raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different modules")

    def provides(self, need: Need) -> bool:
        """Returns whether the run recorded what a rule needs."""
        if need == "loss":
            return bool(self.losses)
        if need == "copies on several ranks":
            return any(one.differ is not None for one in self.snapshots)
        return bool(self.observed if need == "activations=True" else self.updates.steps)

    def count(self, need: Need | None) -> int:
        """Counts the steps that provide what a rule needs; None counts those with a gradient."""
        if need == "loss":
            return len(self.losses)
        if need == "activations=True":
            return len(self.observed)
        return len(self.updates.steps) if need == "updates=True" else int(self.present.any(axis=1).sum())

    @property
    def table(self) -> SiteTable:
        """Names and dimensions of the K parameters."""
        return self.snapshots[0].table

    @cached_property
    def judged(self) -> list[Snapshot]:
        """The steps whose gradients count: those that the gradient scaler did not skip, or all if it skipped most.

        A scaler that searches for its scale skips a step now and then; one that skips most steps points to a fault.
        """
        kept = [one for one in self.snapshots if not one.skipped]
        return list(self.snapshots) if 2 * len(kept) < len(self.snapshots) else kept

    @cached_property
    def flows(self) -> dict[Flow, list[Snapshot]]:
        """The judged steps by the verdict on their gradients over depth."""
        flows: dict[Flow, list[Snapshot]] = {"healthy": [], "non-finite": [], "vanishing": [], "exploding": []}
        for one in self.judged:
            has_nonfinite = one.columns["nonfinite"][one.measured.present].any()
            flows["non-finite" if has_nonfinite else flow_verdict(weight_norms(one), self.limits)].append(one)
        return flows

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which parameters had a gradient in which step. Shape [T, K]."""
        return np.stack([one.measured.present for one in self.snapshots])

    def column(self, name: str) -> FloatArray:
        """Returns one statistic of the parameters' gradients, absent ones included. Shape [T, K]."""
        return np.stack([one.columns[name] for one in self.snapshots])

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each step that has a loss."""
        return [(one.step, one.loss) for one in self.snapshots if one.loss is not None]

    @cached_property
    def is_converging(self) -> bool:
        """Whether the loss has clearly fallen; False if there are too few losses or they are not positive.

        AUTOTRAINER (Zhang et al., ICSE 2021) likewise reports a fault of the gradients only if training fails too.
        """
        values = np.array([loss for _, loss in self.losses], dtype=np.float64)
        window = self.limits.window
        if len(values) < 2 * window or not np.isfinite(values).all():
            return False
        # A loss that blew up in the first steps and came down again has not converged: the lower start counts.
        start = min(float(values[0]), float(values[:window].mean()))
        return start > 0 and float(values[-window:].mean()) < self.limits.converging * start

    @cached_property
    def observed(self) -> list[tuple[int, Signals]]:
        """Step and signals of each step in which activations or residual adds were observed."""
        return [(one.step, one.signals) for one in self.snapshots if one.signals is not None]

    @cached_property
    def forward(self) -> ForwardPasses:
        """The observed forward passes."""
        return _forward_passes(self.observed, self.table) if self.observed else ForwardPasses()

    @cached_property
    def updates(self) -> WeightUpdates:
        """The observed updates of the weights."""
        return _weight_updates(self.snapshots)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPasses:
    """The outputs of modules and residual adds in the T steps in which they were observed.

    Attributes:
        steps: Numbers of the steps. Length T.
        table: The S sites.
        ran: Sites of module outputs in the order of execution in the newest step.
        chains: Sites of outputs that are comparable over depth, from the input to the loss: one chain of residual adds
            and one of weight layers.
        present: Which sites had a tensor. [T, S]
        columns: Each statistic. Values of shape [T, S].
    """

    steps: tuple[int, ...] = ()
    table: SignalTable = field(default_factory=lambda: SignalTable((), (), ()))
    ran: tuple[int, ...] = ()
    chains: tuple[tuple[int, ...], ...] = ()
    present: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.bool_))
    columns: dict[str, FloatArray] = field(default_factory=dict)

    def module_type(self, site: int) -> str:
        """Returns the class name of a module, given the site of its output."""
        return _module_type(self.table, site)


@dataclass(frozen=True, slots=True, eq=False)
class WeightUpdates:
    """The updates of the W weights that were stepped in each of the T observed steps that were not skipped.

    Attributes:
        steps: Numbers of the steps. Length T.
        names: Names of the weights. Length W.
        ratios: Norm of the update over the norm of the weight. [T, W]
        lost: Share of elements that did not move, minus the share without a gradient; NaN if the weight has no gradient
            at all. [T, W]
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    ratios: FloatArray
    lost: FloatArray


def _forward_passes(observed: Sequence[tuple[int, Signals]], parameters: SiteTable) -> ForwardPasses:
    newest = observed[-1][1]
    in_order = list(dict.fromkeys(newest.events.sites))
    ran = [site for site in in_order if newest.table.kinds[site] == "activation"]
    residual_adds = [site for site in in_order if newest.table.kinds[site] == "junction_y"]
    chains = (tuple(residual_adds), tuple(_comparable(ran, newest.table, parameters)))
    return ForwardPasses(
        steps=tuple(step for step, _ in observed),
        table=newest.table,
        ran=tuple(ran),
        chains=tuple(chain for chain in chains if len(chain) >= _MIN_LAYERS),
        present=np.stack([signals.events.measured.present for _, signals in observed]),
        columns={
            name: np.stack([signals.columns[name] for _, signals in observed])
            for name in ("rms", "std", "mean", "zero_fraction")
        },
    )


def _comparable(ran: Sequence[int], signals: SignalTable, parameters: SiteTable) -> list[int]:
    """Returns the outputs of layers with a weight matrix, or of the normalisation right behind; not the last layer's.

    Embeddings are left out because they select rows of their matrix, recurrent modules because their output is bounded.
    """
    matrices = {name for name, k in parameters.index.items() if parameters.ndims[k] > 1}
    found = []
    for site, following in zip(ran, [*ran[1:], None], strict=False):
        if f"{signals.names[site]}.weight" not in matrices or _module_type(signals, site).startswith("Embedding"):
            continue
        is_normalised = following is not None and "Norm" in _module_type(signals, following)
        found.append(following if following is not None and is_normalised else site)
    return found[:-1]


def _module_type(table: SignalTable, site: int) -> str:
    return table.module_types[site // 2]  # two sites per module: output and gradient


def _weight_updates(snapshots: Sequence[Snapshot]) -> WeightUpdates:
    observed = [
        (one, one.parameter_updates) for one in snapshots if one.parameter_updates is not None and not one.skipped
    ]
    if not observed:
        return WeightUpdates((), (), np.empty((0, 0)), np.empty((0, 0)))
    present = np.stack([updates.measured.present for _, updates in observed]).all(axis=0)  # [K]
    matrices = present & (np.asarray(observed[0][0].table.ndims) > 1)
    weights = np.flatnonzero(matrices if matrices.any() else present)  # [W]
    has_gradient = np.stack([one.measured.present & (one.columns["abs_max"] > 0) for one, _ in observed])  # [T, K]
    unmoved = np.stack([updates.update_columns["zero_fraction"] for _, updates in observed])
    without_gradient = np.stack([one.columns["zero_fraction"] for one, _ in observed])
    return WeightUpdates(
        steps=tuple(one.step for one, _ in observed),
        names=tuple(observed[0][0].table.names[k] for k in weights),
        ratios=np.stack([updates.ratios for _, updates in observed])[:, weights],
        lost=np.where(has_gradient, unmoved - without_gradient, np.nan)[:, weights],
    )
