"""Rules on the gradients of the parameters: their values, their norms over depth, and their course over time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.depth import ends_verdict, inner_trend, layer_statuses, weight_names, weight_norms
from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import AUTOTRAINER, CLIP, SAGEMAKER, Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.snapshot.records import FloatArray
from gradprobe.text.words import quoted


def _nonfinite(history: RunHistory) -> Finding | None:
    hits = history.flows["non-finite"]
    if not hits:
        return None
    first = hits[0]
    names = tuple(name for name, stats in first.sites.items() if stats.nonfinite or not math.isfinite(stats.norm))
    count = sum(stats.nonfinite for stats in first.sites.values())
    message = (
        f"step {first.step}: {count} gradient elements are NaN or infinite, in {len(names)} of {len(first)} parameters"
    )
    origin, remedy = first.first_nonfinite(), 0
    if origin is None or first.signals is None:
        tensor = origin.tensor if origin else f"gradient of {quoted(names[0])}"
        message += f"; the backward pass met the first in the {tensor}"
    else:
        message += f"; it began in the {origin.phase} pass, with the {origin.tensor}"
        ran = [name for name, seen in first.activations.items() if seen.output.numel]
        remedy = 1 if origin.phase == "forward" and origin.site in ran[:1] else 2
    evidence = {"nonfinite": float(count)}
    return NON_FINITE.finding(names, (first.step, hits[-1].step), evidence, message, first=remedy)


NON_FINITE = Rule(
    "non-finite",
    meaning="a gradient is NaN or infinite",
    formula="a NaN or an infinity in any gradient of any step",
    source=f"{SAGEMAKER}, rule ExplodingTensor",
    cause="an overflow (in float16 above 65,504), a division by zero, the logarithm of zero, bad data, or a step that "
    "was too large",
    remedies=(
        "attach(activations=True), and let probe.first_nonfinite() name the module where it begins",
        "check whether the values in the batch of that step are finite",
        "look at what the module named computes in that step",
        "a lower learning rate",
        CLIP,
        "in float16, a scaled loss (torch.amp.GradScaler), or bfloat16",
        "a guarded operation: an epsilon under the root and in the denominator, logsumexp for the logarithm",
    ),
    check=_nonfinite,
    judges_converging=True,
    is_event=True,
)


def _exploding(history: RunHistory) -> Finding | None:
    if _is_frequent("exploding", history):
        return _over_depth("exploding", history)
    if not _explodes_then_vanishes(history):
        return None
    found, n_vanishing = _over_depth("exploding", history), len(history.flows["vanishing"])
    return replace(
        found,
        evidence=found.evidence | {"vanishing_steps": float(n_vanishing)},
        message=f"{found.message}; in {n_vanishing} later steps it vanishes, which long steps along an exploding "
        "gradient can cause: try a lower learning rate at the start to find out",
    )


def _vanishing(history: RunHistory) -> Finding | None:
    is_fault = _is_frequent("vanishing", history) and not _explodes_then_vanishes(history)
    return _over_depth("vanishing", history) if is_fault else None


def _is_frequent(flow: Literal["exploding", "vanishing"], history: RunHistory) -> bool:
    return 2 * len(history.flows[flow]) > len(history.judged)


def _explodes_then_vanishes(history: RunHistory) -> bool:
    """Whether the gradient explodes at the first step and vanishes in most of the others: exploding is the fault."""
    exploding = history.flows["exploding"]
    return bool(exploding) and exploding[0] is history.judged[0] and _is_frequent("vanishing", history)


def _over_depth(flow: Literal["exploding", "vanishing"], history: RunHistory) -> Finding:
    hits, limits = history.flows[flow], history.limits
    newest = hits[-1]
    names, norms = weight_names(newest), weight_norms(newest)
    ratio = norms[0] / norms[-1] if norms[-1] else (math.inf if norms[0] else 0.0)
    evidence = {"norm_first": norms[0], "norm_last": norms[-1], "ratio": ratio}
    line = inner_trend(norms)
    if math.isfinite(line.std_error):
        evidence |= {"factor_per_layer": line.factor, "std_error": line.std_error}
    by_ends = ends_verdict(norms, limits) == flow
    first, last = (norms[0], norms[-1]) if by_ends else (line.first, line.last)
    statuses = layer_statuses(norms, last, limits)
    concerned = tuple(name for name, status in zip(names, statuses, strict=True) if status == flow)
    if flow == "vanishing":
        limit = f"< {limits.vanishing_ratio:g} with the first < {limits.vanishing_norm:g}"
    else:
        limit = f"> {limits.exploding_ratio:g}"
    first_name, last_name = quoted(names[0]), quoted(names[-1])
    message = f"gradient norm {norms[0]:.2e} at {first_name} and {norms[-1]:.2e} at {last_name}; first/last {ratio:.2e}"
    if not by_ends:
        message += (
            f"; the line fitted to the {len(norms) - 2} between them goes from {first:.2e} to {last:.2e}, by "
            f"{line.factor:.3g} ± {line.std_error:.2g} per layer, and {first / last:.2e}"
        )
    message = f"step {newest.step}: {message} is {limit}: {flow} towards the input"
    if norms[0] == 0.0:
        message = (
            f"step {newest.step}: no gradient at all reaches {first_name}: it is exactly zero there, and "
            f"{norms[-1]:.2e} at {last_name}"
        )
    rule = EXPLODING if flow == "exploding" else VANISHING
    return rule.finding(concerned, (hits[0].step, newest.step), evidence, message)


EXPLODING = Rule(
    "exploding",
    meaning="the gradient grows from layer to layer towards the input",
    where="backward",
    formula="norm(first) / norm(last) > exploding_ratio in more than half of the steps, in a run that does not "
    "converge; or at the first step, if the gradient vanishes in more than half of them (ours); or the same ratio on a "
    "line through the log-norms of at least slope_sites weights, without the first and the last, that rises by "
    "slope_errors standard errors (ours)",
    source=AUTOTRAINER,
    cause="each layer multiplies the gradient by more than one on its way to the input",
    remedies=(
        "residual connections; in a deep plain network batch normalisation alone is no remedy",
        "a smaller initialisation",
        "a lower learning rate or a warm-up",
        CLIP,
    ),
    check=_exploding,
)

VANISHING = Rule(
    "vanishing",
    meaning="almost no gradient reaches the first layers",
    where="backward",
    formula="norm(first) / norm(last) <= vanishing_ratio and norm(first) < vanishing_norm in more than half of the "
    "steps, in a run that does not converge, and with at least slope_sites weights between them also relative to the "
    "last but one (ours); or the same on a line through the log-norms, as for exploding (ours)",
    source=AUTOTRAINER,
    cause="each layer multiplies the gradient by less than one on its way to the input",
    remedies=(
        "residual connections",
        "normalisation; with sigmoids only batch normalisation helps",
        "ReLU with He initialisation",
        "a larger initialisation: Xavier for tanh",
    ),
    check=_vanishing,
)

# Dead ReLUs and dying layers have the same cause.
DEAD_UNITS = "units that no input activates: large negative biases, after too large an update"
DEAD_FROM_THE_START = "units that no input activates before the first update: negative biases that outweigh the inputs"
REVIVE_UNITS = (
    "a lower learning rate",
    "He initialisation with zero biases",
    "leaky ReLU or GELU",
    "normalisation before the ReLU",
)
INITIALISE_UNITS = 1  # position of the remedy for units that are dead from the start


def _dying(history: RunHistory) -> Finding | None:
    # The gradient of an embedding is zero for each row that was not looked up: at least two weights must be dying.
    n_steps, limits = len(history.snapshots), history.limits
    table, present, shares = history.table, history.present, history.column("zero_fraction")  # [T, K]
    weights = np.flatnonzero((np.asarray(table.ndims) > 1) & (2 * present.sum(axis=0) > n_steps))
    is_dying = 2 * (present & (shares >= limits.dying_share)).sum(axis=0) > n_steps  # [K]
    found = weights[is_dying[weights]]
    if len(found) < max(2, limits.dying_sites * len(weights)):
        return None
    names = tuple(table.names[k] for k in found)
    share = float(np.median(shares[present[:, found[0]], found[0]]))
    steps = (history.snapshots[0].step, history.snapshots[-1].step)
    message = (
        f"steps {steps[0]} to {steps[1]}: in {len(found)} of {len(weights)} weights at least {limits.dying_share:.0%} "
        f"of the gradient elements are exactly zero; the first is {quoted(names[0])} with {share:.0%}"
    )
    evidence = {"zero_share": share, "dying": float(len(found)), "weights": float(len(weights))}
    is_dying_at_first = present[0, found] & (shares[0, found] >= limits.dying_share)
    if steps[0] == 0 and is_dying_at_first.all():
        return DYING.finding(names, steps, evidence, message, INITIALISE_UNITS, DEAD_FROM_THE_START)
    return DYING.finding(names, steps, evidence, message)


DYING = Rule(
    "dying",
    meaning="most elements of many gradients are exactly zero",
    formula="share of exact zeros >= dying_share in the gradients of at least dying_sites of the weights, and of at "
    "least two, in more than half of the steps, in a run that does not converge; dying_sites is ours",
    source=f"{AUTOTRAINER}, gamma",
    cause=DEAD_UNITS,
    remedies=REVIVE_UNITS,
    check=_dying,
    n_steps=lambda limits: limits.window,
)


def _silent(history: RunHistory) -> Finding | None:
    always = history.present.all(axis=0)  # [K]
    is_zero = history.column("abs_max") == 0.0  # [T, K]
    is_silent = always & is_zero[-history.limits.window :].all(axis=0)  # [K]
    if not is_silent.any() or not (always & ~is_silent).any():
        return None
    names = tuple(history.table.names[k] for k in np.flatnonzero(is_silent))
    moved = np.flatnonzero(~is_zero[:, is_silent].all(axis=1))
    first = int(moved[-1]) + 1 if len(moved) else 0  # from here on all of them are zero
    steps = (history.snapshots[first].step, history.snapshots[-1].step)
    n_others = len(names) - 1
    others = f", and so is that of {n_others} more parameter{'s' * (n_others > 1)}" if n_others else ""
    before = f"; before step {steps[0]} it was not" if first else ""
    message = f"steps {steps[0]} to {steps[1]}: the gradient of {quoted(names[0])} is exactly zero{others}{before}"
    return SILENT.finding(names, steps, {"silent": float(len(names))}, message)


SILENT = Rule(
    "silent parameter",
    meaning="a parameter gets a gradient of exactly zero",
    formula="a gradient that is exactly zero in each of the last `window` steps or more, while other parameters have "
    "one that is not; also in a run that converges",
    source="arithmetic: such a parameter no longer moves",
    cause="the parameter does not reach the loss: multiplied by zero, detached, or behind dead units",
    remedies=("look at how its output is used", "set requires_grad=False if that is intended"),
    check=_silent,
    judges_converging=True,
    n_steps=lambda limits: limits.window,
)


def _drift(history: RunHistory) -> Finding | None:
    limits = history.limits
    table = history.table
    weights = np.flatnonzero((np.asarray(table.ndims) > 1) & history.present.all(axis=0))  # [W]
    norms = history.column("norm")[:, weights]  # [T, W]
    is_usable = np.isfinite(norms).all(axis=1) & (norms > 0).any(axis=1)  # [T]
    steps = np.array([snapshot.step for snapshot in history.snapshots])[is_usable]
    n_steps = len(steps)
    if len(weights) < 3 or n_steps < limits.spike_warm_up + limits.window:
        return None
    norms = norms[is_usable]
    starts = np.arange(limits.spike_warm_up, n_steps - limits.window + 1)  # [S]
    # No weight has left at any start whose last norm is not outside the limits.
    may_have_left = (norms[-1] < limits.drift_fall * norms.max(axis=0)) | (
        norms[-1] > limits.drift_rise * norms.min(axis=0)
    )
    left, risen = _departures(norms[:, may_have_left], starts, limits)  # [S, W']
    if not (left | risen).any():
        return None
    # If only the other layers change, a layer's share changes but not its norm.
    shares = (norms / _median_of_positive(norms))[:, may_have_left]
    left_by_share, risen_by_share = _departures(shares, starts, limits)
    has_left = left & left_by_share
    if not history.is_converging:
        has_left |= risen & risen_by_share
    if not has_left.any():
        return None
    weights = weights[may_have_left]
    first = np.where(has_left.any(axis=0), has_left.argmax(axis=0), len(starts))  # [W]
    order = [int(w) for w in np.argsort(first, kind="stable") if first[w] < len(starts)]
    w, start = order[0], int(first[order[0]])
    factor = float(np.median(shares[starts[start] :, w]) / _means_before(shares, starts)[start, w])
    since = (int(steps[starts[start]]), int(steps[-1]))
    others = f"; {len(order) - 1} other weights have drifted too" if len(order) > 1 else ""
    message = (
        f"steps {since[0]} to {since[1]}: the gradient of {quoted(table.names[weights[w]])}, relative to those of the "
        f"other weights, has become {factor:.2g} times its mean over the steps before{others}"
    )
    evidence = {"factor": factor, "drifted": float(len(order))}
    return DRIFT.finding(tuple(table.names[weights[w]] for w in order), since, evidence, message)


def _departures(
    values: FloatArray, starts: npt.NDArray[np.intp], limits: Thresholds
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Returns which weights are, from each start on, far below their mean before it, and which far above. [S, W]."""
    means = _means_before(values, starts)
    highest = np.maximum.accumulate(values[::-1], axis=0)[::-1][starts]  # from each start on
    lowest = np.minimum.accumulate(values[::-1], axis=0)[::-1][starts]
    return highest < limits.drift_fall * means, (lowest > limits.drift_rise * means) & (means > 0)


