"""Pure rules over the course of a run: its losses, its total norm, and what stays or becomes zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gradprobe.diagnosis.findings import Finding, Thresholds, finding
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot

Losses = Sequence[tuple[int, float]]  # (step, loss) of the steps that have one, in order


def losses_of(snapshots: Sequence[Snapshot]) -> Losses:
    """Gives the losses of a history with their steps.

    Args:
        snapshots: Steps in order.

    Returns:
        One pair for each step that has a loss.
    """
    return [(snapshot.step, snapshot.loss) for snapshot in snapshots if snapshot.loss is not None]


def converges(losses: Losses, limits: Thresholds) -> bool:
    """Tells whether the loss has fallen clearly from the start of a history to its end.

    Args:
        losses: As `losses_of` gives them.
        limits: Limits of the rules.

    Returns:
        False also where there are too few losses to tell, or where they are not positive and have no share to fall by.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021) reports a fault of the gradients only where training fails as well.
    """
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    if len(values) < 2 * limits.window or not np.isfinite(values).all():
        return False
    # A loss that blew up in the first steps and came down again is no convergence: the lower start counts.
    start = min(float(values[0]), float(values[: limits.window].mean()))
    return start > 0 and float(values[-limits.window :].mean()) < limits.converging * start


def loss_blow_up(losses: Losses, limits: Thresholds, is_observed: bool) -> list[Finding]:
    """Finds a loss that has become huge or is no number; one step is enough.

    Args:
        losses: As `losses_of` gives them, of a run that does not converge.
        limits: Limits of the rules.
        is_observed: Whether activations or junctions were observed, so that their growth would have been seen.

    Returns:
        At most one finding.
    """
    if not losses:
        return []
    start_step, start = losses[0]

    def is_high(step: int, loss: float) -> bool:
        risen = loss > limits.spike_jump * start or step == start_step < limits.window
        return not math.isfinite(loss) or (loss >= limits.loss_limit and risen)

    high = [(step, loss) for step, loss in losses if is_high(step, loss)]
    if not high:
        return []
    step, loss = high[0]
    before = f"after {start:.3g} at step {start_step}" if step != start_step else "in the first step that has one"
    message = f"step {step}: the loss is {loss:.3g}, {before}"
    if step == start_step and math.isfinite(loss):
        message += (
            f"; a uniform guess among a million classes has {math.log(1e6):.3g}. Either the loss is on another scale, "
            "or the forward pass explodes: "
        )
        message += (
            "what was observed of it does not show that" if is_observed else "attach(activations=True) shows which"
        )
    return [finding("loss blow-up", (), (step, high[-1][0]), {"loss": loss, "loss_at_start": start}, message)]


def not_learning(losses: Losses, limits: Thresholds) -> list[Finding]:
    """Finds a loss that has not dropped since the start of the run.

    Says nothing where the losses do not reach back to the first steps after attach: a loss that stays may be low.

    Args:
        losses: As `losses_of` gives them, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    n = limits.window
    if len(values) < 2 * n or losses[0][0] >= n or not np.isfinite(values).all():
        return []
    start, end = values[:n], values[-n:]  # [n] each
    drop = float(start.mean() - end.mean())
    std_error = math.sqrt(float(start.var(ddof=1) + end.var(ddof=1)) / n)
    if drop > limits.drop_errors * std_error:
        return []
    steps = (losses[0][0], losses[-1][0])
    message = (
        f"steps {steps[0]} to {steps[1]}: the loss was {start.mean():.4g} and is {end.mean():.4g}; "
        f"that is no drop beyond {limits.drop_errors:g} standard errors of {std_error:.2g}"
    )
    evidence = {"loss_at_start": float(start.mean()), "loss_at_end": float(end.mean()), "std_error": std_error}
    return [finding("not learning", (), steps, evidence, message)]


