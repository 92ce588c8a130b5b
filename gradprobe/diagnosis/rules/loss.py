"""Rules on the course of a run: its losses and its total gradient norm."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import AUTOTRAINER, CLIP, INITIALISE, SAGEMAKER, Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.snapshot.records import FloatArray


def _blow_up(history: RunHistory) -> Finding | None:
    limits = history.limits
    start_step, start = history.first_losses[0]

    def is_high(step: int, loss: float) -> bool:
        risen = loss > limits.spike_jump * start or step == start_step < limits.window
        return not math.isfinite(loss) or (loss >= limits.loss_limit and risen)

    high = [(step, loss) for step, loss in history.losses if is_high(step, loss)]
    if not high:
        return None
    step, loss = high[0]
    before = f"after {start:.3g} at step {start_step}" if step != start_step else "in the first step that has a loss"
    message = f"step {step}: the loss is {loss:.3g}, {before}"
    if step == start_step and math.isfinite(loss):
        message += (
            f"; a uniform guess among a million classes has {math.log(1e6):.3g}. Either the loss is on another scale, "
            "or the forward pass explodes: "
        )
        message += (
            "the observed activations do not show that" if history.observed else "attach(activations=True) tells which"
        )
    return LOSS_BLOW_UP.finding((), (step, high[-1][0]), {"loss": loss, "loss_at_start": start}, message)


LOSS_BLOW_UP = Rule(
    "loss blow-up",
    meaning="the loss is huge, NaN or infinite",
    formula="a loss that is NaN or infinite, or >= loss_limit and either the first or above spike_jump times the "
    "first, in a run that does not converge; the comparison with the first is ours",
    source=AUTOTRAINER,
    cause="a learning rate that is too high, or activations that grow from layer to layer",
    remedies=("a lower learning rate or a warm-up", CLIP, "normalisation", INITIALISE),
    check=_blow_up,
    needs=("loss",),
    is_event=True,
)


def _unstable(history: RunHistory) -> Finding | None:
    losses, limits = history.losses, history.limits
    n = limits.window
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    n_blocks = len(values) // n
    # A ratio of losses means nothing if some are negative.
    if not np.isfinite(values).all() or values.min() <= 0.0:
        return None
    blocks = values[-n_blocks * n :].reshape(n_blocks, n)
    with np.errstate(over="ignore"):
        means, std_errors = blocks.mean(axis=1), np.sqrt(blocks.var(axis=1, ddof=1) / n)  # [B] each
    turns = _turns(means, std_errors, limits)
    rises = [(start, end) for start, end in turns if means[start] < means[end]]
    if not rises:
        return None
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
    return UNSTABLE_LOSS.finding((), steps, evidence, message)


def _turns(means: FloatArray, std_errors: FloatArray, limits: Thresholds) -> list[tuple[int, int]]:
    """Returns the clear falls and rises of block means [B], alternating: first and last block of each."""

    def is_clear(high: int, low: int) -> bool:
        drop = float(means[high] - means[low])
        error = math.hypot(std_errors[high], std_errors[low])
        return means[low] < limits.converging * means[high] and drop > limits.swing_errors * error

    starts: list[int] = []
    highest = lowest = 0  # since the last turn
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


UNSTABLE_LOSS = Rule(
    "unstable loss",
    meaning="the loss falls and rises again",
    formula="a mean of `window` losses < converging times a later one and swing_errors standard errors below it, in a "
    "run that does not converge; the rule is ours, the source compares the accuracy of epochs",
    source=f"{AUTOTRAINER}, oscillating loss",
    cause="a learning rate at the edge of what is stable, or above it once training has made the loss steeper",
    remedies=(
        "a lower learning rate, or one that decays",
        CLIP,
        "larger batches",
        "look at the order of the data: does each batch hold the same mix?",
    ),
    check=_unstable,
    needs=("loss", "a loss of its own"),
    is_event=True,
    n_steps=lambda limits: 3 * limits.window,
)


def _not_learning(history: RunHistory) -> Finding | None:
    losses, limits = history.losses, history.limits
    if history.has_fallen:
        return None
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    n = limits.window
    # Without the first steps after attach, a loss that stays level may be one that is already low.
    first = history.first_losses
    start, end = np.array([loss for _, loss in first], dtype=np.float64), values[-n:]  # [n] each
    if first[0][0] >= n or not (np.isfinite(start).all() and np.isfinite(end).all()):
        return None
    std_error = math.sqrt(float(start.var(ddof=1) + end.var(ddof=1)) / n)
    # A level loss may also be one that has been learned before; one of a uniform guess shows that nothing was.
    n_classes = max(history.n_classes, 2)
    guess = math.log(n_classes)
    high = limits.guess_high if history.n_classes > 1 else 1.05  # one output may also be that of a regression
    # An untrained network mostly starts above a uniform guess, and falls to it whatever the labels.
    drop = min(float(start.mean()), guess) - float(end.mean())
    is_falling = float(values[-2 * n : -n].mean() - end.mean()) > limits.drop_errors * std_error
    is_guess = limits.guess_low * guess <= end.mean() <= high * guess
    if drop > limits.drop_errors * std_error or is_falling or not is_guess:
        return None
    steps = (first[0][0], losses[-1][0])
    message = (
        f"steps {steps[0]} to {steps[1]}: the loss was {start.mean():.4g} and is {end.mean():.4g}, with a standard "
        f"error of {std_error:.2g}: as a cross-entropy no better than a uniform guess among {n_classes} classes, "
        f"which has {guess:.4g}"
    )
    evidence = {
        "loss_at_start": float(start.mean()),
        "loss_at_end": float(end.mean()),
        "std_error": std_error,
        "loss_of_a_guess": guess,
    }
    return NOT_LEARNING.finding((), steps, evidence, message)


NOT_LEARNING = Rule(
    "not learning",
    meaning="the loss is that of a guess",
    formula="mean loss of the last `window` steps not by drop_errors standard errors below that of the first steps, of "
    "the `window` before and of a uniform guess, which is the logarithm of the number of outputs of the last layer (of "
    "two for one output), and between guess_low and guess_high times the last, in a run whose loss has not clearly "
    "fallen; the comparison with a guess is ours: a level loss alone may be that of a model that was trained before",
    source=f"{SAGEMAKER}, rule LossNotDecreasing",
    cause="a learning rate near zero or far too high, labels that do not belong to the inputs, or gradients that do "
    "not arrive",
    remedies=(
        "try to overfit one batch: if the loss does not fall, the learning rate or the gradients are at fault; if it "
        "does, check that inputs and labels belong together",
        "learning rates ten times higher and lower",
    ),
    check=_not_learning,
    needs=("loss", "a number of classes", "a loss of its own"),
    n_steps=lambda limits: 2 * limits.window,
)


def _spike(history: RunHistory) -> Finding | None:
    limits = history.limits
    found: list[tuple[int, str, float, float, float]] = []
    series = (
        ("total norm", history.total_norms, limits.spike_norm_jump),
        ("loss", history.losses, limits.spike_jump),
    )
    for quantity, points, jump in series:
        finite = [(step, value) for step, value in points if math.isfinite(value)]  # other rules judge the rest
        values = np.array([value for _, value in finite], dtype=np.float64)
        if len(values) <= limits.spike_warm_up:
            continue
        padded = np.concatenate([np.full(limits.window, -math.inf), values])
        nearby = sliding_window_view(padded, limits.window).max(axis=1)[:-1]  # of the steps before each
        is_new = np.arange(len(values)) >= max(limits.spike_warm_up, len(values) - history.n_new)
        for k in np.flatnonzero(is_new & (nearby > 0) & (values > jump * nearby)).tolist():
            before = values[max(0, k - limits.spike_window) : k]
            mean, sigma = float(before.mean()), float(before.std())
            if values[k] > mean + limits.spike_sigmas * sigma and _is_log_spike(before, float(values[k]), limits):
                found.append((finite[k][0], quantity, float(values[k]), mean, sigma))
                break
    if not found:
        return None
    step, quantity, value, mean, sigma = min(found)
    message = f"step {step}: {quantity} {value:.3g}, compared with {mean:.3g} ± {sigma:.2g} over the steps before"
    return SPIKE.finding((), (step, step), {"value": value, "mean": mean, "sigma": sigma}, message)


def _is_log_spike(before: FloatArray, value: float, limits: Thresholds) -> bool:
    if (before < 0).any():
        return True
    logs = np.log(before[before > 0])
    if len(logs) < limits.spike_warm_up:  # a loss that is zero most of the time, as of a solved hinge
        return False
    return math.log(value) > float(logs.mean()) + limits.spike_log_sigmas * float(logs.std())


SPIKE = Rule(
    "spike",
    meaning="one step stands far out",
    formula="total norm or loss more than spike_sigmas standard deviations above the mean of the last spike_window "
    "steps, its logarithm more than spike_log_sigmas above that of the logarithms, and more than spike_norm_jump or "
    "spike_jump times the largest of the last `window`; the logarithms and both factors are ours",
    source="OLMo 2 (OLMo et al. 2024), section 3.2",
    cause="a bad batch, or a learning rate at the edge of what is stable",
    remedies=("look at the batch of that step", CLIP, "a lower learning rate"),
    check=_spike,
    judges_converging=True,
    is_event=True,
    n_steps=lambda limits: limits.spike_warm_up + 1,
)
