"""The sentences of a report: each network's verdict with its evidence, and what the whole sweep shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from gradprobe.errors import printable
from gradprobe.report.error_comparison import EARLIEST_COMPARISON, SLOW_START_STEPS, Comparison, Learning, Rise
from gradprobe.report.formatting import percent, short_paths
from gradprobe.report.profiles import GradientProfile
from gradprobe.report.summary import (
    DEGRADED,
    NOT_LEARNING,
    OVERFITTING,
    TOO_EARLY,
    NetSummary,
    Summary,
)
from gradprobe.text.words import number

REASON_WIDTH = 300
"""Longest reason of a failure that is shown in full, in characters."""

_RESIDUAL_FAMILIES = ("resnet",)

_FLOW_WORDS = {
    "healthy": "are healthy",
    "vanishing": "vanish towards the input",
    "exploding": "explode towards the input",
    "non-finite": "contain NaN or infinite values",
}


def explain_verdict(net: NetSummary, shown: Callable[[str], str] = str) -> str:
    """Returns the evidence for a network's verdict, in sentences; ``shown`` prepares names."""
    if net.epoch is None:
        return " ".join(_failures(net) or ["Not started."])
    parts = _flow_sentences(net)
    if net.exploded_then_vanished:
        parts.append(
            "The explosion is the cause: steps along such gradients can leave a network whose gradients vanish. A run "
            "with a lower initial learning rate would show whether this is so."
        )
    if net.n_diverged:
        seeds = f"{net.n_diverged} of {len(net.results)} seeds" if len(net.results) > 1 else "its only seed"
        parts.append(f"The training loss of {seeds} became NaN or infinite, and training stopped there.")
    if net.comparison is not None:
        parts.append(_comparison_sentence(net, net.comparison, shown))
    if net.verdict == NOT_LEARNING or (net.verdict == TOO_EARLY and net.comparison is None):
        parts += _learning_sentences(net.learning)
    if net.verdict == OVERFITTING:
        parts += _overfitting_sentences(net.test_comparison, net.rise, shown)
    if not net.finished:
        parts.append(f"Not finished: {net.progress}.")
    return " ".join([*parts, *_failures(net)])


def _failures(net: NetSummary) -> list[str]:
    reasons = {cell.seed: printable(short_paths(cell.failure), REASON_WIDTH).rstrip(".") for cell in net.failed}
    return [f"Seed {seed} failed: {reason}." for seed, reason in reasons.items()]


def headline(summary: Summary, shown: Callable[[str], str] = str) -> list[str]:
    """States what the sweep shows, one sentence per family with two or more depths, and a note if it is one seed.

    ``shown`` prepares names.
    """
    sentences: list[str] = []
    of_one_seed = False
    for family in summary.families:
        compared = [
            (net, net.comparison) for net in summary.nets if net.family == family and net.comparison is not None
        ]
        worse = [one for one in compared if one[1].outcome == "clearly above"]
        undecided = [one for one in compared if one[1].outcome == "needs more seeds"]
        overfitting = [
            (net, net.test_comparison)
            for net, _ in compared
            if net.verdict == OVERFITTING and net.test_comparison is not None and net.test_comparison.overfits
        ]
        if worse or undecided or (compared and not overfitting):
            net, comparison = (worse or undecided or compared)[-1]
            ours, theirs = comparison.errors, comparison.other_errors
            sentences.append(
                f"{_headline_start(comparison, shown(family))}: after epoch {comparison.epoch} the {ours.train_name} "
                f"is {percent(ours.train)} % for {shown(net.name)} and {percent(theirs.train)} % for "
                f"{shown(comparison.other)}."
            )
            of_one_seed |= comparison.has_one_seed and comparison.outcome != "too early"
        if overfitting:
            net, comparison = overfitting[-1]
            ours, theirs = comparison.errors, comparison.other_errors
            sentences.append(
                f"{_start(comparison, 'depth leads to overfitting')} for {shown(family)}: after epoch "
                f"{comparison.epoch} the test error is {percent(ours.test)} % for {shown(net.name)} and "
                f"{percent(theirs.test)} % for {shown(comparison.other)}, and the {ours.train_name} "
                f"{percent(ours.train)} and {percent(theirs.train)} %."
            )
            of_one_seed |= comparison.has_one_seed
    if of_one_seed:
        sentences.append(
            "One seed shows only this run: train more, e.g. with --seeds 0,1,2, before you conclude anything about the "
            "architecture."
        )
    return sentences


