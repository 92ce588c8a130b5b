"""The steps of a run as the rules read them: everything that several rules derive from the snapshots, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.course import Course, Point
from gradprobe.diagnosis.depth import Flow, flow_verdicts, weights_among
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import Signals, SignalTable
from gradprobe.snapshot.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.stats import finish_rows, total_norms

# Probe.step(loss=...), arguments of attach, what only a sharded model has, what a GAN lacks, and what a layer tells
Need = Literal[
    "loss",
    "activations=True",
    "updates=True",
    "copies on several ranks",
    "a loss of its own",
    "a number of classes",
]

Columns: TypeAlias = dict[str, FloatArray]

_MIN_LAYERS = 3  # that a comparison over depth needs


@dataclass(eq=False)
class RunHistory:
    """The newest steps of a run, its course, and the quantities that rules share.

    A site is one place where statistics are taken: a parameter, an activation or an operand of a residual add.

    Attributes:
        snapshots: The newest T steps in order, of one probe.
        limits: Limits of the rules.
        observed: Step and signals of the newest steps in which activations or residual adds were observed.
        updated: The newest steps in which updates were observed.
        columns_of: `gradient_columns` of each snapshot.
        updates_of: `update_columns` of each step with updates.
        course: Losses and total norms of the run, given without the new steps and continued.
        n_new: Number of snapshots that are new to the course.

    Raises:
        ArgumentError: The snapshots are of different probes.
    """

    snapshots: Sequence[Snapshot]
    limits: Thresholds
    observed: Sequence[tuple[int, Signals]]
    updated: Sequence[Snapshot]
    columns_of: Sequence[Columns]
    updates_of: Sequence[Columns]
    course: Course
    n_new: int

    def __post_init__(self) -> None:
        table = self.snapshots[0].table
        if any(one.table is not table and one.table.names != table.names for one in self.snapshots):
            raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different parameters")
        modules = self.observed[0][1].table if self.observed else None
        if any(signals.table is not modules and signals.table != modules for _, signals in self.observed):
            raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different modules")
        self._continue_course()

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot], limits: Thresholds = DEFAULTS) -> RunHistory:
        """Returns the history of a run of which these are all steps.

        Args:
            snapshots: The steps in order.
            limits: Limits of the rules.
        """
        observed = [(one.step, one.signals) for one in snapshots if one.signals is not None]
        updated = [one for one in snapshots if one.parameter_updates is not None]
        columns, updates = [gradient_columns(one) for one in snapshots], [update_columns(one) for one in updated]
        return cls(snapshots, limits, observed, updated, columns, updates, Course.under(limits), len(snapshots))

    def provides(self, need: Need) -> bool:
        """Returns whether the run recorded what a rule needs."""
        if need == "copies on several ranks":
            return any(one.differ is not None for one in self.snapshots)
        if need == "a loss of its own":
            return 2 * sum(one.is_contested for one in self.snapshots) <= len(self.snapshots)
        if need == "a number of classes":
            return self.n_classes > 0
        return self.count(need) > 0

    def count(self, need: Need | None) -> int:
        """Counts the steps that provide what a rule needs; None counts those with a gradient.

        Losses count since the start of the run, since their course is known; everything else among the newest steps.
        """
        if need == "loss":
            return self.course.n_losses
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
        is_judged = {id(one) for one in self.judged}
        chosen = np.array([id(one) in is_judged for one in self.snapshots], dtype=np.bool_)
        present, verdicts = self.present[chosen], np.full(int(chosen.sum()), "healthy", dtype=object)  # [J, K], [J]
        norms = self.column("norm")[chosen]
        left = np.ones(len(present), dtype=np.bool_)
        while left.any():  # once for each set of parameters that had a gradient; most runs have one
            mask = present[left.argmax()]
            rows = np.flatnonzero((present == mask).all(axis=1))
            left[rows] = False
            weights = weights_among(mask, self.table)
            if len(weights):
                verdicts[rows] = flow_verdicts(norms[np.ix_(rows, weights)], self.limits)
        verdicts[(self.column("nonfinite")[chosen] * present).any(axis=1)] = "non-finite"
        for one, verdict in zip(self.judged, verdicts.tolist(), strict=True):
            flows[verdict].append(one)
        return flows

    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which parameters had a gradient in which step. Shape [T, K]."""
        return np.stack([one.measured.present for one in self.snapshots])

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Statistics of the parameters' gradients, absent ones included. Values of shape [T, K]."""
        return {name: np.stack([columns[name] for columns in self.columns_of]) for name in _GRADIENT_COLUMNS}

    def column(self, name: str) -> FloatArray:
        """Returns one statistic of the parameters' gradients, absent ones included. Shape [T, K]."""
        return self.columns[name]

    @property
    def losses(self) -> list[Point]:
        """Step and loss of the newest steps that have a loss."""
        return list(self.course.losses)

    @property
    def first_losses(self) -> list[Point]:
        """The same of the first steps of the run that have a loss, at most `window`."""
        return self.course.first_losses

    @property
    def total_norms(self) -> list[Point]:
        """Step and total norm of the newest steps."""
        return list(self.course.norms)

    @property
    def n_classes(self) -> int:
        """Number of outputs of the classifier, 0 if it is unknown.

        That is the size of the last parameter if it is the bias of the last matrix. A transformer whose head has no
        bias, or shares the embedding's weights, ends with a normalisation behind a matrix of another size.
        """
        names = self.table.names
        matrix = max((k for k, ndim in enumerate(self.table.ndims) if ndim > 1), default=-1)
        if matrix < 0 or names[-1] != names[matrix].removesuffix("weight") + "bias":
            return 0
        return max(int(one.measured.numels[-1]) for one in self.snapshots)

    @cached_property
    def has_fallen(self) -> bool:
        """Whether the loss is clearly below that of the first steps, which takes enough losses, all finite."""
        window = self.limits.window
        first = [loss for _, loss in self.first_losses]
        if self.course.n_losses < 2 * window or not np.isfinite([*first, *self._newest_losses]).all():
            return False
        # A loss that blew up in the first steps and came down again has not converged: the lower start counts.
        start = min(first[0], float(np.mean(first)))
        return start > 0 and float(np.mean(self._newest_losses[-window:])) < self.limits.converging * start

    @cached_property
    def is_solved(self) -> bool:
        """Whether the loss has come down to exactly zero, as a hinge loss does; there is no gradient then."""
        return self.has_fallen and not any(self._newest_losses[-self.limits.window :])

    @cached_property
    def is_converging(self) -> bool:
        """Whether the loss has clearly fallen, and not only in the first quarter of the kept losses.

        AUTOTRAINER (Zhang et al., ICSE 2021) likewise reports a fault of the gradients only if training fails too.
        """
        window, past = self.limits.window, len(self._newest_losses) // 4
        if past < window or not self.has_fallen or self.is_solved:
            return self.has_fallen
        start = float(np.mean(self._newest_losses[past : past + window]))
        return float(np.mean(self._newest_losses[-window:])) < self.limits.converging * start

    @cached_property
    def _newest_losses(self) -> list[float]:
        return [loss for _, loss in self.course.losses]

    @cached_property
    def forward(self) -> ForwardPasses:
        """The observed forward passes."""
        return _forward_passes(self.observed, self.table) if self.observed else ForwardPasses()

    @cached_property
    def updates(self) -> WeightUpdates:
        """The observed updates of the weights."""
        return _weight_updates(self.updated, self.updates_of)

    def _continue_course(self) -> None:
        course, first = self.course, len(self.snapshots) - self.n_new
        new = self.snapshots[first:]
        course.add_losses((one.step, one.loss) for one in new if one.loss is not None)
        if new:
            present = self.present[first:]
            norms = total_norms(self.column("norm")[first:], present)
            course.norms.extend((one.step, norm) for one, norm in zip(new, norms.tolist(), strict=True))
            course.n_steps += int(present.any(axis=1).sum())


