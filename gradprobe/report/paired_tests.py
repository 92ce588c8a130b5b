"""Tests training errors over seeds in pairs of one seed each: deep against shallow, families against plain ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from gradprobe.report.error_comparison import SLOW_START_STEPS, TRAINED_SHARE
from gradprobe.report.seed_statistics import MARGIN
from gradprobe.report.summary import NetSummary, Summary, comparison_limits

SIGNIFICANT = 0.05
"""Largest p value of a difference that is claimed."""

# Standard deviation of equal differences of percentages, but for rounding.
_ROUNDING = 1e-9

# Families that others are compared with: their network without residual adds.
_BASELINE, _BASELINE_OF_TRANSFORMERS = "plain", "transformer-plain"


@dataclass(frozen=True)
class PairedTest:
    """Student's paired t-test, two-sided: whether the mean of differences, one per seed, differs from 0.

    Attributes:
        differences: Two or more finite differences, in percentage points.

    Source:
        Student, "The probable error of a mean", Biometrika 6, 1908; Cohen, "Statistical Power Analysis for the
        Behavioral Sciences", 1988, section 2.3.5, for the effect size.

    >>> test = PairedTest((66.0, 65.5, 68.0))
    >>> [round(value, 4) for value in (test.mean, *test.interval, test.p_value, test.effect)]
    [66.5, 63.2138, 69.7862, 0.0001, 50.2693]
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean difference."""
        half = float(stdtrit(self._degrees, 0.975)) * self._standard_error
        return self.mean - half, self.mean + half

    @property
    def p_value(self) -> float:
        """Probability of such a mean or a larger one, in either direction, if seeds were the only cause."""
        if self._standard_error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return 2 * float(stdtr(self._degrees, -abs(self.mean) / self._standard_error))

    @property
    def effect(self) -> float:
        """Effect size d: the mean in units of the differences' standard deviation; infinite if they are all equal."""
        if self.mean == 0:
            return 0.0
        return self.mean / self._spread if self._spread else math.copysign(math.inf, self.mean)

    @property
    def _degrees(self) -> int:
        return len(self.differences) - 1

    @property
    def _spread(self) -> float:
        spread = statistics.stdev(self.differences)
        return spread if spread > _ROUNDING else 0.0

    @property
    def _standard_error(self) -> float:
        return self._spread / math.sqrt(len(self.differences))


@dataclass(frozen=True)
class Contrast:
    """Training errors of two networks after the same epoch.

    Attributes:
        name: Name of the network.
        other: Name of the one that it is compared with.
        by_depth: Whether the other is a shallower one of its family, rather than one of another family.
        epoch: The epoch.
        seeds: The seeds that both have.
        early: Why it is too early to compare them; empty if it is not.
        is_running: Whether the errors are running training errors, the only ones that both networks have.
        test: The test of the errors of the network minus those of the other; None with less than two seeds or if an
            error is not finite.
    """

    name: str
    other: str
    by_depth: bool
    epoch: int
    seeds: tuple[int, ...]
    early: str
    is_running: bool
    test: PairedTest | None


def contrasts(summary: Summary) -> list[Contrast]:
    """Lists every network against the shallower one that trains best, and every family against its plain one."""
    return [*_by_depth(summary), *_by_family(summary)]


def opening(summary: Summary, shown: Callable[[str], str] = str) -> str:
    """Returns the sentence that opens a report: whether depth makes training worse, and residual networks do.

    It is about the deepest network of each family; ``shown`` prepares names. Empty if there is nothing to compare.
    """
    deepest: dict[tuple[str, bool], Contrast] = {}
    for one in contrasts(summary):
        deepest[one.name.rpartition("-")[0], one.by_depth] = one
    found = list(deepest.values())
    if not found:
        return ""
    if all(len(one.seeds) < 2 and not one.early for one in found):
        return "One seed: no claim about depth or shortcuts."
    text = "; ".join(_clause(one, shown) for one in found)
    return f"After epoch {found[0].epoch}, {text}." if len({one.epoch for one in found}) == 1 else f"So far, {text}."