def _headline_start(comparison: Comparison, family: str) -> str:
    if comparison.outcome == "too early":
        return f"It is too early to tell whether depth harms {family}"
    if comparison.outcome == "needs more seeds":
        return f"One seed cannot tell whether depth harms {family}"
    worse = "worse" if comparison.outcome == "clearly above" else "not clearly worse"
    return f"{_start(comparison, f'deeper is {worse}')} for {family}"


def _start(comparison: Comparison, claim: str) -> str:
    return f"In this run {claim}" if comparison.has_one_seed else claim.capitalize()


def zero_start_sentences(summary: Summary, shown: Callable[[str], str] = str) -> list[str]:
    """Explains a first step in which only the last weight layer has a gradient; ``shown`` prepares names."""
    names = [shown(net.name) for net in summary.nets if net.initial is not None and net.initial.only_last]
    if not names:
        return []
    return [
        f"At the first step only the last weight layer of {_listed(names)} has a gradient, as where that layer starts "
        "at zero (Fixup): until its first update it lets none through."
    ]


def shortcut_sentences(summary: Summary, shown: Callable[[str], str] = str) -> list[str]:
    """States the shortcuts' share of the gradient, for each residual network and over depth, as far as recorded.

    ``shown`` prepares names.
    """
    sentences = [sentence for net in summary.nets if (sentence := _shortcut_sentence(net, shown))]
    for family in summary.families:
        members = [net for net in summary.nets if net.family == family]
        newest = {net.name: list(medians.items())[-1] for net in members if (medians := _median_shares(net))}
        epochs = {when for when, _ in newest.values()}
        if len(newest) > 1 and len(epochs) == 1:
            printed = {name: f"{100 * share:.0f}" for name, (_, share) in newest.items()}
            by_net = _listed([f"{share} % in {shown(name)}" for name, share in printed.items()])
            changes = {int(deeper) - int(shallower) for shallower, deeper in pairwise(printed.values())}
            grows = "grows" if min(changes) > 0 else "does not change" if changes == {0} else "does not always grow"
            sentences.append(f"{epochs.pop().capitalize()} the share {grows} with depth: {by_net}.")
    without = [
        shown(net.name)
        for net in summary.nets
        if net.family in _RESIDUAL_FAMILIES and net.epoch and not net.shortcut_profiles
    ]
    if without:
        sentences.append(f"No residual adds are recorded for {_listed(without)}; files of older versions have none.")
    return sentences


def _finite_shares(net: NetSummary) -> list[tuple[str, dict[str, float]]]:
    """Lists the epochs at which a network has residual adds with two parts, each with their shares by name."""
    epochs = [
        (profile.when, {site: share for site, share in profile.shares.items() if math.isfinite(share)})
        for profile in net.shortcut_profiles
    ]
    return [(when, shares) for when, shares in epochs if shares]


def _median_shares(net: NetSummary) -> dict[str, float]:
    """Computes the median share over the residual adds, by epoch."""
    return {when: statistics.median(shares.values()) for when, shares in _finite_shares(net)}


