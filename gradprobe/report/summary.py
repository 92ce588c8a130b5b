"""Summarises a sweep: for each network the errors over seeds, the gradient over depth, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gradprobe.report.error_comparison import (
    EARLIEST_COMPARISON,
    LAST_SHARE,
    Comparison,
    Course,
    Errors,
    Learning,
    Rise,
)
from gradprobe.report.formatting import short_path, short_paths, short_source
from gradprobe.report.profiles import GradientProfile, ShortcutProfile, gradient_profile, shortcut_profiles
from gradprobe.report.records import Cell, EpochRow, Net, SweepRun
from gradprobe.report.seed_statistics import Spread
from gradprobe.text.words import split_target

DEGRADED = "degraded optimisation"
"""Verdict: healthy gradients, but a training error clearly above that of a shallower network."""

OVERFITTING = "overfitting"
"""Verdict: healthy gradients and training error, but a test error that is clearly too high."""

NOT_LEARNING = "not learning"
"""Verdict: healthy gradients, but a training error that has not clearly fallen."""

TOO_EARLY = "too early"
"""Verdict: healthy gradients, but too little training to compare with a shallower network or to see no progress."""

MORE_SEEDS = "needs more seeds"
"""Verdict: healthy gradients, but a training error above that of a shallower network in a single seed."""


@dataclass(frozen=True)
class CellResult:
    """One cell and its epochs by number."""

    cell: Cell
    epochs: Mapping[int, EpochRow]

    @property
    def done(self) -> bool:
        """Whether the cell has run all its epochs."""
        return self.cell.status == "done"

    @property
    def diverged(self) -> bool:
        """Whether the cell stopped at a non-finite training loss."""
        return self.cell.status == "diverged"


@dataclass(frozen=True)
class NetSummary:
    """The results of one family at one depth.

    Attributes:
        family: Name of the family.
        depth: Depth in weight layers, as the family counts them.
        results: Every planned cell, in any state.
        counted: Cells that the numbers are taken from: the finished ones or, while there is none, those that started.
        epoch: Newest epoch that all counted cells have; None before the first.
        initial: Gradient over depth at the first step; None if not recorded.
        end: Gradient over depth at `epoch`; None if not recorded or if `epoch` is 0.
        shortcut_profiles: Residual adds at the first step, in the middle and at the end, as far as recorded.
        comparison: Comparison with the shallower network of the lowest training error; None if there is none, or
            before the first epoch.
        test_comparison: The same with the shallower network of the lowest test error.
        rise: Comparison with the epoch of the lowest test error; None if it is too early.
        learning: Comparison with the errors before the first step; None if not recorded, or if it is too early.
    """

    family: str
    depth: int
    results: tuple[CellResult, ...]
    counted: tuple[CellResult, ...]
    epoch: int | None
    initial: GradientProfile | None
    end: GradientProfile | None
    shortcut_profiles: tuple[ShortcutProfile, ...]
    comparison: Comparison | None
    test_comparison: Comparison | None
    rise: Rise | None
    learning: Learning | None

    @property
    def name(self) -> str:
        """Family and depth, as in "plain-56"."""
        return f"{self.family}-{self.depth}"

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return self.results[0].cell.parameters

    @property
    def finished(self) -> bool:
        """Whether no cell has epochs left to run."""
        return all(result.done or result.diverged for result in self.results)

    @property
    def n_done(self) -> int:
        """Number of seeds that have run all their epochs."""
        return sum(result.done for result in self.results)

    @property
    def n_diverged(self) -> int:
        """Number of seeds that diverged."""
        return sum(result.diverged for result in self.results)

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that an exception stopped."""
        return tuple(result.cell for result in self.results if result.cell.failure)

    @property
    def progress(self) -> str:
        """Progress of the seeds: "3" if all are done, "1 of 3", "0 of 3, epoch 7", "2 of 3, 1 diverged, 1 failed"."""
        if self.n_done == len(self.results):
            return str(self.n_done)
        text = f"{self.n_done} of {len(self.results)}"
        if self.n_diverged:
            text += f", {self.n_diverged} diverged"
        elif self.epoch is None:
            text += ", not started"
        elif self.n_done == 0:
            text += f", epoch {self.epoch}"
        return f"{text}, {len(self.failed)} failed" if self.failed else text

    @property
    def train_error_pct(self) -> Spread | None:
        """Training error at `epoch` over the counted seeds; see `has_running_error`."""
        errors = _errors(self.counted, self.epoch)
        return None if errors is None else errors.train

    @property
    def has_running_error(self) -> bool:
        """Whether the training error at `epoch` is a running one, as in an unfinished run."""
        errors = _errors(self.counted, self.epoch)
        return errors is not None and errors.is_running

    @property
    def test_error_pct(self) -> Spread | None:
        """Test error at `epoch` over the counted seeds."""
        errors = _errors(self.counted, self.epoch)
        return None if errors is None else errors.test

    @property
    def seconds(self) -> float:
        """Time of all recorded epochs of all cells."""
        times = (row.seconds for result in self.results for row in result.epochs.values())
        return math.fsum(time for time in times if math.isfinite(time))

    @property
    def verdict_profile(self) -> GradientProfile | None:
        """The gradient that the verdict is about: the newest, or the first if it exploded and vanished later."""
        return self.initial if self.exploded_then_vanished else self.end or self.initial

    @property
    def exploded_then_vanished(self) -> bool:
        """Whether the gradient explodes at the first step and vanishes at `epoch`.

        The explosion is then the cause: steps along such gradients can leave a network whose gradients vanish. Two of
        six seeds of plain-56 on the digits do so at a learning rate of 0.1, and neither does at 0.01. The rule is ours.
        """
        return [profile.verdict for profile in (self.initial, self.end) if profile] == ["exploding", "vanishing"]

    @property
    def verdict(self) -> str | None:
        """The verdict so far: on the gradient first, then on the errors; None while nothing is recorded.

        A network most of whose seeds diverged is non-finite. A gradient that is not healthy is the verdict. A training
        error above the shallower network's is called degraded optimisation only if gradients are healthy: He et al.
        2015, section 4.1, keep the two apart. `Comparison.outcome` says when it is too early for that, or needs more
        seeds. A test error that is too high is called overfitting only if optimisation is not degraded: "such
        degradation is not caused by overfitting" (section 1), as the training error shows.
        """
        if 2 * self.n_diverged > len(self.results):
            return "non-finite"
        flow = self.verdict_profile.verdict if self.verdict_profile else None
        if flow != "healthy":
            return flow
        outcome = self.comparison.outcome if self.comparison is not None else None
        if outcome == "clearly above":
            return DEGRADED
        if self.learning is not None and not self.learning.has_learned:
            return TOO_EARLY if self.learning.may_be_slow else NOT_LEARNING
        if outcome == "too early":
            return TOO_EARLY
        if outcome == "needs more seeds":
            return MORE_SEEDS
        overfits = any(seen is not None and seen.overfits for seen in (self.test_comparison, self.rise))
        return OVERFITTING if overfits else flow


