"""Rules on the optimizer's updates: does it move the weights too far, or not at all?"""

from __future__ import annotations

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import CLIP, INITIALISE, SAGEMAKER, Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.text.words import quoted


def _too_large(history: RunHistory) -> Finding | None:
    return (None if history.is_converging else _huge_step(history)) or _large_early_steps(history)


def _huge_step(history: RunHistory) -> Finding | None:
    updates, limits = history.updates, history.limits
    # The ratio of a weight that starts at zero is infinite.
    is_hit = np.isfinite(updates.ratios) & (updates.ratios > limits.update_ratio_high)  # [T, W]
    found = np.flatnonzero(is_hit.any(axis=0))
    if not len(found) or 2 * len(found) < len(updates.names):
        return None
    in_order = found[np.argsort(is_hit[:, found].argmax(axis=0), kind="stable")]
    first = in_order[0]
    at = int(is_hit[:, first].argmax())
    ratio = float(updates.ratios[at, first])
    last = int(np.flatnonzero(is_hit.any(axis=1))[-1])
    message = (
        f"step {updates.steps[at]}: {quoted(updates.names[first])} is moved by {ratio:.3g} times its own norm; "
        f"{len(found)} of {len(updates.names)} weights are moved by more than {limits.update_ratio_high:g} times, in "
        "this step or another"
    )
    steps = (updates.steps[at], updates.steps[last])
    evidence = {"update_ratio": ratio, "weights": float(len(found))}
    return UPDATES_TOO_LARGE.finding(tuple(updates.names[w] for w in in_order), steps, evidence, message)


def _large_early_steps(history: RunHistory) -> Finding | None:
    # Weights that are moved too far grow, and the ratio falls to that of a healthy run: only the first steps tell.
    updates, limits = history.updates, history.limits
    early = np.flatnonzero(np.array(updates.steps) < limits.window)  # [E]
    losses = np.array([loss for step, loss in history.first_losses if step < limits.window])
    if not len(early) or len(losses) < 2 or not 0 < losses[0] < np.inf:
        return None
    ratios = np.where(np.isfinite(updates.ratios), updates.ratios, np.nan)[early]  # [E, W]
    is_usable = ~np.isnan(ratios).all(axis=0)
    if not is_usable.any():
        return None
    medians = np.nanmedian(ratios[:, is_usable], axis=0)
    ratio, highest = float(np.median(medians)), float(losses.max())
    if not (ratio > limits.early_update_ratio and highest > limits.early_rise * losses[0]):
        return None
    names = tuple(updates.names[w] for w in np.flatnonzero(is_usable)[medians > limits.early_update_ratio])
    steps = (updates.steps[early[0]], updates.steps[early[-1]])
    message = (
        f"the learning rate is too high: in steps {steps[0]} to {steps[1]} the median weight tensor moves by "
        f"{ratio:.0%} of its norm in a step, where 0.1% is usual, and the loss rises from {losses[0]:.3g} to "
        f"{highest:.3g}"
    )
    evidence = {"update_ratio": ratio, "loss_at_start": float(losses[0]), "loss": highest}
    return UPDATES_TOO_LARGE.finding(names, steps, evidence, message)


UPDATES_TOO_LARGE = Rule(
    "updates too large",
    meaning="the optimizer moves the weights too far",
    formula="norm(update) / norm(weight) > update_ratio_high in at least one observed step, for at least half of the "
    "weights, in a run that does not converge; or, in any run, its median over the weights and the first `window` "
    "steps > early_update_ratio while a loss exceeds early_rise times the first; the half and the second part are ours",
    source=f"{SAGEMAKER}, rule WeightUpdateRatio; CS231n, Neural Networks Part 3: healthy near 1e-3",
    cause="a learning rate that is too high for the weights; one such step can leave units dead or saturated for good",
    remedies=("a lower learning rate or a warm-up", CLIP, INITIALISE),
    check=_too_large,
    needs=("updates=True",),
    judges_converging=True,
    is_event=True,
)


def _too_small(history: RunHistory) -> Finding | None:
    updates, limits = history.updates, history.limits
    with np.errstate(invalid="ignore"):
        is_still = (updates.ratios < limits.update_ratio_low) | (updates.lost > limits.lost_share)
    is_hit = is_still & ~np.isnan(updates.lost)  # [T, W]
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(updates.steps))
    if not len(found):
        return None
    first = found[0]
    ratio, lost = (float(np.median(values[is_hit[:, first], first])) for values in (updates.ratios, updates.lost))
    steps = (updates.steps[0], updates.steps[-1])
    is_rounded = ratio >= history.limits.update_ratio_low  # the steps are large enough, but not for the dtype
    message = (
        f"steps {steps[0]} to {steps[1]}: {len(found)} of {len(updates.names)} weight tensors have a gradient but "
        f"hardly move; the first is {quoted(updates.names[first])}, which moves by {ratio:.2g} of its norm in a step, "
        f"while {max(lost, 0.0):.0%} of its elements with a gradient stay as they are"
    )
    if is_rounded:
        message += ": such steps are rounded away in the dtype of the weights"
    evidence = {"update_ratio": ratio, "lost_share": lost, "weights": float(len(found))}
    names = tuple(updates.names[w] for w in found)
    return UPDATES_TOO_SMALL.finding(names, steps, evidence, message, first=int(is_rounded))


UPDATES_TOO_SMALL = Rule(
    "updates too small",
    meaning="the optimizer hardly moves the weights",
    formula="norm(update) / norm(weight) < update_ratio_low, or share of the weight's elements that have a gradient "
    "and do not move > lost_share, in more than half of at least `window` observed steps, in a run that does not "
    "converge; the second limit is ours",
    source=f"{SAGEMAKER}, rule WeightUpdateRatio; Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192, "
    "on updates that rounding cancels",
    cause="a learning rate near zero, a gradient that vanishes, or weights whose dtype is too coarse for such steps",
    remedies=(
        "a higher learning rate",
        "weights in float32, the computation in bfloat16 under torch.autocast",
        "look at the gradients: do they vanish towards the input?",
    ),
    check=_too_small,
    needs=("updates=True",),
    n_steps=lambda limits: limits.window,
)