def numbers(test: PairedTest) -> str:
    """Formats the result of a test.

    >>> numbers(PairedTest((66.0, 65.5, 68.0)))
    '+66.5 points, 95 % interval +63.2 to +69.8, p < 0.001, d = 50.3, 3 seeds'
    """
    low, high = test.interval
    d = f"d = {test.effect:.1f}" if math.isfinite(test.effect) else "no spread"
    return (
        f"{test.mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, {p_text(test.p_value)}, {d}, "
        f"{len(test.differences)} seeds"
    )


def p_text(p_value: float) -> str:
    """Formats a p value: ``p = 0.012``, or ``p < 0.001``."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _clause(one: Contrast, shown: Callable[[str], str]) -> str:
    name, other = shown(one.name), shown(one.other)
    if one.early:
        return f"it is too early to compare {name} with {other} ({one.early})"
    if len(one.seeds) < 2:
        return f"one seed makes no claim about {name} and {other}"
    if one.test is None:
        return f"the training errors of {name} and {other} cannot be compared, as some are not finite"
    if one.test.p_value > SIGNIFICANT:
        verb = "does not train significantly differently from"
    else:
        slightly = "slightly " if abs(one.test.mean) < MARGIN else ""
        verb = f"trains {slightly}{'worse' if one.test.mean > 0 else 'better'} than"
    running = "running " if one.is_running else ""
    return f"{name} {verb} {other} ({running}training error {numbers(one.test)})"


def _by_depth(summary: Summary) -> Iterator[Contrast]:
    nets = {net.name: net for net in summary.nets}
    for net in summary.nets:
        comparison = net.comparison
        if comparison is None:
            continue
        early = "" if comparison.prematurity is None else _progress(comparison.steps, comparison.epoch)
        yield _contrast(net, nets[comparison.other], comparison.epoch, early, by_depth=True)


def _by_family(summary: Summary) -> Iterator[Contrast]:
    nets = {(net.family, net.depth): net for net in summary.nets}
    limits = comparison_limits(summary.config)
    for net in summary.nets:
        baseline = _BASELINE_OF_TRANSFORMERS if net.family.startswith("transformer-") else _BASELINE
        other = nets.get((baseline, net.depth))
        epoch = 0 if other is None else min(net.epoch or 0, other.epoch or 0)
        if net.family == baseline or other is None or epoch == 0:
            continue
        steps = limits.steps(epoch)
        is_slow = steps is not None and steps < SLOW_START_STEPS and any(_untrained(one, epoch) for one in (net, other))
        is_early = is_slow or epoch < limits.earliest
        yield _contrast(net, other, epoch, _progress(steps, epoch) if is_early else "", by_depth=False)


def _untrained(net: NetSummary, epoch: int) -> bool:
    errors = [
        [one.epochs[at].any_train_error_pct for one in net.counted if at in one.epochs] or [math.nan]
        for at in (0, epoch)
    ]
    return statistics.fmean(errors[1]) > TRAINED_SHARE * statistics.fmean(errors[0])


def _progress(steps: int | None, epoch: int) -> str:
    return f"{steps} steps" if steps is not None else f"epoch {epoch}"


def _contrast(net: NetSummary, other: NetSummary, epoch: int, early: str, *, by_depth: bool) -> Contrast:
    ours, theirs = (
        {one.cell.seed: one.epochs[epoch] for one in side.counted if epoch in one.epochs} for side in (net, other)
    )
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    is_running = any(side[seed].is_running for side in (ours, theirs) for seed in seeds)
    column = "running_error_pct" if is_running else "train_error_pct"
    differences = tuple(getattr(ours[seed], column) - getattr(theirs[seed], column) for seed in seeds)
    is_whole = len(seeds) > 1 and all(map(math.isfinite, differences))
    test = PairedTest(differences) if is_whole else None
    return Contrast(net.name, other.name, by_depth, epoch, seeds, early, is_running, test)
