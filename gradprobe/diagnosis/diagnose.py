"""Pure rules over what was measured: is the run healthy, and if not, where, since when and how far."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.findings import DEFAULTS, Finding, Rule, Thresholds, finding
from gradprobe.diagnosis.rules import activations, course, precision, updates
from gradprobe.diagnosis.trend import Trend, fit_trend
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.snapshot import Snapshot

Verdict = Literal["healthy"] | Rule


def flow_verdict(norms: Sequence[float], thresholds: Thresholds = DEFAULTS) -> Verdict:
    """Judges the gradient norms of one backward pass over depth: first against last, or else a line through the others.

    From `slope_sites` weights between the two on, a gradient that is smaller than the last one only does not vanish.

    Args:
        norms: Norms of the weight gradients, from the layer next to the input to the one next to the loss.
        thresholds: Limits of the rules.

    Returns:
        The verdict; "healthy" where there is nothing to compare.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021), beta1, beta2, beta3; the line and the last layer but one are ours.

    Example:
        >>> flow_verdict([1e-9, 1e-5, 1e-2])
        'vanishing'
    """
    if any(not math.isfinite(norm) for norm in norms):
        return "non-finite"
    if not norms:
        return "healthy"
    ends = _ends_verdict(norms, thresholds)
    if ends != "healthy" or len(norms) - 2 < thresholds.slope_sites:
        return ends
    line = inner_trend(norms)
    is_slope = math.isfinite(line.factor) and abs(math.log(line.factor)) * line.factor > (
        thresholds.slope_errors * line.std_error
    )
    return layer_status(line.first, line.last, thresholds) if is_slope else ends


def _ends_verdict(norms: Sequence[float], thresholds: Thresholds) -> Verdict:
    ends = layer_status(norms[0], norms[-1], thresholds)
    is_deep = len(norms) - 2 >= thresholds.slope_sites
    # What the last layer alone makes is no trend over depth.
    if ends == "vanishing" and is_deep and layer_status(norms[0], norms[-2], thresholds) != ends:
        return "healthy"
    return ends


def inner_trend(norms: Sequence[float]) -> Trend:
    """Fits a line to the logarithms of all norms but the first and the last, whose layers have other shapes.

    Args:
        norms: As for `flow_verdict`.

    Returns:
        The line.
    """
    with np.errstate(divide="ignore"):
        return fit_trend(np.log(norms[1:-1]).tolist())


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
    return gravest({found.rule for found in diagnose(snapshots)})


def gravest(verdicts: Collection[Verdict]) -> Verdict:
    """Picks the gravest verdict.

    Args:
        verdicts: In any order; none is "healthy".

    Returns:
        The one that `gradprobe.diagnosis.findings.Rule` names first.

    Example:
        >>> gravest(["healthy", "spike", "exploding"])
        'exploding'
    """
    return next((rule for rule in get_args(Rule) if rule in verdicts), "healthy")


def diagnose(snapshots: Sequence[Snapshot], thresholds: Thresholds = DEFAULTS) -> list[Finding]:
    """Applies the rules to the steps of a run.

    One non-finite element, one huge loss or one spike is enough; steps that a gradient scaler skipped do not count
    unless they are most of them. Vanishing and exploding must hold in more than half of the steps, and are no fault of
    a run whose loss falls; a gradient that explodes at the first step and vanishes in most of the others is exploding.
    Rules on zeros and on the loss need `Thresholds.window` steps or twice as many. Those on the loss need
    `Probe.step(loss=...)`, those on what passes forward need `attach(activations=True)` or junctions, those on updates
    `attach(updates=True)`.

    Args:
        snapshots: Steps in order.
        thresholds: Limits of the rules.

    Returns:
        The findings, one for each rule that fired, the gravest first; empty for a healthy run.

    Raises:
        ArgumentError: The snapshots are not of one probe.

    Source:
        `gradprobe.diagnosis.findings.RULES` names one for each rule.
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
    passes = activations.passes_of(snapshots)
    is_converging = course.converges(losses, thresholds)
    if not is_converging:
        rules: tuple[Literal["exploding", "vanishing"], ...] = ("exploding", "vanishing")
        frequent = [rule for rule in rules if 2 * len(hits[rule]) > len(judged)]
        began_by_exploding = bool(hits["exploding"]) and hits["exploding"][0] is judged[0]
        if frequent == ["vanishing"] and began_by_exploding:
            findings.append(_turned(hits["exploding"], len(hits["vanishing"]), thresholds))
        else:
            findings += [_over_depth(rule, hits[rule], thresholds) for rule in frequent]
        blown_up = course.loss_blow_up(losses, thresholds, is_observed=passes is not None)
        findings += course.dying(snapshots, thresholds)
        stuck = [*course.unstable_loss(losses, thresholds), *course.not_learning(losses, thresholds)]
        if passes is not None:
            growing = activations.exploding(passes, losses, thresholds)
            if growing and blown_up and blown_up[0].steps[0] == losses[0][0]:
                blown_up = []  # a loss that is huge from the start is what the growth leads to
            findings += growing
            findings += activations.saturation(passes, thresholds)
            findings += activations.dead_relu(passes, thresholds)
            if not growing and len(losses) >= 2 * thresholds.window:  # else it is too early to tell
                findings += activations.poor_initialisation(passes, thresholds)
        findings += precision.precision_loss(snapshots, thresholds)
        moves = updates.moves_of(snapshots)
        if moves is not None:
            findings += updates.too_large(moves, thresholds)
            findings += updates.too_small(moves, thresholds)
        findings += [*blown_up, *stuck]
    findings += course.silent_sites(snapshots, thresholds)
    findings += course.layer_drift(snapshots, thresholds, is_converging)
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