def _means_before(values: FloatArray, starts: npt.NDArray[np.intp]) -> FloatArray:
    """Returns the mean of the steps before each start. [T, W] to [S, W]."""
    return np.asarray(np.cumsum(values, axis=0)[starts - 1] / starts[:, None])


def _median_of_positive(norms: FloatArray) -> FloatArray:
    """Returns the median over the weights with a nonzero gradient in each step. Shapes [T, W] and [T, 1]."""
    medians = np.median(norms, axis=1)
    for step in np.flatnonzero((norms == 0).any(axis=1)):
        medians[step] = np.median(norms[step][norms[step] > 0])
    return medians[:, None]


DRIFT = Rule(
    "layer drift",
    meaning="a layer's gradient has left its usual size for good",
    formula="norm of a weight's gradient, both by itself and relative to the median over all weights, in each of at "
    "least the last `window` steps < drift_fall times its own mean over at least spike_warm_up steps before; or > "
    "drift_rise times that mean, in a run that does not converge; the rule is ours",
    source="compares a layer with its own running mean, so that no limit has to fit all layers",
    cause="the layer was cut off or died on the way: dead units, saturation, a mask or a factor that became zero",
    remedies=(
        "look at the steps before the first one named",
        "look at how the layer's output is used",
        "a lower learning rate",
        CLIP,
    ),
    check=_drift,
    judges_converging=True,
    is_event=True,
    n_steps=lambda limits: limits.spike_warm_up + limits.window,
)