@dataclass(frozen=True)
class Summary:
    """A sweep's networks, ordered by family (as in the run) and depth, with the run's configuration and metadata."""

    config: Mapping[str, object]
    meta: Mapping[str, str]
    nets: tuple[NetSummary, ...]

    @property
    def families(self) -> tuple[str, ...]:
        """The families, in order."""
        return tuple(dict.fromkeys(net.family for net in self.nets))

    @property
    def cells_finished(self) -> int:
        """Number of cells with no epochs left to run."""
        return sum(result.done or result.diverged for net in self.nets for result in net.results)

    @property
    def cells_planned(self) -> int:
        """Number of all cells."""
        return sum(len(net.results) for net in self.nets)

    @property
    def has_running_errors(self) -> bool:
        """Whether the training error of a network is a running one."""
        return any(net.has_running_error for net in self.nets)


def summarise(run: SweepRun) -> Summary:
    """Reads a run once and summarises it for the terminal, the page, the charts and the exports.

    Args:
        run: The recorded sweep; it may have unfinished cells, missing layers and non-finite values.

    Returns:
        The summary.
    """
    groups: dict[Net, list[CellResult]] = {}
    for cell in _with_short_names(run.cells()):
        epochs = {row.epoch: row for row in run.epochs(cell.id)}
        groups.setdefault(cell.net, []).append(CellResult(cell, epochs))
    families = list(dict.fromkeys(family for family, _ in groups))
    limits = comparison_limits(run.config)
    nets: list[NetSummary] = []
    for family, depth in sorted(groups, key=lambda key: (families.index(key[0]), key[1])):
        results = groups[family, depth]
        begun = [result for result in results if result.epochs]
        counted = [result for result in begun if result.done] or begun
        epoch = min((max(result.epochs) for result in counted), default=None)
        shallower = [net for net in nets if net.family == family]
        cells = [result.cell for result in counted]
        name = results[0].cell.name
        net = NetSummary(
            family=family,
            depth=depth,
            results=tuple(results),
            counted=tuple(counted),
            epoch=epoch,
            initial=gradient_profile(run, cells, 0),
            end=gradient_profile(run, cells, epoch) if epoch else None,
            shortcut_profiles=shortcut_profiles(run, cells, epoch or 0),
            comparison=_compare(name, counted, epoch or 0, shallower, limits, by="train"),
            test_comparison=_compare(name, counted, epoch or 0, shallower, limits, by="test"),
            rise=_rise(counted, epoch or 0, limits),
            learning=_learning(counted, epoch or 0, limits),
        )
        nets.append(net)
    source = run.meta.get("data_spec", "")
    meta = {key: short_paths(value.replace(source, short_source(source))) for key, value in run.meta.items()}
    return Summary(run.config, meta, tuple(nets))


def _with_short_names(cells: Sequence[Cell]) -> list[Cell]:
    """Shortens families such as /home/me/net.py:net, unless two would then have the same name."""
    parts = {cell.family: split_target(cell.family) for cell in cells}
    short = {family: f"{short_path(place)}:{call}" if call else family for family, (place, call) in parts.items()}
    if len({*short.values()}) < len(short):
        return [*cells]
    return [replace(cell, family=short[cell.family]) for cell in cells]