def _turned(exploding: list[Snapshot], n_vanishing: int, thresholds: Thresholds) -> Finding:
    """What goes wrong where a gradient explodes at the first step and vanishes in most of the later ones."""
    found = _over_depth("exploding", exploding, thresholds)
    return replace(
        found,
        evidence=found.evidence | {"vanishing_steps": float(n_vanishing)},
        message=f"{found.message}; in {n_vanishing} later steps it vanishes, which long steps along a gradient that "
        "explodes can bring about: a lower learning rate at the start would tell",
    )


def _over_depth(rule: Literal["exploding", "vanishing"], hits: list[Snapshot], thresholds: Thresholds) -> Finding:
    newest = hits[-1]
    names, norms = weight_sites(newest), weight_norms(newest)
    ratio = norms[0] / norms[-1] if norms[-1] else math.inf
    evidence = {"norm_first": norms[0], "norm_last": norms[-1], "ratio": ratio}
    line = inner_trend(norms)
    if math.isfinite(line.std_error):
        evidence |= {"factor_per_layer": line.factor, "std_error": line.std_error}
    by_ends = _ends_verdict(norms, thresholds) == rule
    first, last = (norms[0], norms[-1]) if by_ends else (line.first, line.last)
    concerned = tuple(
        name for name, norm in zip(names, norms, strict=True) if layer_status(norm, last, thresholds) == rule
    )
    need = (
        f"< {thresholds.vanishing_ratio:g} with the first < {thresholds.vanishing_norm:g}"
        if rule == "vanishing"
        else f"> {thresholds.exploding_ratio:g}"
    )
    message = f"gradient norm {norms[0]:.2e} at {names[0]} and {norms[-1]:.2e} at {names[-1]}; first/last {ratio:.2e}"
    if by_ends:
        message += f" is {need}: {rule} towards the input"
    else:
        message += (
            f"; the line through the {len(norms) - 2} between them goes from {first:.2e} to {last:.2e}, by "
            f"{line.factor:.3g} ± {line.std_error:.2g} per layer, and {first / last:.2e} is {need}: {rule} towards the "
            "input"
        )
    return finding(
        rule, concerned, (hits[0].step, newest.step), evidence, f"step {newest.step}: {message}", where="backward"
    )
