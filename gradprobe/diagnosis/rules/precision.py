"""A pure rule over the gradients that pass by: are they too small for the dtype that they come in?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradprobe.diagnosis.findings import Finding, Thresholds, finding
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import Signals
from gradprobe.snapshot.snapshot import Snapshot

_KINDS = ("activation_grad", "junction_grad")  # the others at a junction are these or sums of them


def precision_loss(snapshots: Sequence[Snapshot], limits: Thresholds) -> list[Finding]:
    """Finds gradients most of whose values must lie below the smallest normal number of their dtype.

    What counts is the gradient as it came, with the loss scaled: that is what the dtype had to hold. How the gradient
    of a weight came to be is not seen: autocast makes it in float16 and hands it over in float32.

    Args:
        snapshots: Steps in order, of one probe and of a run that does not converge.
        limits: Limits of the rules.

    Returns:
        At most one finding.
    """
    observed = [(snapshot.step, snapshot.signals) for snapshot in snapshots if snapshot.signals is not None]
    if not observed:
        return []
    table = observed[-1][1].table
    sites = np.flatnonzero(np.isin(np.array(table.kinds), _KINDS))  # [G]
    shares = np.stack([_subnormal_shares(signals)[sites] for _, signals in observed])  # [T, G]
    is_hit = shares > limits.subnormal_share
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(observed))
    if not len(found):
        return []
    in_order = [site for site in dict.fromkeys(observed[-1][1].events.sites) if site in set(sites[found])]
    first = int(np.flatnonzero(sites == in_order[0])[0])
    share = float(np.median(shares[is_hit[:, first], first]))
    steps = (observed[0][0], observed[-1][0])
    smallest = float(observed[-1][1].events.smallest_normal[in_order[0]])
    message = (
        f"steps {steps[0]} to {steps[1]}: the gradients at the outputs of {len(found)} of {len(sites)} modules are too "
        f"small for their dtype; first {table.names[in_order[0]]}, where at least {share:.0%} of the values that are "
        f"not zero are below {smallest:.2g}, its smallest normal number"
    )
    evidence = {"subnormal_share": share, "smallest_normal": smallest, "modules": float(len(found))}
    return [finding("precision loss", tuple(table.names[site] for site in in_order), steps, evidence, message)]


def _subnormal_shares(signals: Signals) -> FloatArray:
    """Least share of what is not zero that is below the smallest normal number, for each site. Shape [S]."""
    measured = signals.events.measured
    nonzero = 1.0 - signals.columns["zero_fraction"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # float64's smallest number divides to inf
        shares = 1.0 - signals.scaled_abs_mean / signals.events.smallest_normal / nonzero
    return np.where(measured.present & np.isfinite(shares), shares, 0.0)
