"""The report in words: numbers as text, and each net's verdict with the evidence for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from gradprobe.report.comparison import Comparison, Rise
from gradprobe.report.spread import Spread
from gradprobe.report.summary import DEGRADED, NOT_LEARNING, OVERFITTING, Moment, NetSummary, Summary

_RESIDUAL_FAMILIES = ("resnet",)

_FLOW_WORDS = {
    "healthy": "are sound",
    "vanishing": "vanish towards the input",
    "exploding": "explode towards the input",
    "non-finite": "hold NaN or infinite values",
}


def number(value: float) -> str:
    """Three significant digits, or two and an exponent outside [0.001, 100000).

    >>> number(449.7), number(2.13e-6), number(0.0), number(1.0), number(float("nan"))
    ('450', '2.1e-6', '0', '1.00', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 99_999.5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{digits}f}"


def percent(spread: Spread | None) -> str:
    """Mean and standard deviation of an error in percent, without the sign; a dash while nothing is recorded.

    >>> percent(Spread((1.0, 2.0, 3.0))), percent(Spread((67.04,))), percent(None)
    ('2.0 ± 1.0', '67.0', '–')
    """
    if spread is None:
        return "–"
    mean = "NaN" if math.isnan(spread.mean) else f"{spread.mean:.1f}"
    return mean if spread.std is None or math.isnan(spread.std) else f"{mean} ± {spread.std:.1f}"


def duration(seconds: float) -> str:
    """Seconds in the largest units that a reader wants.

    >>> duration(0.42), duration(71.8), duration(7384)
    ('0.4 s', '1 min 12 s', '2 h 3 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def explain(net: NetSummary) -> str:
    """One net's verdict and its evidence, in sentences."""
    if net.epoch is None:
        return "Not started."
    parts = _flow_sentences(net)
    if net.has_turned:
        parts.append(
            "What explodes first is the fault: steps along such gradients can leave a net whose gradients vanish. A "
            "lower rate at the start would tell."
        )
    if net.n_diverged:
        seeds = f"{net.n_diverged} of {len(net.results)} seeds" if len(net.results) > 1 else "its one seed"
        parts.append(f"The training loss of {seeds} became NaN or infinite, and training stopped there.")
    if net.comparison is not None:
        parts.append(_comparison_sentence(net, net.comparison))
    if net.verdict == NOT_LEARNING and net.learning is not None:
        before, now = percent(net.learning.before), percent(net.learning.now)
        parts.append(
            f"After epoch {net.learning.epoch} the training error, {now} %, is not clearly below that before the first "
            f"step, {before} %: the net has not learned."
        )
    if net.verdict == OVERFITTING:
        parts += _overfitting_sentences(net.test_comparison, net.rise)
    if not net.finished:
        parts.append(f"Not finished: {net.progress}.")
    return " ".join(parts)


def headline(summary: Summary) -> list[str]:
    """What the whole sweep shows, one sentence for each family with two depths or more."""
    sentences: list[str] = []
    for family in summary.families:
        compared = [
            (net, net.comparison) for net in summary.nets if net.family == family and net.comparison is not None
        ]
        worse = [(net, comparison) for net, comparison in compared if comparison.clearly_above]
        overfitting = [
            (net, net.test_comparison)
            for net, _ in compared
            if net.verdict == OVERFITTING and net.test_comparison is not None and net.test_comparison.overfits
        ]
        if worse or (compared and not overfitting):
            net, comparison = (worse or compared)[-1]
            start = "Deeper is worse for" if worse else "Deeper is not clearly worse for"
            ours, theirs = comparison.errors, comparison.other_errors
            sentences.append(
                f"{start} {family}: after epoch {comparison.epoch} the training error is {percent(ours.train)} % "
                f"for {net.name} and {percent(theirs.train)} % for {comparison.other}."
            )
        if overfitting:
            net, comparison = overfitting[-1]
            ours, theirs = comparison.errors, comparison.other_errors
            sentences.append(
                f"Deeper overfits for {family}: after epoch {comparison.epoch} the test error is "
                f"{percent(ours.test)} % for {net.name} and {percent(theirs.test)} % for {comparison.other}, the "
                f"training error {percent(ours.train)} and {percent(theirs.train)} %."
            )
    return sentences


