"""What a sweep says so far: per network the errors over seeds, the gradient over depth and a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gradprobe.diagnosis.depth import flow_verdict
from gradprobe.report.comparison import Comparison, Errors, Learning, Rise
from gradprobe.report.records import Cell, EpochRow, JunctionRow, LayerRow, SweepRun
from gradprobe.report.spread import Spread, median

DONE = "done"
"""The status of a cell that has run all its epochs."""

DIVERGED = "diverged"
"""The status of a cell that stopped because its training loss became non-finite."""

DEGRADED = "degraded optimisation"
"""The verdict on a net with sound gradients and a training error clearly above that of a shallower net."""

OVERFITTING = "overfitting"
"""The verdict on a net with sound gradients whose test error alone is clearly too high."""

NOT_LEARNING = "not learning"
"""The verdict on a net with sound gradients whose training error has not clearly fallen, with none to compare."""

EARLIEST_COMPARISON = 0.3
"""Share of the planned epochs before which errors are not compared; AUTOTRAINER waits as long."""

# From the mildest to the worst, for seeds that disagree in equal numbers.
_SEVERITY = ("healthy", "vanishing", "exploding", "non-finite")


@dataclass(frozen=True)
class Moment:
    """The gradient over depth at one epoch; epoch 0 is the first step.

    Attributes:
        epoch: The epoch.
        profiles: Per seed, the weight layers in depth order.
        votes: Number of seeds by their flow verdict.
    """

    epoch: int
    profiles: tuple[tuple[LayerRow, ...], ...]
    votes: Mapping[str, int]

    @property
    def verdict(self) -> str:
        """The most frequent verdict over seeds; of equally frequent ones the worst."""
        return max(self.votes, key=lambda word: (self.votes[word], _SEVERITY.index(word)))

    @property
    def first(self) -> float:
        """Median over seeds of the L2 norm at the first weight layer."""
        return median([rows[0].norm_l2 for rows in self.profiles])

    @property
    def last(self) -> float:
        """Median over seeds of the L2 norm at the last weight layer."""
        return median([rows[-1].norm_l2 for rows in self.profiles])

    @property
    def ratio(self) -> float:
        """First / last; NaN where it has no meaning, infinite where only the last is zero."""
        if self.last == 0:
            return math.inf if self.first > 0 else math.nan
        return self.first / self.last

    @property
    def when(self) -> str:
        """The moment in words."""
        return "the first step" if self.epoch == 0 else f"epoch {self.epoch}"


@dataclass(frozen=True)
class Sharing:
    """The gradient's two parts at every residual junction, in the first step after so many epochs.

    Attributes:
        epoch: The epochs done.
        profiles: Per seed, the junctions in depth order.
    """

    epoch: int
    profiles: tuple[tuple[JunctionRow, ...], ...]

    @property
    def shares(self) -> dict[str, float]:
        """Of each junction by name, the median over seeds of the shortcut's share.

        NaN where there is nothing to compare: behind a shortcut that changes the shape, and where a part is not finite.
        """
        return {rows[0].site: median([row.shortcut_share for row in rows]) for rows in zip(*self.profiles, strict=True)}

    @property
    def when(self) -> str:
        """The moment in words."""
        return "at the first step" if self.epoch == 0 else f"after epoch {self.epoch}"


@dataclass(frozen=True)
class CellResult:
    """One cell and its epochs by number."""

    cell: Cell
    epochs: Mapping[int, EpochRow]

    @property
    def done(self) -> bool:
        """Whether it has run all its epochs."""
        return self.cell.status == DONE

    @property
    def diverged(self) -> bool:
        """Whether it stopped at a non-finite training loss."""
        return self.cell.status == DIVERGED


@dataclass(frozen=True)
class NetSummary:
    """All that a report says of one family at one depth.

    Attributes:
        family: Name of the family.
        depth: Depth in weight layers, as the family counts them.
        results: Every planned cell, whatever its state.
        counted: The cells behind the numbers: those that are done or, while none is, those that have begun.
        epoch: The newest epoch that all counted cells have; None while none has begun.
        initial: Gradient over depth at the first step, None where not recorded.
        end: The same at `epoch`, None where not recorded or `epoch` is 0.
        sharings: The residual junctions at the first step, in the middle and at the end, as far as recorded.
        comparison: With the shallower net of the family that has the lowest training error, None where there is none or
            it is too early.
        test_comparison: The same with the one that has the lowest test error.
        rise: From the epoch of its own lowest test error, None where there is none or it is too early.
        learning: From before the first step, None where that is not recorded or it is too early.
    """

    family: str
    depth: int
    results: tuple[CellResult, ...]
    counted: tuple[CellResult, ...]
    epoch: int | None
    initial: Moment | None
    end: Moment | None
    sharings: tuple[Sharing, ...]
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
    def progress(self) -> str:
        """How far the seeds are: "3" when all are done, "1 of 3", "0 of 3, epoch 7", "2 of 3, 1 diverged"."""
        if self.n_done == len(self.results):
            return str(self.n_done)
        text = f"{self.n_done} of {len(self.results)}"
        if self.n_diverged:
            text += f", {self.n_diverged} diverged"
        elif self.epoch is None:
            text += ", not started"
        elif self.n_done == 0:
            text += f", epoch {self.epoch}"
        return text

    @property
    def train_error_pct(self) -> Spread | None:
        """Training error at `epoch` over the counted seeds."""
        errors = _errors(self.counted, self.epoch)
        return None if errors is None else errors.train

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
    def verdict_moment(self) -> Moment | None:
        """Where the verdict is taken: the newest moment with a recorded gradient, the first step if that has turned."""
        return self.initial if self.has_turned else self.end or self.initial

    @property
    def has_turned(self) -> bool:
        """Whether the gradient explodes at the first step and vanishes at `epoch`.

        Exploding is then what went wrong: steps along such a gradient can leave a net whose gradient vanishes. Two of
        six seeds of plain-56 on the digits do so at a rate of 0.1, and neither does at 0.01. The rule is ours.
        """
        moments = [moment.verdict for moment in (self.initial, self.end) if moment is not None]
        return moments == ["exploding", "vanishing"]

    @property
    def verdict(self) -> str | None:
        """The verdict so far: that on the gradient, or one on the errors; None while nothing is recorded.

        A net most of whose seeds diverged is non-finite. An unsound gradient names itself. Only with sound gradients is
        a training error above the shallower net's called degraded optimisation: He et al. 2015, section 4.1, keep the
        two apart. Only without that is a test error that is too high called overfitting: "such degradation is not
        caused by overfitting" (section 1), as the training error shows.
        """
        if 2 * self.n_diverged > len(self.results):
            return "non-finite"
        flow = self.verdict_moment.verdict if self.verdict_moment else None
        if flow != "healthy":
            return flow
        if self.comparison is not None and self.comparison.clearly_above:
            return DEGRADED
        if self.learning is not None and not self.learning.is_seen:
            return NOT_LEARNING
        overfits = any(seen is not None and seen.overfits for seen in (self.test_comparison, self.rise))
        return OVERFITTING if overfits else flow


@dataclass(frozen=True)
class Summary:
    """A sweep's nets in order of family (as first met) and depth, with what the file says of itself."""

    config: Mapping[str, object]
    meta: Mapping[str, str]
    nets: tuple[NetSummary, ...]

    @property
    def families(self) -> tuple[str, ...]:
        """Families in order."""
        return tuple(dict.fromkeys(net.family for net in self.nets))

    @property
    def cells_finished(self) -> int:
        """Number of cells with nothing left to run."""
        return sum(result.done or result.diverged for net in self.nets for result in net.results)

    @property
    def cells_planned(self) -> int:
        """Number of all cells."""
        return sum(len(net.results) for net in self.nets)


