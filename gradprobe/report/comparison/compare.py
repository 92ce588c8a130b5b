"""Compares two runs: the first step at which they differ, the first at which they differ by more than rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradprobe.errors import ArgumentError
from gradprobe.report.comparison.rounding import Course, Rounding
from gradprobe.report.comparison.sites import BoolArray, Pair, pairs, relative
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import COLUMNS, finish_rows, total_norms
from gradprobe.text import words

PARAMETER_KINDS = ("parameter", "weight", "update")
_FORWARD_KINDS = ("weight", "activation", "junction_y")
_FACTS = ("loss", "skipped", "clip_factor")


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two runs in one step.

    Attributes:
        name: Name of the parameter or module.
        kind: Kind, as in `SiteStats`: "parameter" for a gradient.
        norms: Its norm in both runs, None where there is no tensor.
        size: Relative difference of the norms, infinite if one is missing or not finite.
        statistics: The statistics that differ, of `COLUMNS`, in both runs; empty where there is no tensor.
        mean_size: Difference of the means, relative to the mean magnitude; NaN where there is no tensor.
        is_beyond: Whether it is a gradient that differs by more than rounding.
        is_negligible: Whether it is a gradient that differs so little beside those of its module that nothing follows.
    """

    name: str
    kind: str
    norms: tuple[float | None, float | None]
    size: float
    statistics: Mapping[str, tuple[float, float]]
    mean_size: float = math.nan
    is_beyond: bool = False
    is_negligible: bool = False


@dataclass(frozen=True)
class Parting:
    """A step at which two runs differ.

    Attributes:
        step: Number of the step.
        before: The step before it that both runs have, None if it is the first.
        facts: Loss, skipped or clip_factor in both runs, those that differ.
        loss_size: Relative difference of the losses, NaN if one is missing.
        total_norms: Norm of all gradients that both runs have, in both runs; NaN if there is none or one is NaN.
        differences: The tensors that differ, the largest difference first and negligible ones last.
        n_parameters: Number of parameters with a gradient in one of the runs.
    """

    step: int
    before: int | None
    facts: Mapping[str, tuple[float | bool | None, float | bool | None]]
    loss_size: float
    total_norms: tuple[float, float]
    differences: tuple[Difference, ...]
    n_parameters: int

    def of_kind(self, kind: str) -> list[Difference]:
        """Returns the tensors of one kind that differ."""
        return [one for one in self.differences if one.kind == kind]

    def is_beyond_one_step(self, rounding: Rounding) -> bool:
        """Whether the runs differ by more than one step's rounding.

        Loss, outputs and parameters are not amplified yet, and neither are the gradients next to the loss, so that some
        gradient differs by little. If all gradients are equal, the updates are compared.

        Args:
            rounding: The limits.
        """
        gradients, updates = ([one.size for one in self.of_kind(kind)] for kind in ("parameter", "update"))
        if not gradients and max(updates, default=0.0) > rounding.single:
            return True
        least = min(gradients) if gradients and len(gradients) == self.n_parameters else 0.0
        forward = [one.size for kind in _FORWARD_KINDS for one in self.of_kind(kind)]
        return max(least, *forward, self.loss_size if self.loss_size > 0 else 0.0) > rounding.one_step

    @property
    def by_parameter(self) -> dict[str, dict[str, Difference]]:
        """What differs of each parameter, by kind: its gradient, itself, its update. By difference of the gradients."""
        found: dict[str, dict[str, Difference]] = {}
        for kind in PARAMETER_KINDS:
            for one in self.of_kind(kind):
                found.setdefault(one.name, {})[kind] = one
        return found

    @property
    def at_modules(self) -> list[Difference]:
        """What differs at modules."""
        return [one for one in self.differences if one.kind not in PARAMETER_KINDS]