@dataclass(frozen=True)
class ComparisonLimits:
    """What the configuration says about comparisons; None if not recorded.

    Attributes:
        earliest: Number of epochs before which networks are not compared.
        steps_per_epoch: Number of steps of an epoch.
        test_images: Number of test images.
    """

    earliest: float
    steps_per_epoch: int | None
    test_images: int | None

    def steps(self, epoch: int) -> int | None:
        """Returns the number of steps of so many epochs."""
        return None if self.steps_per_epoch is None else epoch * self.steps_per_epoch


def comparison_limits(config: Mapping[str, object]) -> ComparisonLimits:
    """Reads from a sweep's configuration what comparisons need."""

    def whole(name: str) -> int | None:
        value = config.get(name)
        return value if isinstance(value, int) and value > 0 else None

    images, batch_size = whole("train_images"), whole("batch_size")
    return ComparisonLimits(
        earliest=max(1.0, EARLIEST_COMPARISON * (whole("epochs") or 0)),
        steps_per_epoch=None if images is None or batch_size is None else images // batch_size,
        test_images=whole("test_images"),
    )


def _errors(results: Sequence[CellResult], epoch: int | None) -> Errors | None:
    rows = [result.epochs[epoch] for result in results if epoch in result.epochs] if epoch is not None else []
    if not rows:
        return None
    train, test = (row.any_train_error_pct for row in rows), (row.test_error_pct for row in rows)
    return Errors(Spread(tuple(train)), Spread(tuple(test)), any(row.is_running for row in rows))


def _errors_at(results: Sequence[CellResult], first: int, second: int) -> tuple[Errors | None, Errors | None]:
    """Returns errors after two epochs that can be compared: running training errors if one epoch has only those."""
    one, other = _errors(results, first), _errors(results, second)
    if one is None or other is None or one.is_running == other.is_running:
        return one, other
    running = [_with_running_errors(results, epoch, errors) for epoch, errors in ((first, one), (second, other))]
    return (one, other) if None in running else (running[0], running[1])


def _with_running_errors(results: Sequence[CellResult], epoch: int, errors: Errors) -> Errors | None:
    values = tuple(result.epochs[epoch].running_error_pct for result in results if epoch in result.epochs)
    return None if any(map(math.isnan, values)) else Errors(Spread(values), errors.test, is_running=True)


def _learning(counted: Sequence[CellResult], epoch: int, limits: ComparisonLimits) -> Learning | None:
    before, now = _errors(counted, 0), _errors(counted, epoch)
    if epoch < limits.earliest or before is None or now is None or math.isnan(now.train.mean):
        return None
    return Learning(epoch, limits.steps(epoch), before.train, now.train, now.train_name)


def _compare(
    name: str,
    counted: Sequence[CellResult],
    epoch: int,
    shallower: Sequence[NetSummary],
    limits: ComparisonLimits,
    by: Literal["train", "test"],
) -> Comparison | None:
    found: list[Comparison] = []
    for net in shallower:
        common = min(epoch, net.epoch or 0)
        ours, theirs = _errors(counted, common), _errors(net.counted, common)
        if common and ours is not None and theirs is not None:
            falls_from = min(common - 1, math.floor((1 - LAST_SHARE) * common))
            comparison = Comparison(
                name=name,
                other=net.name,
                epoch=common,
                earliest=limits.earliest,
                errors=ours,
                other_errors=theirs,
                course=_course(counted, falls_from, common),
                other_course=_course(net.counted, falls_from, common),
                falls_from=falls_from,
                steps=limits.steps(common),
                test_images=limits.test_images,
            )
            found.append(comparison)

    def order(one: Comparison) -> tuple[bool, float]:
        mean = (one.other_errors.train if by == "train" else one.other_errors.test).mean
        return one.epoch < one.earliest, math.inf if math.isnan(mean) else mean

    return min(found, key=order, default=None)


def _course(results: Sequence[CellResult], falls_from: int, epoch: int) -> Course:
    untrained = _errors(results, 0)
    before, now = _errors_at(results, falls_from, epoch)
    return Course(
        untrained_pct=math.nan if untrained is None else untrained.train.mean,
        fall_pct=math.nan if before is None or now is None else before.train.mean - now.train.mean,
    )


def _rise(counted: Sequence[CellResult], epoch: int, limits: ComparisonLimits) -> Rise | None:
    newest = _errors(counted, epoch)
    if epoch < limits.earliest or newest is None:
        return None
    recorded = sorted({k for result in counted for k in result.epochs if k <= epoch})
    measured = [(k, errors) for k in recorded if (errors := _errors(counted, k))]
    finite = [(k, errors) for k, errors in measured if math.isfinite(errors.test.mean)]
    if not finite:
        return None
    lowest_epoch = min(finite, key=lambda one: one[1].test.mean)[0]
    lowest, last = _errors_at(counted, lowest_epoch, epoch)
    return None if lowest is None or last is None else Rise(lowest_epoch, epoch, lowest, last, limits.test_images)
