"""Pure rules over what passes forward: outputs of modules and of residual junctions, in the order of execution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.findings import Finding, Thresholds, finding
from gradprobe.diagnosis.rules.course import Losses
from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import SignalTable
from gradprobe.snapshot.snapshot import SiteTable, Snapshot

_LARGEST_SLOPE = {"Tanh": 1.0, "Sigmoid": 0.25}
_RELUS = ("ReLU", "ReLU6")
_LEAST_LAYERS = 3  # that make a depth


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """The forward passes that were observed.

    Attributes:
        steps: Their steps. Length T.
        table: The S sites.
        ran: Sites of the outputs of modules in the order of execution, in the newest pass.
        chains: Outputs that can be compared over depth, from the input to the loss: of the junctions, and of the weight
            layers; positions of sites.
        present: Which sites something passed. [T, S]
        columns: Each statistic. Values of shape [T, S].
    """

    steps: tuple[int, ...]
    table: SignalTable
    ran: tuple[int, ...]
    chains: tuple[tuple[int, ...], ...]
    present: npt.NDArray[np.bool_]
    columns: dict[str, FloatArray]


def passes_of(snapshots: Sequence[Snapshot]) -> Passes | None:
    """Gathers what passed forward in a history.

    Args:
        snapshots: Steps in order.

    Returns:
        The passes, None where nothing was observed.

    Raises:
        ArgumentError: The snapshots are not of one probe.
    """
    observed = [(snapshot, snapshot.signals) for snapshot in snapshots if snapshot.signals is not None]
    if not observed:
        return None
    newest, signals = observed[-1]
    if any(one.table != signals.table for _, one in observed):
        raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different modules")
    in_order = list(dict.fromkeys(signals.events.sites))
    ran = [site for site in in_order if signals.table.kinds[site] == "activation"]
    junctions = [site for site in in_order if signals.table.kinds[site] == "junction_y"]
    chains = (tuple(junctions), tuple(_comparable(ran, signals.table, newest.table)))
    return Passes(
        steps=tuple(snapshot.step for snapshot, _ in observed),
        table=signals.table,
        ran=tuple(ran),
        chains=tuple(chain for chain in chains if len(chain) >= _LEAST_LAYERS),
        present=np.stack([one.events.measured.present for _, one in observed]),
        columns={
            name: np.stack([one.columns[name] for _, one in observed])
            for name in ("rms", "std", "mean", "zero_fraction")
        },
    )


def exploding(passes: Passes, losses: Losses, limits: Thresholds) -> list[Finding]:
    """Finds what grows from layer to layer on its way forward.

    Args:
        passes: As `passes_of` gives them, of a run that does not converge.
        losses: As `gradprobe.diagnosis.rules.course.losses_of` gives them.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    for chain in passes.chains:
        sites = np.array(chain, dtype=np.intp)
        rms = passes.columns["rms"][:, sites]  # [T, L]
        # a forward pass that has become NaN tells nothing of growth any more
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
        message = (
            f"step {step}: outputs have an RMS of {newest[0]:.2e} at {names[0]} and {newest[-1]:.2e} at {names[-1]}; "
            f"last/first {ratios[hits[-1]]:.2e} is > {limits.exploding_ratio:g}: the forward pass explodes"
        )
        if math.isfinite(line.std_error):
            evidence |= {"factor_per_layer": line.factor, "std_error": line.std_error}
            message += f", by {line.factor:.3g} ± {line.std_error:.2g} per layer"
        loss = dict(losses).get(step)
        if loss is not None:
            evidence["loss"] = loss
            message += f"; the loss is {loss:.3g}"
        far = [name for name, value in zip(names, newest, strict=True) if value > limits.exploding_ratio * newest[0]]
        steps = (passes.steps[hits[0]], step)
        return [finding("exploding", tuple(far), steps, evidence, message, where="forward")]
    return []