@dataclass(frozen=True)
class Only:
    """What one run has and the other has not.

    Attributes:
        parameters: Names of parameters.
        modules: Names of observed modules, if both runs observe any.
        kinds: What was recorded: "loss", or kinds of tensors as in `SiteStats`.
    """

    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two runs, compared in the steps that both have.

    Attributes:
        names: What the runs are called.
        recorded: Numbers of the steps that each run has.
        losses: Step and loss of the steps of each run that have a loss.
        course: The differences of the gradients over the T common steps.
        sizes: Relative differences of the norms of the K gradients, NaN where neither run has one. [T, K]
        total_norms: Norms of all gradients that both runs have. [2, T]
        is_different: Whether anything that both runs recorded differs. [T]
        is_beyond: Whether loss or gradients differ by more than rounding. [T]
        first: The first step that differs, None if all are equal.
        first_beyond: The first step that differs by more than rounding, None if none does.
        only: What each run has alone.
        rounding: The limits of rounding.
        compared: Kinds of the tensors that were compared, as in `SiteStats`.
        notes: Remarks, e.g. on gradients that are clipped in one run only.
    """

    names: tuple[str, str]
    recorded: tuple[tuple[int, ...], tuple[int, ...]]
    losses: tuple[list[tuple[int, float]], list[tuple[int, float]]]
    course: Course
    sizes: FloatArray
    total_norms: FloatArray
    is_different: BoolArray
    is_beyond: BoolArray
    first: Parting | None
    first_beyond: Parting | None
    only: tuple[Only, Only]
    rounding: Rounding
    compared: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the steps that both runs have."""
        return self.course.steps

    @property
    def equal(self) -> bool:
        """Whether both runs have the same parameters and all that both recorded is the same."""
        return self.first is None and not any(one.parameters for one in self.only)


