"""A comparison of two runs in words, the same for the terminal and the page. It states what differs, never why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from gradprobe.report.comparison.compare import Comparison, Difference, Only, Parting
from gradprobe.report.comparison.rounding import FORMATS, Rounding
from gradprobe.report.comparison.sites import relative
from gradprobe.text.words import counted, listed, number, quoted, steps

KINDS = {
    "loss": "the loss",
    "parameter": "gradients of parameters",
    "weight": "parameters",
    "update": "updates",
    "activation": "outputs of modules",
    "activation_grad": "gradients at outputs",
    "junction_x": "residual adds",
}
"""What was recorded, in words, by kind."""

_COUNTS = {"zero_fraction": "zeros", "nonfinite": "not finite", "numel": "elements"}


def headline(found: Comparison) -> str:
    """Returns the result in one sentence."""
    compared = _steps(found.steps)
    if found.first is None:
        if found.equal:
            return f"The runs are equal: all that both recorded is the same, bit for bit, in {compared}."
        return f"The runs have different parameters; all that both recorded is the same, bit for bit, in {compared}."
    first, beyond = found.first, found.first_beyond
    start = (
        f"The runs first differ at step {first.step}"
        if first.before is not None
        else f"The runs differ from the first step that both have, step {first.step}"
    )
    if beyond is None:
        return f"{start}, and never by more than rounding."
    if beyond.step == first.step:
        return f"{start}, by more than rounding."
    return f"{start}, and by more than rounding from step {beyond.step} on."


def details(found: Comparison) -> Iterator[str]:
    """Yields what there is to say about the first step that differs, and about the steps after it."""
    first, beyond = found.first, found.first_beyond
    if first is None:
        return
    if first.before is not None:
        place = found.steps.index(first.step)
        yield f"Before it, {_steps(found.steps[:place])} {'are' if place > 1 else 'is'} equal, bit for bit." + (
            f" Steps {first.before + 1} to {first.step - 1} are not in both runs."
            if first.before < first.step - 1
            else ""
        )
    is_beyond = beyond is not None and beyond.step == first.step
    yield _parting(first, is_beyond)
    if beyond is not None and not is_beyond:
        yield _parting(beyond, True)
    n_steps, n_different, n_beyond = len(found.steps), int(found.is_different.sum()), int(found.is_beyond.sum())
    yield f"Of {n_steps:,} compared steps, {n_different:,} differ, {n_beyond:,} by more than rounding."
    yield "All differences are relative, 0.01 being one percent; those of tensors are differences of their norms."


def _parting(one: Parting, is_beyond: bool) -> str:
    gradients = one.of_kind("parameter")
    parts = [f"Step {one.step}: the gradients of {len(gradients)} of {one.n_parameters} parameters differ"]
    if gradients and not is_beyond:
        parts[0] += " by no more than rounding can"
    sized = [each for each in gradients if not each.is_negligible]
    if sized:
        parts.append(f"most that of {quoted(sized[0].name)}, {size_text(sized[0])}")
    updates = one.of_kind("update")
    if updates and not gradients:
        verb = "differs" if len(updates) == 1 else "differ"
        parts.append(f"the {counted(len(updates), 'update')} of {listed([each.name for each in updates])} {verb}")
    sentence = ", ".join(parts)
    facts = []
    if "loss" in one.facts:
        facts.append(f"the loss by {number(one.loss_size)}" if math.isfinite(one.loss_size) else _fact(one, "loss"))
    facts += [_fact(one, fact) for fact in one.facts if fact != "loss"]
    sentence += f"; {', '.join(facts)}." if facts else "; the loss is equal." if one.loss_size == 0 else "."
    weights = one.of_kind("weight")
    if weights:
        sentence += f" Of the parameters themselves, {len(weights)} differ{'s' if len(weights) == 1 else ''} already "
        sentence += f"before the update: {listed([each.name for each in weights])}."
    return sentence


def _fact(one: Parting, fact: str) -> str:
    a, b = one.facts[fact]
    if isinstance(a, bool):
        return "the optimizer's step is skipped in one run only"
    return f"{'the loss' if fact == 'loss' else 'the clipping factor'} is {_value(a)} and {_value(b)}"


def size_text(one: Difference) -> str:
    """Returns the relative difference of the norms, or what stands in for it."""
    if None in one.norms:
        return "missing in one run"
    if math.isinf(one.size):
        return "not finite in one run"
    return number(one.size) if one.size else "norm equal"


def kind_text(one: Difference) -> str:
    """Names what differs at a module."""
    names = {"activation": "output", "activation_grad": "gradient at output"}
    return names.get(one.kind, one.kind.replace("_", " "))


def other_text(one: Difference) -> str:
    """Says how statistics besides the norm differ: magnitude and mean by relative differences, counts by both."""
    found = []
    if "abs_max" in one.statistics:
        found.append(f"largest magnitude by {number(largest_size(one))}")
    if "mean" in one.statistics:
        found.append(f"mean by {number(one.mean_size)}")
    counts = counts_text(one)
    return ", ".join([*found, counts] if counts else found)


def largest_size(one: Difference) -> float:
    """Returns the relative difference of the largest magnitudes."""
    a, b = one.statistics.get("abs_max", (1.0, 1.0))
    return float(relative(np.array(a), np.array(b)))


def counts_text(one: Difference) -> str:
    """Names shares and counts that differ, with both values."""
    found = []
    for statistic, name in _COUNTS.items():
        if statistic in one.statistics:
            a, b = one.statistics[statistic]
            values = f"{a:.1%} and {b:.1%}" if statistic == "zero_fraction" else f"{a:,.0f} and {b:,.0f}"
            found.append(f"{name} {values}")
    return ", ".join(found)


def notes(found: Comparison) -> Iterator[str]:
    """Yields what was compared and what could not be, as one run lacks it."""
    compared = [KINDS[kind] for kind in KINDS if kind in found.compared]
    if any(not math.isnan(size) for size in found.course.loss_sizes):
        compared.insert(0, KINDS["loss"])
    yield f"Compared: {', '.join(compared)}; {counted(len(found.course.names), 'parameter')} in {_steps(found.steps)}."
    for name, recorded in zip(found.names, found.recorded, strict=True):
        if len(recorded) != len(found.steps):
            yield f"{name} has {_steps(recorded)}."
    for name, only in zip(found.names, found.only, strict=True):
        yield from _only(name, only)
    for note in found.notes:
        yield f"{note[:1].upper()}{note[1:]}."


def _only(name: str, only: Only) -> Iterator[str]:
    if only.parameters:
        yield f"Only {name} has {counted(len(only.parameters), 'parameter')} {listed(only.parameters)}."
    if only.kinds:
        yield f"Only {name} has {', '.join(KINDS[kind] for kind in only.kinds)}."
    if only.modules:
        yield f"Only {name} observes {counted(len(only.modules), 'module')} {listed(only.modules)}."


def method(rounding: Rounding) -> str:
    """States what was taken for rounding."""
    return (
        f"The runs compute in {FORMATS[rounding.bits]}, to judge by their largest magnitudes. Relative differences are "
        f"taken for rounding up to {number(rounding.whole)} in the loss and the norm of all gradients, and up to "
        f"{number(rounding.single)} in the norm of one gradient. In the first step that differs, if the step before it "
        f"is equal, the limit is {number(rounding.one_step)} in loss, outputs and parameters, and in the gradient that "
        f"differs least; in updates, if all gradients are equal, it is {number(rounding.single)}."
    )


def _steps(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return steps(first, last) if len(numbers) == 1 else f"{counted(len(numbers), 'step')} ({first} to {last})"


def _value(value: float | bool | None) -> str:
    return "missing" if value is None else number(float(value))
