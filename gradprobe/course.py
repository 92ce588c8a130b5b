"""Pure rules over the course of a run: its losses, its total norm, and what stays zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradprobe.findings import Finding, Thresholds, finding
from gradprobe.measured import FloatArray
from gradprobe.snapshot import Snapshot


def converges(snapshots: Sequence[Snapshot], limits: Thresholds) -> bool:
    """Tells whether the loss has fallen clearly from the start of a history to its end.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        False also where there are too few losses to tell.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021) reports a fault of the gradients only where training fails as well.
    """
    losses = _losses(snapshots)
    if len(losses) < 2 * limits.window or not np.isfinite(losses).all():
        return False
    # A loss that blew up in the first steps and came down again is no convergence: the lower start counts.
    start = min(float(losses[0]), float(losses[: limits.window].mean()))
    end = float(losses[-limits.window :].mean())
    return end < limits.converging * start if start > 0 else end < start


def loss_blow_up(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds a loss that has become huge or is no number; one step is enough.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    told = [(snapshot.step, snapshot.loss) for snapshot in snapshots if snapshot.loss is not None]
    if converges(snapshots, limits):
        return []
    high = [
        (step, loss)
        for step, loss in told
        if not math.isfinite(loss) or (loss >= limits.loss_limit and not loss < told[0][1])
    ]
    if not high:
        return []
    (first_step, first_loss), (last_step, _) = high[0], high[-1]
    message = (
        f"step {first_step}: the loss is {first_loss:.3g}, after {told[0][1]:.3g} at step {told[0][0]}"
        if first_step != told[0][0]
        else f"step {first_step}: the loss is {first_loss:.3g} in the first step seen: the forward pass explodes"
    )
    evidence = {"loss": first_loss, "loss_at_start": told[0][1]}
    return [finding("loss blow-up", (), (first_step, last_step), evidence, message)]


def not_learning(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds a loss that has not dropped since the start of the run.

    Says nothing where the history does not reach back to the start: a loss that no longer falls may just be low.

    Args:
        snapshots: Steps in order.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    losses = _losses(snapshots)
    n = limits.window
    if len(losses) < 2 * n or snapshots[0].step >= n or not np.isfinite(losses).all():
        return []
    start, end = losses[:n], losses[-n:]  # [n] each
    drop = float(start.mean() - end.mean())
    error = math.sqrt(float(start.var(ddof=1) + end.var(ddof=1)) / n)
    if drop > limits.drop_errors * error:
        return []
    steps = (snapshots[0].step, snapshots[-1].step)
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
        "loss": [(snapshot.step, snapshot.loss) for snapshot in snapshots if snapshot.loss is not None],
    }
    found: list[tuple[int, str, float, float, float]] = []
    for what, points in series.items():
        steps = [step for step, _ in points]
        values = np.array([value for _, value in points], dtype=np.float64)
        for k in range(limits.spike_warm_up, len(values)):
            before = values[max(0, k - limits.spike_window) : k]
            if not np.isfinite(before).all() or not math.isfinite(values[k]):
                break  # the rule on non-finite values has the word
            mean, sigma = float(before.mean()), float(before.std())
            nearby = float(before[-limits.window :].max())
            if values[k] > max(mean + limits.spike_sigmas * sigma, limits.spike_jump * nearby):
                found.append((steps[k], what, float(values[k]), mean, sigma))
                break
    if not found:
        return []
    step, what, value, mean, sigma = min(found)
    message = (
        f"step {step}: {what} {value:.3g} is {(value - mean) / sigma:.0f} standard deviations above the mean, "
        f"{mean:.3g}, of the steps before"
    )
    return [finding("spike", (), (step, step), {"value": value, "mean": mean, "sigma": sigma}, message)]


def zeros(snapshots: Sequence[Snapshot], weights: Sequence[str], limits: Thresholds) -> list[Finding]:
    """Finds layers whose gradients are mostly exact zeros, and parameters that never get one.

    Args:
        snapshots: Steps in order.
        weights: Names of the sites that carry depth.
        limits: Limits of the rules.

    Returns:
        At most one finding of each of the two rules.
    """
    if len(snapshots) < limits.window:
        return []
    steps = (snapshots[0].step, snapshots[-1].step)
    table = snapshots[-1].table
    present = np.stack([snapshot.measured.present for snapshot in snapshots])  # [T, K]
    zero_shares = np.stack([snapshot.columns["zero_fraction"] for snapshot in snapshots])  # [T, K]
    findings = []
    shares = {name: float(np.median(zero_shares[present[:, k], k])) for name in weights for k in (table.index[name],)}
    dying = tuple(name for name, share in shares.items() if share >= limits.dying_share)
    if dying and len(dying) >= limits.dying_sites * len(shares):
        message = (
            f"steps {steps[0]} to {steps[1]}: in {len(dying)} of {len(shares)} weights {limits.dying_share:.0%} of the "
            f"gradient or more are exact zeros; first {dying[0]}, {shares[dying[0]]:.0%}"
        )
        evidence = {"zero_share": shares[dying[0]], "dying": float(len(dying)), "weights": float(len(shares))}
        findings.append(finding("dying", dying, steps, evidence, message))
    always = present.all(axis=0)  # [K]
    is_silent = always & (np.stack([snapshot.columns["abs_max"] for snapshot in snapshots]) == 0.0).all(axis=0)  # [K]
    if is_silent.any() and (always & ~is_silent).any():
        silent = tuple(name for name, silent in zip(table.names, is_silent, strict=True) if silent)
        others = f", and that of {len(silent) - 1} others" if len(silent) > 1 else ""
        message = f"steps {steps[0]} to {steps[1]}: the gradient of {silent[0]} is exactly zero{others}"
        findings.append(finding("silent site", silent, steps, {"silent": float(len(silent))}, message))
    return findings


def _losses(snapshots: Sequence[Snapshot]) -> FloatArray:
    return np.array([snapshot.loss for snapshot in snapshots if snapshot.loss is not None], dtype=np.float64)
