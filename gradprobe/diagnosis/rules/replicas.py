"""A rule on parameters of which several ranks hold a copy: do their gradients agree?"""

from __future__ import annotations

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.text.words import quoted


def _replicas_differ(history: RunHistory) -> Finding | None:
    compared = [one for one in history.judged if one.differ is not None]
    differ = np.array([one.differ for one in compared])  # [T, K]
    if not len(compared):
        return None
    found = np.flatnonzero(2 * differ.sum(axis=0) > len(compared))
    if not len(found):
        return None
    names = tuple(history.table.names[k] for k in found)
    is_hit = np.asarray(differ[:, found].any(axis=1))
    steps = [one.step for one, hit in zip(compared, is_hit, strict=True) if hit]
    others = f" and of {len(names) - 1} other parameters" if len(names) > 1 else ""
    message = (
        f"steps {steps[0]} to {steps[-1]}: the copies of the gradient of {quoted(names[0])}{others} that several "
        "ranks hold are not the same"
    )
    evidence = {"parameters": float(len(names)), "share_of_steps": float(is_hit.mean())}
    return REPLICAS_DIFFER.finding(names, (steps[0], steps[-1]), evidence, message)


REPLICAS_DIFFER = Rule(
    "replicas differ",
    meaning="ranks disagree on a shared gradient",
    formula="in more than half of the steps, the sums of squares of the copies of a gradient differ by more than 4 eps "
    "of its dtype, or the numbers of zeros of all copies together do not divide by the number of copies",
    source="arithmetic: equal copies of a parameter stay equal only if they get equal gradients",
    cause="gradients that are not reduced over all ranks that hold a copy: a parameter outside of FSDP or DDP, or "
    "experts that their mesh does not know of",
    remedies=(
        "wrap the whole model, or average these gradients over the ranks before the optimizer's step",
        "if they are pieces of a whole and no copies, give attach their process group by name",
        "compare the parameters themselves across the ranks; start again from one checkpoint",
    ),
    check=_replicas_differ,
    needs=("copies on several ranks",),
    judges_converging=True,
)