def summarise(run: SweepRun) -> Summary:
    """Reads a run once and draws its conclusions.

    Args:
        run: The recorded sweep; unfinished cells, missing layers and non-finite values are all allowed.

    Returns:
        The summary that the terminal, the page, the charts and the exports share.
    """
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for cell in run.cells():
        epochs = {row.epoch: row for row in run.epochs(cell.id)}
        groups.setdefault((cell.family, cell.depth), []).append(CellResult(cell, epochs))
    families = list(dict.fromkeys(family for family, _ in groups))
    planned = run.config.get("epochs")
    earliest = max(1.0, EARLIEST_COMPARISON * planned if isinstance(planned, int) else 0.0)
    recorded = run.config.get("test_images")
    test_images = recorded if isinstance(recorded, int) else None
    nets: list[NetSummary] = []
    for family, depth in sorted(groups, key=lambda key: (families.index(key[0]), key[1])):
        results = groups[family, depth]
        begun = [result for result in results if result.epochs]
        counted = [result for result in begun if result.done] or begun
        epoch = min((max(result.epochs) for result in counted), default=None)
        shallower = [net for net in nets if net.family == family]
        net = NetSummary(
            family=family,
            depth=depth,
            results=tuple(results),
            counted=tuple(counted),
            epoch=epoch,
            initial=_moment(run, counted, 0),
            end=_moment(run, counted, epoch) if epoch else None,
            sharings=_sharings(run, counted, epoch or 0),
            comparison=_compare(counted, epoch or 0, shallower, earliest, test_images, by="train"),
            test_comparison=_compare(counted, epoch or 0, shallower, earliest, test_images, by="test"),
            rise=_rise(counted, epoch or 0, earliest, test_images),
            learning=_learning(counted, epoch or 0, earliest),
        )
        nets.append(net)
    return Summary(run.config, run.meta, tuple(nets))


