"""Pure rules over what the optimizer did: does it move the weights too far, or not at all?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradprobe.diagnosis.findings import Finding, Thresholds, finding
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Moves:
    """How the weights moved in the T steps where that was observed and the optimizer was not kept from stepping.

    Attributes:
        steps: Numbers of the steps. Length T.
        names: Names of the W weights that were stepped in all of them.
        ratios: Norm of the update over the norm of the weight. [T, W]
        lost: Share of the elements that have a gradient and did not move, less that of those without one that did. NaN
            where the weight has no gradient at all. [T, W]
    """

    steps: list[int]
    names: tuple[str, ...]
    ratios: FloatArray
    lost: FloatArray


def moves_of(snapshots: Sequence[Snapshot]) -> Moves | None:
    """Gathers how the weights moved in a history.

    Args:
        snapshots: Steps in order, of one probe.

    Returns:
        The moves, or None where none was observed.
    """
    observed = [
        (one, one.parameter_updates) for one in snapshots if one.parameter_updates is not None and not one.skipped
    ]
    if not observed:
        return None
    present = np.stack([changes.measured.present for _, changes in observed]).all(axis=0)  # [K]
    matrices = present & (np.asarray(observed[0][0].table.ndims) > 1)
    weights = np.flatnonzero(matrices if matrices.any() else present)  # [W]
    has_gradient = np.stack([one.measured.present & (one.columns["abs_max"] > 0) for one, _ in observed])  # [T, K]
    stay = np.stack([changes.update_columns["zero_fraction"] for _, changes in observed])
    unasked = np.stack([one.columns["zero_fraction"] for one, _ in observed])
    lost = np.where(has_gradient, stay - unasked, np.nan)
    return Moves(
        [one.step for one, _ in observed],
        tuple(observed[0][0].table.names[k] for k in weights),
        np.stack([changes.ratios for _, changes in observed])[:, weights],
        lost[:, weights],
    )


def too_large(moves: Moves, limits: Thresholds) -> list[Finding]:
    """Finds weights that a step makes into something else altogether.

    Args:
        moves: Of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    # a weight that starts at zero moves by infinitely much
    is_hit = np.isfinite(moves.ratios) & (moves.ratios > limits.update_ratio_high)  # [T, W]
    found = np.flatnonzero(is_hit.any(axis=0))
    if not len(found) or 2 * len(found) < len(moves.names):
        return []
    in_order = found[np.argsort(is_hit[:, found].argmax(axis=0), kind="stable")]
    first = in_order[0]
    at = int(is_hit[:, first].argmax())
    ratio = float(moves.ratios[at, first])
    last = int(np.flatnonzero(is_hit.any(axis=1))[-1])
    message = (
        f"step {moves.steps[at]}: {moves.names[first]} is moved by {ratio:.3g} times its own norm; at this step or "
        f"another so are {len(found)} of {len(moves.names)} weights, by more than {limits.update_ratio_high:g} times"
    )
    steps = (moves.steps[at], moves.steps[last])
    evidence = {"update_ratio": ratio, "weights": float(len(found))}
    return [finding("updates too large", tuple(moves.names[w] for w in in_order), steps, evidence, message)]


def too_small(moves: Moves, limits: Thresholds) -> list[Finding]:
    """Finds weights that have a gradient and do not move.

    Args:
        moves: Of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    if len(moves.steps) < limits.window:
        return []
    with np.errstate(invalid="ignore"):
        is_still = (moves.ratios < limits.update_ratio_low) | (moves.lost > limits.lost_share)
    is_hit = is_still & ~np.isnan(moves.lost)  # [T, W]
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(moves.steps))
    if not len(found):
        return []
    first = found[0]
    ratio, lost = (float(np.median(values[is_hit[:, first], first])) for values in (moves.ratios, moves.lost))
    steps = (moves.steps[0], moves.steps[-1])
    message = (
        f"steps {steps[0]} to {steps[1]}: {len(found)} of {len(moves.names)} weights have a gradient and hardly move; "
        f"first {moves.names[first]}, by {ratio:.2g} times its norm in a step, and {max(lost, 0.0):.0%} of its "
        "elements have a gradient and stay as they are"
    )
    evidence = {"update_ratio": ratio, "lost_share": lost, "weights": float(len(found))}
    return [finding("updates too small", tuple(moves.names[w] for w in found), steps, evidence, message)]
