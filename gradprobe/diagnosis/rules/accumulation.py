"""A rule on gradients that are never cleared: does each step add to those of the step before?"""

from __future__ import annotations

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import Rule
from gradprobe.diagnosis.run_history import RunHistory


def _not_cleared(history: RunHistory) -> Finding | None:
    limits = history.limits
    is_hit = np.array([one.is_accumulated for one in history.snapshots])  # [T]
    if 2 * is_hit.sum() <= len(is_hit):
        return None
    # `grad.data.zero_()` clears a gradient unseen. Sums that add up change little from one step to the next.
    always = history.present.all(axis=0)
    means = history.column("mean")[:, always]  # [T, P]
    means = means[np.isfinite(means).all(axis=1)]  # [F, P]
    if len(means) < limits.window:
        return None
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ratios = (np.diff(means, axis=0) ** 2).mean(axis=0) / means.var(axis=0)  # [P]
    ratio = float(np.median(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else np.nan
    if not ratio < limits.successive_ratio:
        return None
    hits = np.flatnonzero(is_hit)
    steps = (history.snapshots[hits[0]].step, history.snapshots[hits[-1]].step)
    message = (
        f"steps {steps[0]} to {steps[1]}: in {len(hits)} of {len(is_hit)} steps the backward pass added to gradients "
        "that an optimizer had already used, so that they hardly differ from step to step"
    )
    evidence = {"share_of_steps": len(hits) / len(is_hit), "successive_ratio": ratio}
    return GRADIENTS_NOT_CLEARED.finding((), steps, evidence, message)


GRADIENTS_NOT_CLEARED = Rule(
    "gradients not cleared",
    meaning="each step adds to the gradients of the last",
    formula="in more than half of the steps, the first backward pass added to the gradients of the step before, and "
    "the mean square of their successive differences over their variance < successive_ratio, in the median over the "
    "parameters; the limit is ours",
    source="arithmetic, by the version counters of the gradients; the ratio is that of von Neumann, "
    "'Distribution of the Ratio of the Mean Square Successive Difference to the Variance' (1941)",
    cause="optimizer.zero_grad() is not called in each step, or is called for another optimizer",
    remedies=("call optimizer.zero_grad() before each backward pass, or after each step",),
    check=_not_cleared,
    judges_converging=True,
    n_steps=lambda limits: limits.window,
)
