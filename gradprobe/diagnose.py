"""Pure rules over what was measured: is the run healthy, and if not, where, since when and how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from gradprobe import course
from gradprobe.errors import ArgumentError
from gradprobe.findings import DEFAULTS, Finding, Rule, Thresholds, finding
from gradprobe.snapshot import Snapshot

Verdict = Literal["healthy"] | Rule


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
    rules = {found.rule for found in diagnose(snapshots)}
    return next((rule for rule in get_args(Rule) if rule in rules), "healthy")


def diagnose(snapshots: Sequence[Snapshot], thresholds: Thresholds = DEFAULTS) -> list[Finding]:
    """Applies the rules to the steps of a run.

    One non-finite element, one huge loss or one spike is enough; steps that a gradient scaler skipped do not count
    unless they are most of them. Vanishing and exploding must hold in more than half of the steps, and are no fault of
    a run whose loss falls; rules on zeros and on the loss need `Thresholds.window` steps or twice as many. Those on the
    loss need `Probe.step(loss=...)`.

    Args:
        snapshots: Steps in order.
        thresholds: Limits of the rules.

    Returns:
        The findings, one for each rule that fired, the gravest first; empty for a healthy run.

    Raises:
        ArgumentError: The snapshots are not of one probe.

    Source:
        `gradprobe.findings.RULES` names one for each rule.
    """
    if any(snapshot.table.names != snapshots[0].table.names for snapshot in snapshots):
        raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different sites")
    hits: dict[Verdict, list[Snapshot]] = {"non-finite": [], "vanishing": [], "exploding": []}
    skipped = [snapshot for snapshot in snapshots if snapshot.skipped]
    # A scaler that looks for its scale skips a step now and then; one that skips most has met a fault.
    judged = snapshots if 2 * len(skipped) > len(snapshots) else [one for one in snapshots if not one.skipped]
    for snapshot in judged:
        status = flow_verdict(weight_norms(snapshot), thresholds)
        if snapshot.columns["nonfinite"][snapshot.measured.present].any():
            status = "non-finite"
        if status != "healthy":
            hits[status].append(snapshot)
    findings = [_nonfinite(hits["non-finite"])] if hits["non-finite"] else []
    losses = course.losses_of(snapshots)
    if not course.converges(losses, thresholds):
        rules: tuple[Literal["exploding", "vanishing"], ...] = ("exploding", "vanishing")
        findings += [_over_depth(rule, hits[rule], thresholds) for rule in rules if 2 * len(hits[rule]) > len(judged)]
        findings += course.loss_blow_up(losses, thresholds)
        findings += course.dying(snapshots, thresholds)
        findings += course.not_learning(losses, thresholds)
    findings += course.silent_sites(snapshots, thresholds)
    findings += course.spikes(snapshots, losses, thresholds)
    order = get_args(Rule)
    return sorted(findings, key=lambda found: order.index(found.rule))


def weight_sites(snapshot: Snapshot) -> list[str]:
    """Names the sites of a snapshot that carry depth: tensors with more than one dimension, or all if there is none."""
    return [snapshot.table.names[k] for k in _weights(snapshot)]


def weight_norms(snapshot: Snapshot) -> list[float]:
    """Norms of the weight gradients of a snapshot, in model order."""
    norms: list[float] = snapshot.columns["norm"][_weights(snapshot)].tolist()
    return norms


def _weights(snapshot: Snapshot) -> npt.NDArray[np.intp]:
    present = snapshot.measured.present  # [K]
    matrices = present & (np.asarray(snapshot.table.ndims) > 1)
    return np.flatnonzero(matrices if matrices.any() else present)


def _nonfinite(hits: list[Snapshot]) -> Finding:
    first = hits[0]
    sites = tuple(name for name, stats in first.sites.items() if stats.nonfinite or not math.isfinite(stats.norm))
    count = sum(stats.nonfinite for stats in first.sites.values())
    return finding(
        "non-finite",
        sites,
        (first.step, hits[-1].step),
        {"nonfinite": float(count)},
        f"step {first.step}: {count} gradient elements are NaN or infinite, in {len(sites)} sites; first {sites[0]}",
    )


def _over_depth(rule: Literal["exploding", "vanishing"], hits: list[Snapshot], thresholds: Thresholds) -> Finding:
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
    return finding(
        rule,
        concerned,
        (hits[0].step, newest.step),
        {"norm_first": first, "norm_last": last, "ratio": ratio},
        f"step {newest.step}: gradient norm {first:.2e} at {names[0]} and {last:.2e} at {names[-1]}; "
        f"first/last {ratio:.2e} is {need}: {rule} towards the input",
    )