def _shortcut_sentence(net: NetSummary, shown: Callable[[str], str]) -> str:
    medians = _median_shares(net)
    if not medians:
        return ""
    by_epoch = _listed([f"{100 * share:.0f} % {when}" for when, share in medians.items()])
    more = [when for when, share in medians.items() if share > 0.5]
    compared = "more than the branch's" if more else "no more than the branch's"
    if 0 < len(more) < len(medians):
        compared += f" only {_listed(more)}"
    drawn = _finite_shares(net)
    lowest, site, when = min((share, site, when) for when, shares in drawn for site, share in shares.items())
    n_adds = len(drawn[0][1])
    return (
        f"In {shown(net.name)} the shortcut's share of the gradient is {by_epoch}, {compared} (median over {n_adds} "
        f"residual add{'s' if n_adds > 1 else ''}; the lowest is {100 * lowest:.0f} %, at {shown(site)} {when})."
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _flow_sentences(net: NetSummary) -> list[str]:
    profiles = [profile for profile in (net.initial, net.end) if profile is not None]
    if not profiles:
        return ["No gradient is recorded."]
    start, *later = profiles
    norms = f"norm {number(start.first)} in the first weight layer, {number(start.last)} in the last"
    text = f"Gradients {_flow(start)} at {start.when} ({norms})"
    for end in later:
        change = "" if _flow(end) == _flow(start) else f"{_flow(end)} "
        text += f" and {change}at {end.when} ({number(end.first)} and {number(end.last)})"
    return [f"{text}."]


def _flow(profile: GradientProfile) -> str:
    seeds = sum(profile.verdict_counts.values())
    agreeing = profile.verdict_counts[profile.verdict]
    return _FLOW_WORDS[profile.verdict] + ("" if agreeing == seeds else f" in {agreeing} of {seeds} seeds")


def _learning_sentences(learning: Learning | None) -> list[str]:
    if learning is None:
        return []
    before, now = percent(learning.before), percent(learning.now)
    meaning = f"the network {_slow_start(learning.steps)}" if learning.may_be_slow else "the network has not learned"
    return [
        f"After epoch {learning.epoch} the {learning.train_name}, {now} %, is not clearly below its value before the "
        f"first step, {before} %: {meaning}."
    ]


def _slow_start(steps: int | None) -> str:
    return (
        f"has taken {steps} steps, and deep networks that train well can take {SLOW_START_STEPS} before they begin to"
    )


def _comparison_sentence(net: NetSummary, comparison: Comparison, shown: Callable[[str], str]) -> str:
    ours = f"{comparison.errors.train_name}, {percent(comparison.errors.train)} %,"
    other = f"that of {shown(comparison.other)}, {percent(comparison.other_errors.train)} %"
    if comparison.prematurity:
        return (
            f"After epoch {comparison.epoch} it is too early to compare the {ours} with {other}: "
            f"{_prematurity_reason(comparison, shown)}."
        )
    text = f"After epoch {comparison.epoch} the {ours} is"
    if comparison.outcome == "not clearly above":
        return f"{text} not clearly above {other}."
    if comparison.outcome == "needs more seeds":
        return f"{text} above {other}, but one seed cannot tell whether depth or the seed is the reason."
    text = f"{text} clearly above {other}"
    if net.verdict != DEGRADED:
        return f"{text}; since the gradients are not healthy, this is not called degraded optimisation."
    if not any(profile and "vanishing" in profile.verdict_counts for profile in (net.initial, net.end)):
        who = "in this run, of one seed, the deeper network was" if comparison.has_one_seed else "the deeper network is"
        text += f": {who} harder to optimise, and its gradients do not vanish"
    return f"{text}."


def _prematurity_reason(comparison: Comparison, shown: Callable[[str], str]) -> str:
    name, other = shown(comparison.name), shown(comparison.other)
    if comparison.prematurity == "few epochs":
        return f"less than {100 * EARLIEST_COMPARISON:g} % of the planned epochs are done"
    if comparison.prematurity == "shallower untrained":
        untrained = f"{comparison.other_course.untrained_pct:.1f} %"
        return f"that of {other} has not yet fallen to half of its value before the first step, {untrained}"
    if comparison.prematurity == "slow start":
        return f"{name} {_slow_start(comparison.steps)}"
    falls = ((comparison.course.fall_pct, name), (comparison.other_course.fall_pct, other))
    fall, falling = max(one for one in falls if not math.isnan(one[0]))
    return (
        f"since epoch {comparison.falls_from} that of {falling} has fallen by {fall:.1f} points, and the two differ by "
        f"{comparison.difference_pct:.1f}"
    )


def _overfitting_sentences(comparison: Comparison | None, rise: Rise | None, shown: Callable[[str], str]) -> list[str]:
    sentences = []
    if comparison is not None and comparison.overfits:
        ours, theirs = comparison.errors, comparison.other_errors
        sentences.append(
            f"After epoch {comparison.epoch} the test error, {percent(ours.test)} %, is clearly above that of "
            f"{shown(comparison.other)}, {percent(theirs.test)} %, and exceeds the {ours.train_name} by more, "
            f"{percent(ours.gap)} points against {percent(theirs.gap)}: the deeper network overfits."
        )
    if rise is not None and rise.overfits:
        then, now = rise.lowest, rise.errors
        sentences.append(
            f"From epoch {rise.lowest_epoch} to epoch {rise.epoch} the test error rose from {percent(then.test)} to "
            f"{percent(now.test)} % while the {now.train_name} fell from {percent(then.train)} to "
            f"{percent(now.train)} %: the network overfits."
        )
    return sentences
