"""Pure rules over the course of a run: its losses, its total norm, and what stays zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradprobe.findings import Finding, Thresholds, finding
from gradprobe.snapshot import Snapshot


def converges(snapshots: Sequence[Snapshot], limits: Thresholds) -> bool:
    """Tells whether the loss has fallen clearly from the start of a history to its end.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        False also where there are too few losses to tell, or where they are not positive and have no share to fall by.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021) reports a fault of the gradients only where training fails as well.
    """
    losses = np.array([loss for _, loss in _losses(snapshots)], dtype=np.float64)
    if len(losses) < 2 * limits.window or not np.isfinite(losses).all():
        return False
    # A loss that blew up in the first steps and came down again is no convergence: the lower start counts.
    start = min(float(losses[0]), float(losses[: limits.window].mean()))
    return start > 0 and float(losses[-limits.window :].mean()) < limits.converging * start


def loss_blow_up(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds a loss that has become huge or is no number; one step is enough.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    told = _losses(snapshots)
    if not told or converges(snapshots, limits):
        return []
    start_step, start = told[0]

    def is_high(step: int, loss: float) -> bool:
        risen = loss > limits.spike_jump * start or step == start_step < limits.window
        return not math.isfinite(loss) or (loss >= limits.loss_limit and risen)

    high = [(step, loss) for step, loss in told if is_high(step, loss)]
    if not high:
        return []
    step, loss = high[0]
    before = f"after {start:.3g} at step {start_step}" if step != start_step else "in the first step that has one"
    message = f"step {step}: the loss is {loss:.3g}, {before}"
    return [finding("loss blow-up", (), (step, high[-1][0]), {"loss": loss, "loss_at_start": start}, message)]


def not_learning(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds a loss that has not dropped since the start of the run.

    Says nothing where the losses do not reach back to the first steps after attach: a loss that stays may be low.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    told = _losses(snapshots)
    losses = np.array([loss for _, loss in told], dtype=np.float64)
    n = limits.window
    if len(losses) < 2 * n or told[0][0] >= n or not np.isfinite(losses).all() or converges(snapshots, limits):
        return []
    start, end = losses[:n], losses[-n:]  # [n] each
    drop = float(start.mean() - end.mean())
    error = math.sqrt(float(start.var(ddof=1) + end.var(ddof=1)) / n)
    if drop > limits.drop_errors * error:
        return []
    steps = (told[0][0], told[-1][0])
    message = (
        f"steps {steps[0]} to {steps[1]}: the loss was {start.mean():.4g} and is {end.mean():.4g}; "
        f"that is no drop beyond {limits.drop_errors:g} standard errors of {error:.2g}"
    )
    evidence = {"loss_at_start": float(start.mean()), "loss_at_end": float(end.mean()), "standard_error": error}
    return [finding("not learning", (), steps, evidence, message)]


def spikes(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds steps whose total norm or loss stands out from those before.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        At most one finding, on the first spike.
    """
    series = {
        "total norm": [(snapshot.step, snapshot.total_norm) for snapshot in snapshots],
        "loss": _losses(snapshots),
    }
    found: list[tuple[int, str, float, float, float]] = []
    for what, points in series.items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]  # others have a rule of their own
        values = np.array([value for _, value in finite], dtype=np.float64)
        for k in range(limits.spike_warm_up, len(values)):
            before = values[max(0, k - limits.spike_window) : k]
            mean, sigma = float(before.mean()), float(before.std())
            nearby = float(before[-limits.window :].max())
            if nearby > 0 and values[k] > max(mean + limits.spike_sigmas * sigma, limits.spike_jump * nearby):
                found.append((finite[k][0], what, float(values[k]), mean, sigma))
                break
    if not found:
        return []
    step, what, value, mean, sigma = min(found)
    message = f"step {step}: {what} {value:.3g}, where the steps before have {mean:.3g} ± {sigma:.2g}"
    return [finding("spike", (), (step, step), {"value": value, "mean": mean, "sigma": sigma}, message)]


def zeros(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds layers whose gradients are mostly exact zeros, and parameters that never get one.

    Args:
        snapshots: Steps in order, all with the same sites.
        limits: Limits of the rules.

    Returns:
        At most one finding of each of the two rules.
    """
    n_steps = len(snapshots)
    if n_steps < limits.window:
        return []
    steps = (snapshots[0].step, snapshots[-1].step)
    table = snapshots[-1].table
    present = np.stack([snapshot.measured.present for snapshot in snapshots])  # [T, K]
    zero_shares = np.stack([snapshot.columns["zero_fraction"] for snapshot in snapshots])  # [T, K]
    findings = []
    weights = np.flatnonzero((np.asarray(table.ndims) > 1) & (2 * present.sum(axis=0) > n_steps))
    is_dying = 2 * (present & (zero_shares >= limits.dying_share)).sum(axis=0) > n_steps  # [K]
    dying = [k for k in weights if is_dying[k]]
    # An embedding alone has zeros for all that did not occur, and with a batch of one so have sound layers.
    if len(dying) > 1 and len(dying) >= limits.dying_sites * len(weights) and not converges(snapshots, limits):
        names = tuple(table.names[k] for k in dying)
        share = float(np.median(zero_shares[present[:, dying[0]], dying[0]]))
        message = (
            f"steps {steps[0]} to {steps[1]}: in {len(dying)} of {len(weights)} weights {limits.dying_share:.0%} of "
            f"the gradient or more are exact zeros; first {names[0]}, {share:.0%}"
        )
        evidence = {"zero_share": share, "dying": float(len(dying)), "weights": float(len(weights))}
        findings.append(finding("dying", names, steps, evidence, message))
    always = present.all(axis=0)  # [K]
    is_silent = always & (np.stack([snapshot.columns["abs_max"] for snapshot in snapshots]) == 0.0).all(axis=0)  # [K]
    if is_silent.any() and (always & ~is_silent).any():
        silent = tuple(name for name, silent in zip(table.names, is_silent, strict=True) if silent)
        others = f", and that of {len(silent) - 1} others" if len(silent) > 1 else ""
        message = f"steps {steps[0]} to {steps[1]}: the gradient of {silent[0]} is exactly zero{others}"
        findings.append(finding("silent site", silent, steps, {"silent": float(len(silent))}, message))
    return findings


def _losses(snapshots: Sequence[Snapshot]) -> list[tuple[int, float]]:
    return [(snapshot.step, snapshot.loss) for snapshot in snapshots if snapshot.loss is not None]
