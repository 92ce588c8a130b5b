"""Pure rules over measured norms: is the gradient healthy, and if not, where and how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradprobe.snapshot import Snapshot

Verdict = Literal["healthy", "vanishing", "exploding", "non-finite"]

AUTOTRAINER = "AUTOTRAINER (Zhang et al., ICSE 2021)"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        vanishing_ratio: beta1: first over last norm below which a gradient may be vanishing.
        vanishing_norm: beta2: norm of the first layer below which it then is.
        exploding_ratio: beta3: first over last norm above which a gradient is exploding.
    """

    vanishing_ratio: float = 1e-3
    vanishing_norm: float = 1e-4
    exploding_ratio: float = 70.0


DEFAULTS = Thresholds()


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, with its evidence.

    Attributes:
        rule: Name of the rule.
        sites: Sites concerned, the first to fail first.
        steps: First and last step concerned.
        evidence: The numbers that the rule saw.
        message: One sentence for a person.
        source: Where the rule and its threshold are from.
    """

    rule: Verdict
    sites: tuple[str, ...]
    steps: tuple[int, int]
    evidence: dict[str, float]
    message: str
    source: str


def flow_verdict(norms: Sequence[float], thresholds: Thresholds = DEFAULTS) -> Verdict:
    """Judges the gradient norms of one backward pass over depth.

    Args:
        norms: Norms of the weight gradients, from the layer next to the input to the one next to the loss.
        thresholds: Limits of the rules.

    Returns:
        The verdict; "healthy" where there is nothing to compare.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021), beta1, beta2, beta3.

    Example:
        >>> flow_verdict([1e-9, 1e-5, 1e-2])
        'vanishing'
    """
    if any(not math.isfinite(norm) for norm in norms):
        return "non-finite"
    if not norms:
        return "healthy"
    return layer_status(norms[0], norms[-1], thresholds)


def layer_status(norm: float, last_norm: float, thresholds: Thresholds = DEFAULTS) -> Verdict:
    """Judges one layer's gradient norm against that of the layer next to the loss.

    Args:
        norm: Norm of the layer's gradient.
        last_norm: Norm of the last layer's gradient.
        thresholds: Limits of the rules.

    Returns:
        The verdict.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021), beta1, beta2, beta3, which compares the first layer with the last.
    """
    if not math.isfinite(norm) or not math.isfinite(last_norm):
        return "non-finite"
    if norm < thresholds.vanishing_norm and norm <= thresholds.vanishing_ratio * last_norm:
        return "vanishing"
    if norm > thresholds.exploding_ratio * last_norm:
        return "exploding"
    return "healthy"


def verdict(snapshots: Sequence[Snapshot]) -> Verdict:
    """Names the gravest finding of a run, or "healthy".

    Args:
        snapshots: Steps in order.

    Returns:
        The verdict.
    """
    order: tuple[Verdict, ...] = ("non-finite", "exploding", "vanishing")
    rules = {finding.rule for finding in diagnose(snapshots)}
    return next((rule for rule in order if rule in rules), "healthy")


def diagnose(snapshots: Sequence[Snapshot], thresholds: Thresholds = DEFAULTS) -> list[Finding]:
    """Applies the rules to the steps of a run.

    Vanishing and exploding must hold in more than half of the steps seen; one non-finite element is enough.

    Args:
        snapshots: Steps in order.
        thresholds: Limits of the rules.

    Returns:
        The findings, one for each rule that fired; empty for a healthy run.

    Source:
        Ratios: AUTOTRAINER (Zhang et al., ICSE 2021). Non-finite: SageMaker Debugger, rule ExplodingTensor.
    """
    findings = []
    hits: dict[Verdict, list[Snapshot]] = {"non-finite": [], "vanishing": [], "exploding": []}
    for snapshot in snapshots:
        status = flow_verdict(weight_norms(snapshot), thresholds)
        if any(stats.nonfinite for stats in snapshot.sites.values()):
            status = "non-finite"
        if status != "healthy":
            hits[status].append(snapshot)
    if hits["non-finite"]:
        findings.append(_nonfinite(hits["non-finite"]))
    rules: tuple[Verdict, ...] = ("exploding", "vanishing")
    findings.extend(_over_depth(rule, hits[rule], thresholds) for rule in rules if 2 * len(hits[rule]) > len(snapshots))
    return findings


def weight_sites(snapshot: Snapshot) -> list[str]:
    """Names the sites of a snapshot that carry depth: tensors with more than one dimension, or all if there is none."""
    matrices = [name for name in snapshot if snapshot.table.ndims[snapshot.table.index[name]] > 1]
    return matrices or list(snapshot)


def weight_norms(snapshot: Snapshot) -> list[float]:
    """Norms of the weight gradients of a snapshot, in model order."""
    return [snapshot[name].norm for name in weight_sites(snapshot)]


def _nonfinite(hits: list[Snapshot]) -> Finding:
    first = hits[0]
    sites = tuple(name for name, stats in first.sites.items() if stats.nonfinite or not math.isfinite(stats.norm))
    count = sum(stats.nonfinite for stats in first.sites.values())
    return Finding(
        "non-finite",
        sites,
        (first.step, hits[-1].step),
        {"nonfinite": float(count)},
        f"step {first.step}: {count} gradient elements are NaN or infinite, in {len(sites)} sites; first {sites[0]}",
        "SageMaker Debugger, rule ExplodingTensor",
    )


def _over_depth(rule: Verdict, hits: list[Snapshot], thresholds: Thresholds) -> Finding:
    newest = hits[-1]
    names = weight_sites(newest)
    first, last = newest[names[0]].norm, newest[names[-1]].norm
    ratio = first / last if last else math.inf
    concerned = tuple(name for name in names if layer_status(newest[name].norm, last, thresholds) == rule)
    need = (
        f"< {thresholds.vanishing_ratio:g} with the first < {thresholds.vanishing_norm:g}"
        if rule == "vanishing"
        else f"> {thresholds.exploding_ratio:g}"
    )
    return Finding(
        rule,
        concerned,
        (hits[0].step, newest.step),
        {"norm_first": first, "norm_last": last, "ratio": ratio},
        f"step {newest.step}: gradient norm {first:.2e} at {names[0]} and {last:.2e} at {names[-1]}; "
        f"first/last {ratio:.2e} is {need}: {rule} towards the input",
        AUTOTRAINER,
    )