def poor_initialisation(passes: Passes, limits: Thresholds) -> list[Finding]:
    """Finds variances that differ too much between layers in the first steps.

    Args:
        passes: As `passes_of` gives them, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    early = np.flatnonzero(np.array(passes.steps) < limits.window)
    if not len(early) or _dead(passes, early, limits).any():  # no scale of weights, but units that are off
        return []
    for chain in passes.chains:
        sites = np.array(chain, dtype=np.intp)
        variances = passes.columns["std"][np.ix_(early, sites)] ** 2  # [E, L]
        # a constant output is off on purpose, as a branch that starts at zero, or dead: no scale of weights either way
        lowest = np.where(variances > 0, variances, np.inf)
        ratios = variances.max(axis=1) / lowest.min(axis=1)  # [E]
        if not (ratios > limits.variance_ratio).all():
            continue
        largest, smallest = (passes.table.names[sites[k]] for k in (variances[0].argmax(), lowest[0].argmin()))
        high, low = float(variances[0].max()), float(lowest[0].min())
        steps = (passes.steps[early[0]], passes.steps[early[-1]])
        message = (
            f"step {steps[0]}: the outputs have a variance of {high:.2e} at {largest} and {low:.2e} at {smallest}; "
            f"the ratio {ratios[0]:.2e} is > {limits.variance_ratio:g}"
        )
        evidence = {"variance_largest": high, "variance_smallest": low, "ratio": float(ratios[0])}
        return [finding("poor initialisation", (smallest, largest), steps, evidence, message)]
    return []


def saturation(passes: Passes, limits: Thresholds) -> list[Finding]:
    """Finds tanh and sigmoid modules that let next to nothing of the gradient through.

    Their mean derivative follows from the statistics of the output y: it is the mean of 1 - y^2, or of y (1 - y).

    Args:
        passes: As `passes_of` gives them, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    chosen = _modules_of(passes, tuple(_LARGEST_SLOPE), but_last=True)
    if not len(chosen):
        return []
    types = [_type_of(passes.table, site) for site in chosen]
    mean_square = passes.columns["rms"][:, chosen] ** 2  # [T, M]
    linear = np.where(np.array(types) == "Tanh", 1.0, passes.columns["mean"][:, chosen])
    slopes = (linear - mean_square) / np.array([_LARGEST_SLOPE[one] for one in types])  # [T, M]
    is_hit = (slopes < limits.saturated_slope) & passes.present[:, chosen]
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(passes.steps))
    if not len(found):
        return []
    names = tuple(passes.table.names[chosen[m]] for m in found)
    slope = float(np.median(slopes[is_hit[:, found[0]], found[0]]))
    steps = (passes.steps[0], passes.steps[-1])
    message = (
        f"steps {steps[0]} to {steps[1]}: {len(found)} of {len(chosen)} tanh and sigmoid modules are saturated; first "
        f"{names[0]}, whose mean derivative is {max(slope, 0.0):.2g} of the largest"
    )
    evidence = {"slope": slope, "saturated": float(len(found)), "modules": float(len(chosen))}
    return [finding("saturation", names, steps, evidence, message)]


def dead_relu(passes: Passes, limits: Thresholds) -> list[Finding]:
    """Finds ReLU modules of which at least a share of the units must be dead.

    Which units are zero is not measured, only how many outputs are: a layer of which half the units are dead and the
    others active looks as one whose units are active half the time, and is not found.

    Args:
        passes: As `passes_of` gives them, of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    chosen = _modules_of(passes, _RELUS, but_last=False)
    last = np.arange(len(passes.steps))[-limits.window :]
    found = np.flatnonzero(_dead(passes, last, limits))
    if not len(found) or len(last) < limits.window:
        return []
    names = tuple(passes.table.names[chosen[m]] for m in found)
    steps = (passes.steps[last[0]], passes.steps[-1])
    active = 1.0 - float(passes.columns["zero_fraction"][last, chosen[found[0]]].mean())
    share = 1.0 - active / limits.dead_activity
    message = (
        f"steps {steps[0]} to {steps[1]}: in {len(found)} of {len(chosen)} ReLU modules most units are dead; first "
        f"{names[0]}, where {active:.2g} of the outputs are above zero: at least {share:.0%} of its units "
        f"are active less than {limits.dead_activity:.0%} of the time"
    )
    evidence = {"active_share": active, "dead_share": share, "dead": float(len(found))}
    return [finding("dead ReLU", names, steps, evidence, message)]


def _dead(passes: Passes, rows: npt.NDArray[np.intp], limits: Thresholds) -> npt.NDArray[np.bool_]:
    """Which ReLU modules must have too many dead units in some of the passes. Shape [M]."""
    chosen = _modules_of(passes, _RELUS, but_last=False)
    active = 1.0 - passes.columns["zero_fraction"][np.ix_(rows, chosen)].mean(axis=0)  # [M]
    is_dead = np.logical_and(1.0 - active / limits.dead_activity > limits.dead_share, passes.present[rows][:, chosen])
    return np.asarray(is_dead.all(axis=0), dtype=np.bool_)


def _comparable(ran: Sequence[int], signals: SignalTable, parameters: SiteTable) -> list[int]:
    """Outputs of layers with a matrix of weights, or of the normalisation right behind; without the last such layer.

    An embedding picks rows of its matrix, and recurrent modules bound what they return: these are left out.
    """
    with_matrix = {name for name, k in parameters.index.items() if parameters.ndims[k] > 1}
    found = []
    for site, following in zip(ran, [*ran[1:], None], strict=False):
        if f"{signals.names[site]}.weight" not in with_matrix or _type_of(signals, site).startswith("Embedding"):
            continue
        is_normalised = following is not None and "Norm" in _type_of(signals, following)
        found.append(following if following is not None and is_normalised else site)
    return found[:-1]


def _modules_of(passes: Passes, types: Sequence[str], but_last: bool) -> npt.NDArray[np.intp]:
    ran = passes.ran[:-1] if but_last else passes.ran
    return np.array([site for site in ran if _type_of(passes.table, site) in types], dtype=np.intp)


def _type_of(table: SignalTable, site: int) -> str:
    return table.module_types[site // 2]
