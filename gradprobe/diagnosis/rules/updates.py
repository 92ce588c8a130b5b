"""Rules on the optimizer's updates: does it move the weights too far, or not at all?"""

from __future__ import annotations

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import CLIP, INITIALISE, SAGEMAKER, Rule
from gradprobe.diagnosis.run_history import RunHistory


def _too_large(history: RunHistory) -> Finding | None:
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
        f"step {updates.steps[at]}: {updates.names[first]} is moved by {ratio:.3g} times its own norm; {len(found)} of "
        f"{len(updates.names)} weights are moved by more than {limits.update_ratio_high:g} times, in this step or "
        "another"
    )
    steps = (updates.steps[at], updates.steps[last])
    evidence = {"update_ratio": ratio, "weights": float(len(found))}
    return UPDATES_TOO_LARGE.finding(tuple(updates.names[w] for w in in_order), steps, evidence, message)


UPDATES_TOO_LARGE = Rule(
    "updates too large",
    formula="norm(update) / norm(weight) > update_ratio_high in at least one observed step, for at least half of the "
    "weights, in a run that does not converge; the half is ours",
    source=f"{SAGEMAKER}, rule WeightUpdateRatio",
    cause="a learning rate that is too high for the weights; one such step can leave units dead or saturated for good",
    remedies=("a lower learning rate or a warm-up", CLIP, INITIALISE),
    check=_too_large,
    needs=("updates=True",),
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
    message = (
        f"steps {steps[0]} to {steps[1]}: {len(found)} of {len(updates.names)} weights have a gradient but hardly "
        f"move; the first is {updates.names[first]}, which moves by {ratio:.2g} times its norm in a step, and of whose "
        f"elements {max(lost, 0.0):.0%} have a gradient but do not move"
    )
    evidence = {"update_ratio": ratio, "lost_share": lost, "weights": float(len(found))}
    return UPDATES_TOO_SMALL.finding(tuple(updates.names[w] for w in found), steps, evidence, message)


UPDATES_TOO_SMALL = Rule(
    "updates too small",
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