def compare(a: Sequence[Snapshot], b: Sequence[Snapshot], names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compares two runs.

    Args:
        a: Steps of one run, in order.
        b: Steps of the other run, in order.
        names: What the runs are called.

    Returns:
        The comparison.

    Raises:
        ArgumentError: The runs have no step in common, or nothing that was recorded in both.
    """
    there = {one.step: one for one in b}
    both = [(one, there[one.step]) for one in a if one.step in there]
    recorded = tuple(one.step for one in a), tuple(one.step for one in b)
    if not both:
        ends = [
            f"{name} {words.steps(run[0], run[-1]) if run else 'no steps'}"
            for name, run in zip(names, recorded, strict=True)
        ]
        raise ArgumentError(f"runs: needed two runs with a step in common, got {', '.join(ends)}")
    ours, theirs = [pair[0] for pair in both], [pair[1] for pair in both]
    only = _only(a, b), _only(b, a)
    joined = _Joined(ours, theirs)
    if not joined.compared and not np.isfinite(joined.course.loss_sizes).any():
        raise ArgumentError("runs: needed two runs with a parameter or a loss in common, got none")
    rounding = Rounding.of(ours, theirs)
    is_beyond = joined.course.beyond(rounding)
    first = None
    different = np.flatnonzero(joined.is_different)
    if len(different):
        place = int(different[0])
        first = _parting(both, joined, place, rounding)
        is_alone = _is_next(recorded, joined.course.steps, place)
        is_beyond[place] |= is_alone and first.is_beyond_one_step(rounding)
    beyond = np.flatnonzero(is_beyond)
    return Comparison(
        names,
        recorded,
        ([(one.step, one.loss) for one in a if one.loss is not None], _losses(b)),
        joined.course,
        joined.sizes,
        joined.total_norms,
        joined.is_different,
        is_beyond,
        first,
        _parting(both, joined, int(beyond[0]), rounding) if len(beyond) else None,
        only,
        rounding,
        joined.compared,
        tuple(_notes(names, ours, theirs)),
    )


class _Joined:
    """The common steps of two runs, stacked.

    Args:
        ours: Steps of one run.
        theirs: The same steps of the other run.
    """

    def __init__(self, ours: Sequence[Snapshot], theirs: Sequence[Snapshot]) -> None:
        shared = {name for one in _tables(theirs) for name in one}
        # The newest step first: its order is that of the model as it is now.
        names = tuple(dict.fromkeys(name for one in reversed(_tables(ours)) for name in one if name in shared))
        place = {name: k for k, name in enumerate(names)}
        n_steps = len(ours)
        norms = np.full((2, n_steps, len(names)), np.nan)
        present = np.zeros((2, n_steps, len(names)), dtype=np.bool_)
        differ = np.zeros((n_steps, len(names)), dtype=np.bool_)
        self.is_different = np.array([bool(_facts(x, y)) for x, y in zip(ours, theirs, strict=True)])
        kinds: dict[str, None] = {}
        first = 0
        for pair in pairs(ours, theirs):
            rows = slice(first, first + len(pair.steps))
            first = rows.stop
            self.is_different[rows] |= ~pair.equal.all(axis=1)
            kinds |= dict.fromkeys(kind for kind, _ in pair.sites)
            here = [k for k, (kind, _) in enumerate(pair.sites) if kind == "parameter"]
            columns = [place[pair.sites[k][1]] for k in here]
            for side, one in enumerate((pair.a, pair.b)):
                norms[side, rows][:, columns] = one.norms[:, here]
                present[side, rows][:, columns] = one.present[:, here]
            differ[rows, columns] = _otherwise(pair, here)
        self.sizes = relative(*norms)
        self.sizes[np.isnan(norms).all(axis=0) & ~differ] = np.nan
        self.total_norms = total_norms(norms, present)
        self.compared = tuple(kinds)
        self.course = Course(
            tuple(one.step for one in ours),
            names,
            norms,
            differ,
            _loss_sizes(ours, theirs),
            relative(*self.total_norms),
            np.array([x.skipped != y.skipped for x, y in zip(ours, theirs, strict=True)]),
        )


def _otherwise(pair: Pair, places: Sequence[int]) -> BoolArray:
    """Returns whether tensors differ in presence, size or count of values that are not finite, shape [T, S]."""
    a, b = pair.a.at(places), pair.b.at(places)
    odd = [finish_rows(one.rows, one.numels, 1.0, ("nonfinite",))["nonfinite"] for one in (a, b)]
    counts = odd[0] != odd[1]
    return np.asarray((a.present != b.present) | (a.present & ((a.numels != b.numels) | counts)))


def _loss_sizes(ours: Sequence[Snapshot], theirs: Sequence[Snapshot]) -> FloatArray:
    """Returns the relative differences of the losses, NaN where one is missing.

    Relative to the median magnitude at least, as losses may cross zero.
    """
    losses = np.array([[one.loss for one in run] for run in (ours, theirs)], dtype=np.float64)  # None becomes NaN
    missing = np.array([[one.loss is None for one in run] for run in (ours, theirs)]).any(axis=0)
    finite = np.abs(losses[np.isfinite(losses)])
    sizes = relative(losses[0], losses[1], float(np.median(finite)) if len(finite) else 0.0)
    return np.where(missing, np.nan, sizes)


def _losses(run: Sequence[Snapshot]) -> list[tuple[int, float]]:
    return [(one.step, one.loss) for one in run if one.loss is not None]


def _facts(x: Snapshot, y: Snapshot) -> dict[str, tuple[float | bool | None, float | bool | None]]:
    found = {}
    for fact in _FACTS:
        ours, theirs = getattr(x, fact), getattr(y, fact)
        is_known = ours is not None and theirs is not None
        if is_known and ours != theirs and not (math.isnan(ours) and math.isnan(theirs)):
            found[fact] = (ours, theirs)
    return found


def _is_next(recorded: Sequence[Sequence[int]], steps: Sequence[int], place: int) -> bool:
    """Whether the runs are known to be equal just before a step: it is the first of both, or no step is left out."""
    if place == 0:
        return all(run[0] == steps[0] for run in recorded)
    return steps[place - 1] == steps[place] - 1


def _parting(both: Sequence[tuple[Snapshot, Snapshot]], joined: _Joined, place: int, rounding: Rounding) -> Parting:
    ours, theirs = both[place]
    (pair,) = pairs([ours], [theirs])
    course = joined.course.at(place)
    beyond, negligible = (
        {name for name, is_so in zip(course.names, found[0], strict=True) if is_so}
        for found in (course.singles(rounding), course.negligible(rounding))
    )
    differences = [
        replace(one, is_beyond=one.name in beyond, is_negligible=one.name in negligible)
        if one.kind == "parameter"
        else one
        for one in (_difference(pair, k) for k in np.flatnonzero(~pair.equal[0]).tolist())
    ]
    here = [k for k, (kind, _) in enumerate(pair.sites) if kind == "parameter"]
    a, b = joined.total_norms[:, place].tolist()
    return Parting(
        ours.step,
        both[place - 1][0].step if place else None,
        _facts(ours, theirs),
        float(joined.course.loss_sizes[place]),
        (a, b),
        tuple(sorted(differences, key=lambda one: (one.is_negligible, -one.size))),
        int((pair.a.present | pair.b.present)[0, here].sum()),
    )


def _difference(pair: Pair, place: int) -> Difference:
    kind, name = pair.sites[place]
    x, y = (one.stats(0, place) for one in (pair.a, pair.b))
    statistics, mean_size = {}, math.nan
    if x is not None and y is not None:
        values = {column: (float(getattr(x, column)), float(getattr(y, column))) for column in COLUMNS}
        statistics = {column: (a, b) for column, (a, b) in values.items() if a != b and not (a != a and b != b)}
        mean_size = relative(np.array(x.mean), np.array(y.mean), max(x.abs_mean, y.abs_mean)).item()
    norms = None if x is None else x.norm, None if y is None else y.norm
    size = float(pair.sizes[0, place]) if None not in norms else math.inf
    return Difference(name, kind, norms, size, statistics, mean_size)


def _tables(run: Sequence[Snapshot]) -> list[tuple[str, ...]]:
    return list({id(one.table): one.table.names for one in run}.values())


def _modules(run: Sequence[Snapshot]) -> list[str]:
    tables = {id(one.signals.table): one.signals.table for one in run if one.signals is not None}
    return list(dict.fromkeys(name for table in tables.values() for name in (*table.activations, *table.junctions)))


def _kinds(run: Sequence[Snapshot]) -> Iterator[str]:
    if any(one.loss is not None for one in run):
        yield "loss"
    if any(one.parameter_updates is not None for one in run):
        yield "update"
    tables = {id(one.signals.table): one.signals.table for one in run if one.signals is not None}.values()
    if any(table.activations for table in tables):
        yield "activation"
    if any(table.junctions for table in tables):
        yield "junction_x"


def _only(run: Sequence[Snapshot], other: Sequence[Snapshot]) -> Only:
    names = dict.fromkeys(name for table in _tables(run) for name in table)
    theirs = {name for table in _tables(other) for name in table}
    modules, others = _modules(run), set(_modules(other))
    kinds = set(_kinds(other))
    return Only(
        tuple(name for name in names if name not in theirs),
        tuple(name for name in modules if name not in others) if others else (),
        tuple(kind for kind in _kinds(run) if kind not in kinds),
    )


def _notes(names: tuple[str, str], ours: Sequence[Snapshot], theirs: Sequence[Snapshot]) -> Iterator[str]:
    for field, what in (("reduction", "over ranks"), ("state", "as measured"), ("scale", "by the loss scale")):
        for x, y in zip(ours, theirs, strict=True):
            a, b = getattr(x.provenance, field), getattr(y.provenance, field)
            if a != b:
                yield f"from step {x.step} on, gradients are {a} in {names[0]} and {b} in {names[1]} ({what})"
                break
