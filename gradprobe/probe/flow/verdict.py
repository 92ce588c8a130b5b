"""Judges the flow of the gradient along the trunks of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from gradprobe.diagnosis.depth import Flow, layer_status
from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.gradients import EXPLODING, VANISHING
from gradprobe.probe.flow.trunk import TrunkPoint
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.words import quoted

# Ratios of the sensitivity at the start of a trunk to that at its end. A gradient that vanishes is lost; one that grows
# moderately is scaled by Adam or clipped, so its limit is wider.
VANISHING_RATIO = 1e-3
EXPLODING_RATIO = 1e4

_SOURCE = "gradprobe's own limit, see docs/check.md"


def flow_along(trunk: Sequence[TrunkPoint]) -> Flow:
    """Judges the sensitivities along a trunk, from the input to the loss.

    Returns:
        "vanishing" or "exploding" if the ratio of the first to the last is beyond `VANISHING_RATIO` or
        `EXPLODING_RATIO`, else "healthy". Values that are not finite are healthy here: there is a rule for them.

    Example:
        >>> flow_along([TrunkPoint("conv1", 1e-9), TrunkPoint("conv2", 1e-5), TrunkPoint("fc", 1e-2)])
        'vanishing'
    """
    first, last = trunk[0].sensitivity, trunk[-1].sensitivity
    if not all(math.isfinite(point.sensitivity) for point in trunk):
        return "healthy"
    if first <= VANISHING_RATIO * last:
        return "vanishing"
    return "exploding" if first >= EXPLODING_RATIO * last else "healthy"


def layer_statuses(snapshot: Snapshot, flow: Flow) -> dict[str, Flow]:
    """Judges each parameter with a gradient against the last one of its role, by norm.

    Args:
        snapshot: The gradients, in order of execution.
        flow: The verdict on the trunk; "healthy" makes all layers healthy whose gradient is finite.

    Returns:
        The status of each parameter: "healthy", "non-finite" or the flow.
    """
    # Weights, biases and scales differ in size and in role.
    roles = {name: _role(name, snapshot) for name in snapshot}
    last_norms = {roles[name]: snapshot[name].norm for name in snapshot}
    statuses: dict[str, Flow] = {}
    for name, role in roles.items():
        site = snapshot[name]
        status = "non-finite" if site.nonfinite else layer_status(site.norm, last_norms[role])
        is_silent = flow == "vanishing" and site.abs_max == 0.0
        statuses[name] = flow if is_silent else status if status in ("non-finite", flow) else "healthy"
    return statuses


def flow_finding(flow: Flow, trunk: Sequence[TrunkPoint], concerned: Sequence[str], note: str) -> Finding:
    """Describes a trunk along which the gradient vanishes or explodes.

    Args:
        flow: The verdict on it.
        trunk: Its points, from the input to the loss.
        concerned: Names of the parameters concerned, the first to fail first.
        note: How the trunk was measured, empty if as it is.

    Returns:
        The finding.
    """
    first, last = trunk[0], trunk[-1]
    ratio = first.sensitivity / last.sensitivity if last.sensitivity else math.inf if first.sensitivity else 0.0
    where, end = _name(first), _name(last)
    limit = VANISHING_RATIO if flow == "vanishing" else EXPLODING_RATIO
    message = (
        f"relative noise at {where} changes the loss {ratio:.2e} times as much as at {end} ({first.sensitivity:.2e} "
        f"against {last.sensitivity:.2e}, limit {limit:g}): {flow} towards the input{_largest_step(trunk)}"
    )
    if first.sensitivity == 0.0:
        reached = next((point for point in trunk if point.sensitivity), None)
        until = f"; it ends at {_name(reached)}" if reached else ""
        message = f"no gradient at all reaches {where}: it is exactly zero there{until}"
    rule = VANISHING if flow == "vanishing" else EXPLODING
    evidence = {"sensitivity_first": first.sensitivity, "sensitivity_last": last.sensitivity, "ratio": ratio}
    found = rule.finding(tuple(concerned), (0, 0), evidence, f"{message}{note}")
    sign = "<=" if flow == "vanishing" else ">="
    formula = f"sensitivity(first) / sensitivity(last) {sign} {limit:g} along the trunk"
    return replace(found, formula=formula, source=_SOURCE)


def _largest_step(trunk: Sequence[TrunkPoint]) -> str:
    """Names the step in which most of the change happens, if there is one."""
    logs = [math.log(point.sensitivity) if point.sensitivity else -math.inf for point in trunk]
    steps = [abs(after - before) for before, after in itertools.pairwise(logs)]
    if len(steps) < 4 or not math.isfinite(sum(steps)) or max(steps) < abs(logs[-1] - logs[0]) / 2:
        return ""
    at = steps.index(max(steps))
    return f"; most of it between {_name(trunk[at])} and {_name(trunk[at + 1])}"


def _name(point: TrunkPoint) -> str:
    return f"the output of {quoted(point.module)}" if point.module else "the output"


def _role(site: str, snapshot: Snapshot) -> tuple[str, bool]:
    return site.rpartition(".")[2], snapshot.table.ndims[snapshot.table.index[site]] > 1