def unstable_loss(losses: Losses, limits: Thresholds) -> list[Finding]:
    """Finds a loss that rises, or falls and rises again, by more than the batches explain.

    Args:
        losses: As `losses_of` gives them, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    n = limits.window
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    n_blocks = len(values) // n
    if n_blocks < 3 or not np.isfinite(values).all() or values.min() <= 0.0:  # shares of what is below zero say nothing
        return []
    blocks = values[-n_blocks * n :].reshape(n_blocks, n)
    with np.errstate(over="ignore"):
        means, std_errors = blocks.mean(axis=1), np.sqrt(blocks.var(axis=1, ddof=1) / n)  # [B] each
    turns = _turns(means, std_errors, limits)
    rises = [(start, end) for start, end in turns if means[start] < means[end]]
    if not rises:
        return []
    low, high = max(rises, key=lambda rise: float(means[rise[1]] - means[rise[0]]))
    first = len(losses) - n_blocks * n
    steps = (losses[first + low * n][0], losses[first + high * n + n - 1][0])
    error = math.hypot(std_errors[low], std_errors[high])
    message = (
        f"steps {steps[0]} to {steps[1]}: the mean of {n} losses rises from {means[low]:.4g} to {means[high]:.4g}, "
        f"with a standard error of {error:.2g}"
    )
    if len(turns) > 1:
        message += f"; in all it falls and rises {len(turns)} times"
    evidence = {"loss_low": float(means[low]), "loss_high": float(means[high]), "turns": float(len(turns))}
    return [finding("unstable loss", (), steps, evidence, message)]


def _turns(means: FloatArray, std_errors: FloatArray, limits: Thresholds) -> list[tuple[int, int]]:
    """Clear falls and rises of block means [B], in turn: the blocks where each starts and where it ends."""

    def is_clear(high: int, low: int) -> bool:
        drop = float(means[high] - means[low])
        error = math.hypot(std_errors[high], std_errors[low])
        return means[low] < limits.converging * means[high] and drop > limits.swing_errors * error

    starts: list[int] = []
    highest = lowest = 0  # of the turn that goes on
    rising: bool | None = None
    for block in range(1, len(means)):
        if means[block] > means[highest]:
            highest = block
        if means[block] < means[lowest]:
            lowest = block
        if rising is not False and is_clear(highest, block):
            starts.append(highest)
            rising, lowest = False, block
        elif rising is not True and is_clear(block, lowest):
            starts.append(lowest)
            rising, highest = True, block
    return list(pairwise([*starts, highest if rising else lowest])) if starts else []


def spikes(snapshots: Sequence[Snapshot], losses: Losses, limits: Thresholds) -> list[Finding]:
    """Finds steps whose total norm or loss stands out from those before.

    Args:
        snapshots: Steps in order.
        losses: As `losses_of` gives them.
        limits: Limits of the rules.

    Returns:
        At most one finding, on the first spike.
    """
    norms = [(snapshot.step, snapshot.total_norm) for snapshot in snapshots]
    found: list[tuple[int, str, float, float, float]] = []
    for what, points, jump in (("total norm", norms, limits.spike_norm_jump), ("loss", losses, limits.spike_jump)):
        finite = [(step, value) for step, value in points if math.isfinite(value)]  # others have a rule of their own
        values = np.array([value for _, value in finite], dtype=np.float64)
        for k in range(limits.spike_warm_up, len(values)):
            before = values[max(0, k - limits.spike_window) : k]
            mean, sigma = float(before.mean()), float(before.std())
            nearby = float(before[-limits.window :].max())
            if nearby > 0 and values[k] > max(mean + limits.spike_sigmas * sigma, jump * nearby):
                found.append((finite[k][0], what, float(values[k]), mean, sigma))
                break
    if not found:
        return []
    step, what, value, mean, sigma = min(found)
    message = f"step {step}: {what} {value:.3g}, where the steps before have {mean:.3g} ± {sigma:.2g}"
    return [finding("spike", (), (step, step), {"value": value, "mean": mean, "sigma": sigma}, message)]


def dying(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds layers whose gradients are mostly exact zeros.

    An embedding alone has zeros for all that did not occur, hence at least two weights; with a batch of one so have
    sound layers, hence only in a run that does not converge.

    Args:
        snapshots: Steps in order, all with the same sites, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    n_steps = len(snapshots)
    if n_steps < limits.window:
        return []
    table = snapshots[0].table
    present = np.stack([snapshot.measured.present for snapshot in snapshots])  # [T, K]
    shares = np.stack([snapshot.columns["zero_fraction"] for snapshot in snapshots])  # [T, K]
    weights = np.flatnonzero((np.asarray(table.ndims) > 1) & (2 * present.sum(axis=0) > n_steps))
    is_dying = 2 * (present & (shares >= limits.dying_share)).sum(axis=0) > n_steps  # [K]
    found = weights[is_dying[weights]]
    if len(found) < max(2, limits.dying_sites * len(weights)):
        return []
    names = tuple(table.names[k] for k in found)
    share = float(np.median(shares[present[:, found[0]], found[0]]))
    steps = (snapshots[0].step, snapshots[-1].step)
    message = (
        f"steps {steps[0]} to {steps[1]}: in {len(found)} of {len(weights)} weights {limits.dying_share:.0%} of the "
        f"gradient or more are exact zeros; first {names[0]}, {share:.0%}"
    )
    evidence = {"zero_share": share, "dying": float(len(found)), "weights": float(len(weights))}
    return [finding("dying", names, steps, evidence, message)]


def silent_sites(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds parameters whose gradient is there in every step and always zero, while others have one.

    Args:
        snapshots: Steps in order, all with the same sites.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    if len(snapshots) < limits.window:
        return []
    always = np.stack([snapshot.measured.present for snapshot in snapshots]).all(axis=0)  # [K]
    is_zero = (np.stack([snapshot.columns["abs_max"] for snapshot in snapshots]) == 0.0).all(axis=0)  # [K]
    if not (always & is_zero).any() or not (always & ~is_zero).any():
        return []
    names = tuple(snapshots[0].table.names[k] for k in np.flatnonzero(always & is_zero))
    steps = (snapshots[0].step, snapshots[-1].step)
    others = f", and that of {len(names) - 1} others" if len(names) > 1 else ""
    message = f"steps {steps[0]} to {steps[1]}: the gradient of {names[0]} is exactly zero{others}"
    return [finding("silent site", names, steps, {"silent": float(len(names))}, message)]


def layer_drift(snapshots: Sequence[Snapshot], limits: Thresholds, is_converging: bool) -> list[Finding]:
    """Finds weights whose gradient has left its own running mean for good, other than the gradients of the others.

    Args:
        snapshots: Steps in order, all with the same sites.
        limits: Limits of the rules.
        is_converging: Whether the run converges; a rise is no fault then.

    Returns:
        At most one finding.
    """
    if len(snapshots) < limits.spike_warm_up + limits.window:
        return []
    table = snapshots[0].table
    present = np.stack([snapshot.measured.present for snapshot in snapshots])  # [T, K]
    weights = np.flatnonzero((np.asarray(table.ndims) > 1) & present.all(axis=0))  # [W]
    norms = np.stack([snapshot.columns["norm"][weights] for snapshot in snapshots])  # [T, W]
    is_usable = np.isfinite(norms).all(axis=1) & (norms > 0).any(axis=1)  # [T]
    steps = np.array([snapshot.step for snapshot in snapshots])[is_usable]
    n_steps = len(steps)
    if len(weights) < 3 or n_steps < limits.spike_warm_up + limits.window:
        return []
    shares = norms[is_usable] / _median_of_positive(norms[is_usable])  # [T, W]
    starts = np.arange(limits.spike_warm_up, n_steps - limits.window + 1)  # [S]
    means = (np.cumsum(shares, axis=0)[starts - 1]) / starts[:, None]  # [S, W], of the steps before each start
    highest = np.maximum.accumulate(shares[::-1], axis=0)[::-1][starts]  # [S, W], from each start on
    lowest = np.minimum.accumulate(shares[::-1], axis=0)[::-1][starts]
    has_left = highest < limits.drift_fall * means
    if not is_converging:
        has_left |= (lowest > limits.drift_rise * means) & (means > 0)
    if not has_left.any():
        return []
    first = np.where(has_left.any(axis=0), has_left.argmax(axis=0), len(starts))  # [W]
    order = [int(w) for w in np.argsort(first, kind="stable") if first[w] < len(starts)]
    w, start = order[0], int(first[order[0]])
    factor = float(np.median(shares[starts[start] :, w]) / means[start, w])
    since = (int(steps[starts[start]]), int(steps[-1]))
    others = f"; so have {len(order) - 1} others" if len(order) > 1 else ""
    message = (
        f"steps {since[0]} to {since[1]}: the gradient of {table.names[weights[w]]}, measured by those of the other "
        f"weights, has become {factor:.2g} times its mean of the steps before{others}"
    )
    evidence = {"factor": factor, "drifted": float(len(order))}
    return [finding("layer drift", tuple(table.names[weights[w]] for w in order), since, evidence, message)]


def _median_of_positive(norms: FloatArray) -> FloatArray:
    """Median over the weights that have a gradient, in each step. Shapes [T, W] and [T, 1]."""
    medians = np.median(norms, axis=1)
    for step in np.flatnonzero((norms == 0).any(axis=1)):
        medians[step] = np.median(norms[step][norms[step] > 0])
    return medians[:, None]