def _errors(results: Sequence[CellResult], epoch: int | None) -> Errors | None:
    rows = [result.epochs[epoch] for result in results if epoch in result.epochs] if epoch is not None else []
    if not rows:
        return None
    train, test = (row.train_error_pct for row in rows), (row.test_error_pct for row in rows)
    return Errors(Spread(tuple(train)), Spread(tuple(test)))


def _learning(counted: Sequence[CellResult], epoch: int, earliest: float) -> Learning | None:
    before, now = _errors(counted, 0), _errors(counted, epoch)
    if epoch < earliest or before is None or now is None or math.isnan(now.train.mean):
        return None
    return Learning(epoch, before.train, now.train)


def _moment(run: SweepRun, counted: Sequence[CellResult], epoch: int) -> Moment | None:
    recorded = (run.layers(result.cell.id, epoch) for result in counted)
    profiles = tuple(tuple(sorted(rows, key=lambda row: row.position)) for rows in recorded if rows)
    if not profiles:
        return None
    return Moment(epoch, profiles, Counter(map(_flow, profiles)))


def _sharings(run: SweepRun, counted: Sequence[CellResult], epoch: int) -> tuple[Sharing, ...]:
    sharings = []
    # After the last epoch there is no further step.
    for done in sorted({0, epoch // 2, epoch - 1}) if epoch else ():
        recorded = (run.junctions(result.cell.id, done) for result in counted)
        profiles = tuple(tuple(sorted(rows, key=lambda row: row.position)) for rows in recorded if rows)
        if profiles:
            sharings.append(Sharing(done, profiles))
    return tuple(sharings)


def _flow(rows: Sequence[LayerRow]) -> str:
    # A median over an epoch's steps may be finite although some step was not; the count remembers it.
    return "non-finite" if any(row.nonfinite for row in rows) else flow_verdict([row.norm_l2 for row in rows])


def _compare(
    counted: Sequence[CellResult],
    epoch: int,
    shallower: Sequence[NetSummary],
    earliest: float,
    test_images: int | None,
    by: Literal["train", "test"],
) -> Comparison | None:
    found: list[Comparison] = []
    for net in shallower:
        common = min(epoch, net.epoch or 0)
        ours, theirs = _errors(counted, common), _errors(net.counted, common)
        if common >= earliest and ours is not None and theirs is not None:
            found.append(Comparison(net.name, common, ours, theirs, test_images))

    def error(one: Comparison) -> float:
        mean = (one.other_errors.train if by == "train" else one.other_errors.test).mean
        return math.inf if math.isnan(mean) else mean

    return min(found, key=error, default=None)


def _rise(counted: Sequence[CellResult], epoch: int, earliest: float, test_images: int | None) -> Rise | None:
    newest = _errors(counted, epoch)
    if epoch < earliest or newest is None:
        return None
    measured = [(k, errors) for k in range(epoch + 1) if (errors := _errors(counted, k))]
    finite = [(k, errors) for k, errors in measured if math.isfinite(errors.test.mean)]
    if not finite:
        return None
    lowest_epoch, lowest = min(finite, key=lambda one: one[1].test.mean)
    return Rise(lowest_epoch, epoch, lowest, newest, test_images)