def shortcuts(summary: Summary) -> list[str]:
    """What arrives by the shortcuts, in sentences on each residual net and on its depth, as far as it is recorded."""
    sentences = [sentence for net in summary.nets if (sentence := _shortcut_sentence(net))]
    for family in summary.families:
        members = [net for net in summary.nets if net.family == family]
        newest = {net.name: list(middles.items())[-1] for net in members if (middles := _middle_shares(net))}
        moments = {when for when, _ in newest.values()}
        if len(newest) > 1 and len(moments) == 1:
            larger = all(deeper > shallower for (_, shallower), (_, deeper) in pairwise(newest.values()))
            told = _listed([f"{100 * middle:.0f} % in {name}" for name, (_, middle) in newest.items()])
            start = (
                "The deeper the net, the larger the share" if larger else "A deeper net has not always the larger share"
            )
            sentences.append(f"{start} {moments.pop()}: {told}.")
    without = [net.name for net in summary.nets if net.family in _RESIDUAL_FAMILIES and net.epoch and not net.sharings]
    if without:
        sentences.append(f"Of {_listed(without)} no junctions are recorded; files of older versions hold none.")
    return sentences


def _drawn_shares(net: NetSummary) -> list[tuple[str, dict[str, float]]]:
    """The moments at which a net has junctions to compare, each with their shares."""
    moments = [
        (sharing.when, {site: share for site, share in sharing.shares.items() if math.isfinite(share)})
        for sharing in net.sharings
    ]
    return [(when, shares) for when, shares in moments if shares]


def _middle_shares(net: NetSummary) -> dict[str, float]:
    """The median share over the junctions, by moment."""
    return {when: statistics.median(shares.values()) for when, shares in _drawn_shares(net)}


def _shortcut_sentence(net: NetSummary) -> str:
    middles = _middle_shares(net)
    if not middles:
        return ""
    told = _listed([f"{100 * middle:.0f} % {when}" for when, middle in middles.items()])
    more = [when for when, middle in middles.items() if middle > 0.5]
    compared = "more than the branch's" if more else "no more than the branch's"
    if 0 < len(more) < len(middles):
        compared += f" only {_listed(more)}"
    drawn = _drawn_shares(net)
    lowest, site, when = min((share, site, when) for when, shares in drawn for site, share in shares.items())
    n_junctions = len(drawn[0][1])
    return (
        f"In {net.name} the shortcut's share of the gradient is {told}, {compared} (median over {n_junctions} "
        f"junction{'s' if n_junctions > 1 else ''}; the lowest is {100 * lowest:.0f} %, at {site} {when})."
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _flow_sentences(net: NetSummary) -> list[str]:
    moments = [moment for moment in (net.initial, net.end) if moment is not None]
    if not moments:
        return ["No gradient is recorded."]
    clauses: list[str] = []
    for before, moment in zip([None, *moments], moments, strict=False):
        if before is None:
            norms = f"norm {number(moment.first)} in the first weight layer, {number(moment.last)} in the last"
            clauses.append(f"gradients {_flow(moment)} at {moment.when} ({norms})")
        else:
            same = "" if _flow(before) == _flow(moment) else f"they {_flow(moment)} "
            clauses.append(f"{same}at {moment.when} ({number(moment.first)} and {number(moment.last)})")
    text = " and ".join(clauses)
    return [f"{text[:1].upper()}{text[1:]}."]


def _flow(moment: Moment) -> str:
    seeds = sum(moment.votes.values())
    agreeing = moment.votes[moment.verdict]
    return _FLOW_WORDS[moment.verdict] + ("" if agreeing == seeds else f" in {agreeing} of {seeds} seeds")


def _comparison_sentence(net: NetSummary, comparison: Comparison) -> str:
    errors = f"training error, {percent(comparison.errors.train)} %,"
    other = f"that of {comparison.other}, {percent(comparison.other_errors.train)} %"
    text = f"After epoch {comparison.epoch} the {errors} is"
    if not comparison.clearly_above:
        return f"{text} not clearly above {other}."
    text = f"{text} clearly above {other}"
    if net.verdict != DEGRADED:
        return f"{text}; while the gradients are not sound this is not called degraded optimisation."
    vanished = any(moment is not None and "vanishing" in moment.votes for moment in (net.initial, net.end))
    return f"{text}{'.' if vanished else ': the deeper net is harder to optimise, and its gradients do not vanish.'}"


def _overfitting_sentences(comparison: Comparison | None, rise: Rise | None) -> list[str]:
    sentences = []
    if comparison is not None and comparison.overfits:
        ours, theirs = comparison.errors, comparison.other_errors
        sentences.append(
            f"After epoch {comparison.epoch} the test error, {percent(ours.test)} %, is clearly above that of "
            f"{comparison.other}, {percent(theirs.test)} %, and further above the training error, by "
            f"{percent(ours.gap)} points against {percent(theirs.gap)}: the deeper net overfits."
        )
    if rise is not None and rise.overfits:
        then, now = rise.lowest, rise.errors
        sentences.append(
            f"From epoch {rise.lowest_epoch} to epoch {rise.epoch} the test error rose from {percent(then.test)} to "
            f"{percent(now.test)} % while the training error fell from {percent(then.train)} to "
            f"{percent(now.train)} %: the net overfits."
        )
    return sentences
