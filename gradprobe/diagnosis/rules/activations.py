"""Rules on the forward pass: outputs of modules and of residual adds, in the order of execution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.gradients import DEAD_FROM_THE_START, DEAD_UNITS, INITIALISE_UNITS, REVIVE_UNITS
from gradprobe.diagnosis.rules.rule import INITIALISE, SAGEMAKER, Rule
from gradprobe.diagnosis.run_history import ForwardPasses, RunHistory
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.diagnosis.trend import fit_trend
from gradprobe.text.words import quoted

_LARGEST_SLOPE = {"Tanh": 1.0, "Sigmoid": 0.25}
_RELUS = ("ReLU", "ReLU6")


def _exploding(history: RunHistory) -> Finding | None:
    passes, limits = history.forward, history.limits
    for chain in passes.chains:
        sites = np.array(chain, dtype=np.intp)
        rms = passes.columns["rms"][:, sites]  # [T, L]
        # A forward pass that has become NaN no longer says anything about growth.
        is_usable = np.isfinite(rms).all(axis=1) & (rms[:, 0] > 0) & passes.present[:, sites].all(axis=1)  # [T]
        ratios = np.divide(rms[:, -1], rms[:, 0], where=is_usable, out=np.zeros(len(rms)))  # [T]
        hits = np.flatnonzero(ratios > limits.exploding_ratio)
        if 2 * len(hits) <= is_usable.sum():
            continue
        newest, step = rms[hits[-1]], passes.steps[hits[-1]]
        with np.errstate(divide="ignore"):
            line = fit_trend(np.log(newest[::-1]).tolist())
        names = [passes.table.names[site] for site in chain]
        evidence = {"rms_first": float(newest[0]), "rms_last": float(newest[-1]), "ratio": float(ratios[hits[-1]])}
        first = passes.steps[hits[0]]
        steps = f"step {step}" if first == step else f"steps {first} to {step}"
        message = (
            f"{steps}: the outputs grow from an RMS of {newest[0]:.2e} at {quoted(names[0])} to {newest[-1]:.2e} at "
            f"{quoted(names[-1])}, {ratios[hits[-1]]:.2e} times (limit {limits.exploding_ratio:g})"
        )
        if math.isfinite(line.std_error):
            evidence |= {"factor_per_layer": line.factor, "std_error": line.std_error}
            message += f", by {line.factor:.3g} ± {line.std_error:.2g} from one to the next"
        loss = dict(history.losses).get(step)
        if loss is not None:
            evidence["loss"] = loss
            message += f"; the loss is {loss:.3g}"
        far = [name for name, value in zip(names, newest, strict=True) if value > limits.exploding_ratio * newest[0]]
        return EXPLODING_FORWARD.finding(tuple(far), (passes.steps[hits[0]], step), evidence, message)
    return None


EXPLODING_FORWARD = Rule(
    "exploding",
    meaning="the outputs grow from layer to layer",
    where="forward",
    formula="rms(last) / rms(first) > exploding_ratio in more than half of the steps in which both are finite, in a "
    "run that does not converge, for the outputs of residual adds or of weight layers, each after its normalisation if "
    "it has one and without the last layer; the comparison is ours",
    source="He et al. 2015, arXiv 1502.01852, section 2.2: the variance of the outputs is a product over the layers",
    cause="each layer, or each addition of a branch, multiplies the forward signal by more than one",
    remedies=(
        "normalisation, also in the branches of residual blocks",
        INITIALISE,
        "branches that start at zero or are scaled down by depth (Fixup, Zhang et al. 2019)",
    ),
    check=_exploding,
    needs=("activations=True",),
)


def _poor_initialisation(history: RunHistory) -> Finding | None:
    passes, limits = history.forward, history.limits
    early = np.flatnonzero(np.array(passes.steps) < limits.window)
    if not len(early):  # attached too late to tell
        return None
    if _is_dead(passes, early, limits).any():  # dead units shrink the outputs too, whatever the scale of the weights
        return None
    for segment in passes.segments:
        sites = np.array(segment, dtype=np.intp)
        variances = passes.columns["std"][np.ix_(early, sites)] ** 2  # [E, L]
        # A constant output is dead or zero on purpose, like a branch that starts at zero: not the scale of the weights.
        lowest = np.where(variances > 0, variances, np.inf)
        ratios = variances.max(axis=1) / lowest.min(axis=1)  # [E]
        if not (ratios > limits.variance_ratio).all():
            continue
        at = (int(variances[0].argmax()), int(lowest[0].argmin()))
        largest, smallest = (passes.table.names[sites[k]] for k in at)
        high, low = float(variances[0].max()), float(lowest[0].min())
        told = [f"{high:.2e} at {quoted(largest)}", f"{low:.2e} at {quoted(smallest)}"]
        course = (
            "shrinks from {} to {}: the weights are too small"
            if at[0] < at[1]
            else "grows from {1} to {0}: the weights are too large"
        )
        steps = (passes.steps[early[0]], passes.steps[early[-1]])
        message = f"step {steps[0]}: the variance of the outputs {course.format(*told)} (ratio {ratios[0]:.2e})"
        evidence = {"variance_largest": high, "variance_smallest": low, "ratio": float(ratios[0])}
        return POOR_INITIALISATION.finding((smallest, largest), steps, evidence, message)
    return None


POOR_INITIALISATION = Rule(
    "poor initialisation",
    meaning="the first outputs shrink or grow by orders of magnitude",
    formula="largest / smallest variance of the outputs of weight layers with no normalisation and no residual add "
    "between them > variance_ratio in the first `window` steps, in a run that does not converge and starts without "
    "dead ReLUs; without embeddings, recurrent modules, the last layer and constant outputs. The source has a limit of "
    "10 for any two layers, which a healthy transformer exceeds; the segments and 1e5 are ours",
    source=f"{SAGEMAKER}, rule PoorWeightInitialization",
    cause="weights too small or too large for the activation: the forward signal shrinks or grows from layer to layer",
    remedies=(INITIALISE, "normalisation", "residual connections"),
    check=_poor_initialisation,
    needs=("loss", "activations=True"),
    is_event=True,
    n_steps=lambda limits: 2 * limits.window,
)


def _saturation(history: RunHistory) -> Finding | None:
    # The mean derivative follows from the statistics of the output y: it is the mean of 1 - y^2, or of y (1 - y).
    passes = history.forward
    chosen = _modules(passes, tuple(_LARGEST_SLOPE), with_last=False)
    if not len(chosen):
        return None
    types = [passes.module_type(site) for site in chosen]
    mean_square = passes.columns["rms"][:, chosen] ** 2  # [T, M]
    linear = np.where(np.array(types) == "Tanh", 1.0, passes.columns["mean"][:, chosen])
    slopes = (linear - mean_square) / np.array([_LARGEST_SLOPE[one] for one in types])  # [T, M]
    is_hit = (slopes < history.limits.saturated_slope) & passes.present[:, chosen]
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(passes.steps))
    if not len(found):
        return None
    names = tuple(passes.table.names[chosen[m]] for m in found)
    slope = float(np.median(slopes[is_hit[:, found[0]], found[0]]))
    steps = (passes.steps[0], passes.steps[-1])
    message = (
        f"steps {steps[0]} to {steps[1]}: {len(found)} of {len(chosen)} tanh and sigmoid modules are saturated; the "
        f"first is {quoted(names[0])}, whose mean derivative is {max(slope, 0.0):.2g} of the largest possible"
    )
    evidence = {"slope": slope, "saturated": float(len(found)), "modules": float(len(chosen))}
    is_data = int(found[0]) == 0  # data that is not normalised reaches the first of them
    return SATURATION.finding(names, steps, evidence, message, first=0 if is_data else 1)


SATURATION = Rule(
    "saturation",
    meaning="activations are stuck at their limits",
    formula="mean derivative of a tanh, 1 - rms^2, or of a sigmoid, (mean - rms^2) / 0.25, < saturated_slope in more "
    "than half of the observed steps, in a run that does not converge; without the module that runs last. By Markov's "
    "inequality the derivative is then below twice the limit for half of the values; the limit is ours",
    source=f"{SAGEMAKER}, rule SaturatedActivation, which counts units; Glorot and Bengio 2010",
    cause="inputs of the activation that are far from zero: data that is not normalised, or weights that are too large",
    remedies=(
        "normalise the data",
        "smaller weights: Xavier initialisation",
        "normalisation before the activation",
        "ReLU or GELU",
    ),
    check=_saturation,
    needs=("activations=True",),
)


def _dead_relu(history: RunHistory) -> Finding | None:
    # The share of zeros is measured per layer, not per unit: a layer with half of its units dead and the others active
    # looks like one whose units are active half of the time, and is not found.
    passes, limits = history.forward, history.limits
    chosen = _modules(passes, _RELUS)
    last = np.arange(len(passes.steps))[-limits.window :]
    is_dead = _is_dead(passes, last, limits)  # [M]
    if history.is_converging:  # sparse units are no fault then, but a module that is off can no longer learn
        is_dead &= (passes.columns["zero_fraction"][np.ix_(last, chosen)] == 1.0).all(axis=0)
    found = np.flatnonzero(is_dead)
    if not len(found):
        return None
    names = tuple(passes.table.names[chosen[m]] for m in found)
    steps = (passes.steps[last[0]], passes.steps[-1])
    active = 1.0 - float(passes.columns["zero_fraction"][last, chosen[found[0]]].mean())
    share = 1.0 - active / limits.dead_activity
    shown = f"at least {min(share, 0.99):.0%}" if active else "all"
    active_share = f"{active:.2g}" if active else "none"
    message = (
        f"steps {steps[0]} to {steps[1]}: most units are dead in {len(found)} of {len(chosen)} ReLU modules; the "
        f"first is {quoted(names[0])}, where {active_share} of the outputs are above zero: {shown} of its units are "
        f"active less than {limits.dead_activity:.0%} of the time"
    )
    evidence = {"active_share": active, "dead_share": share, "dead": float(len(found))}
    if passes.steps[0] == 0 and _is_dead(passes, np.array([0]), limits)[found].all():
        return DEAD_RELU.finding(names, steps, evidence, message, INITIALISE_UNITS, DEAD_FROM_THE_START)
    return DEAD_RELU.finding(names, steps, evidence, message)


DEAD_RELU = Rule(
    "dead ReLU",
    meaning="most units of a ReLU are never active",
    formula="1 - share of outputs above zero / dead_activity > dead_share over the last `window` observed steps: by "
    "Markov's inequality at least that share of the ReLUs is active less than dead_activity of the time; in a run that "
    "converges, all outputs exactly zero in these steps (ours)",
    source=f"{SAGEMAKER}, rule DeadRelu",
    cause=DEAD_UNITS,
    remedies=REVIVE_UNITS,
    check=_dead_relu,
    needs=("activations=True",),
    judges_converging=True,
    n_steps=lambda limits: limits.window,
)


def _is_dead(passes: ForwardPasses, rows: npt.NDArray[np.intp], limits: Thresholds) -> npt.NDArray[np.bool_]:
    """Returns which ReLU modules must have too many dead units in some of the passes. Shape [M]."""
    chosen = _modules(passes, _RELUS)
    active = 1.0 - passes.columns["zero_fraction"][np.ix_(rows, chosen)].mean(axis=0)  # [M]
    is_dead = np.logical_and(1.0 - active / limits.dead_activity > limits.dead_share, passes.present[rows][:, chosen])
    return np.asarray(is_dead.all(axis=0), dtype=np.bool_)


def _modules(passes: ForwardPasses, types: Sequence[str], with_last: bool = True) -> npt.NDArray[np.intp]:
    """Returns the sites of the outputs of modules of these types. Shape [M]."""
    ran = passes.ran if with_last else passes.ran[:-1]
    return np.array([site for site in ran if passes.module_type(site) in types], dtype=np.intp)