_GRADIENT_COLUMNS = ("norm", "abs_max", "mean", "zero_fraction", "nonfinite")


def gradient_columns(one: Snapshot) -> Columns:
    """Returns the statistics of a step's gradients that the rules need. Values of shape [K]."""
    return finish_rows(one.rows, one.measured.numels, one.scale, _GRADIENT_COLUMNS)


def update_columns(one: Snapshot) -> Columns:
    """Returns what the rules need of a step's updates: `ratios` and `lost` of `WeightUpdates`. Values of shape [K]."""
    updates = one.parameter_updates
    assert updates is not None
    numels = updates.measured.numels
    before = finish_rows(updates.weight_rows, numels, 1.0, ("norm",))["norm"]
    moved = finish_rows(updates.update_rows, numels, 1.0, ("norm", "zero_fraction"))
    gradients = finish_rows(one.rows, one.measured.numels, one.scale, ("abs_max", "zero_fraction"))
    has_gradient = one.measured.present & (gradients["abs_max"] > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = moved["norm"] / before
    return {
        "ratios": ratios,
        "lost": np.where(has_gradient, moved["zero_fraction"] - gradients["zero_fraction"], np.nan),
    }


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPasses:
    """The outputs of modules and residual adds in the T steps in which they were observed.

    Attributes:
        steps: Numbers of the steps. Length T.
        table: The S sites.
        ran: Sites of module outputs in the order of execution in the newest step.
        chains: Sites of outputs that are comparable over depth, from the input to the loss: one chain of residual adds
            and one of weight layers.
        segments: Sites of the outputs of successive weight layers between which nothing restores the scale of the
            signal: no normalisation and no residual add.
        present: Which sites had a tensor. [T, S]
        columns: Each statistic. Values of shape [T, S].
    """

    steps: tuple[int, ...] = ()
    table: SignalTable = field(default_factory=lambda: SignalTable((), (), ()))
    ran: tuple[int, ...] = ()
    chains: tuple[tuple[int, ...], ...] = ()
    segments: tuple[tuple[int, ...], ...] = ()
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
    rows = np.stack([signals.rows for _, signals in observed])  # [T, S, 6]
    numels = np.stack([signals.events.measured.numels for _, signals in observed])
    columns = finish_rows(rows, numels, 1.0, ("rms", "std", "mean", "zero_fraction"))  # outputs are not scaled
    in_order = list(dict.fromkeys(newest.events.sites))
    ran = [site for site in in_order if newest.table.kinds[site] == "activation"]
    residual_adds = [site for site in in_order if newest.table.kinds[site] == "junction_y"]
    chains = (tuple(residual_adds), tuple(_comparable(ran, newest.table, parameters)))
    return ForwardPasses(
        steps=tuple(step for step, _ in observed),
        table=newest.table,
        ran=tuple(ran),
        chains=tuple(chain for chain in chains if len(chain) >= _MIN_LAYERS),
        segments=tuple(_segments(in_order, newest.table, parameters)),
        present=np.stack([signals.events.measured.present for _, signals in observed]) & (numels > 0),
        columns=columns,
    )


def _comparable(ran: Sequence[int], signals: SignalTable, parameters: SiteTable) -> list[int]:
    """Returns the outputs of layers with a weight matrix, or of the normalisation right behind; not the last layer's.

    Embeddings are left out because they select rows of their matrix, recurrent modules because their output is bounded.
    """
    found = []
    for site, following in zip(ran, [*ran[1:], None], strict=False):
        if _is_weight_layer(site, signals, parameters):
            is_normalised = following is not None and _is_normalisation(following, signals)
            found.append(following if following is not None and is_normalised else site)
    return found[:-1]


def _segments(in_order: Sequence[int], signals: SignalTable, parameters: SiteTable) -> list[tuple[int, ...]]:
    """Splits the weight layers except the last at normalisations and residual adds; drops short parts."""
    parts: list[list[int]] = [[]]
    for site in in_order:
        if signals.kinds[site] == "junction_y" or _is_normalisation(site, signals):
            parts.append([])
        elif signals.kinds[site] == "activation" and _is_weight_layer(site, signals, parameters):
            parts[-1].append(site)
    last = next((part for part in reversed(parts) if part), [])
    if last:
        last.pop()
    return [tuple(part) for part in parts if len(part) >= _MIN_LAYERS]


def _is_weight_layer(site: int, signals: SignalTable, parameters: SiteTable) -> bool:
    k = parameters.index.get(f"{signals.names[site]}.weight")
    return k is not None and parameters.ndims[k] > 1 and not _module_type(signals, site).startswith("Embedding")


def _is_normalisation(site: int, signals: SignalTable) -> bool:
    return signals.kinds[site] == "activation" and "Norm" in _module_type(signals, site)


def _module_type(table: SignalTable, site: int) -> str:
    return table.module_types[site // 2]  # two sites per module: output and gradient


def _weight_updates(snapshots: Sequence[Snapshot], columns_of: Sequence[Columns]) -> WeightUpdates:
    observed = [
        (one, one.parameter_updates, columns)
        for one, columns in zip(snapshots, columns_of, strict=True)
        if one.parameter_updates is not None and not one.skipped
    ]
    if not observed:
        return WeightUpdates((), (), np.empty((0, 0)), np.empty((0, 0)))
    present = np.stack([updates.measured.present for _, updates, _ in observed]).all(axis=0)  # [K]
    matrices = present & (np.asarray(observed[0][0].table.ndims) > 1)
    weights = np.flatnonzero(matrices if matrices.any() else present)  # [W]
    return WeightUpdates(
        steps=tuple(one.step for one, _, _ in observed),
        names=tuple(observed[0][0].table.names[k] for k in weights),
        ratios=np.stack([columns["ratios"][weights] for _, _, columns in observed]),
        lost=np.stack([columns["lost"][weights] for _, _, columns in observed]),
    )
