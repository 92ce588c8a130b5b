"""A rule on gradients at the outputs of modules: are they too small for their dtype?"""

from __future__ import annotations

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules.rule import Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import Signals
from gradprobe.text.words import quoted

_KINDS = ("activation_grad", "junction_grad")  # the other gradients at a residual add are these or sums of them


def _precision_loss(history: RunHistory) -> Finding | None:
    # The gradient counts before loss scaling is undone, since that is what the dtype had to hold. Gradients of weights
    # say nothing: autocast computes them in float16 and returns them in float32.
    observed, limits = history.observed, history.limits
    newest = observed[-1][1]
    sites = np.flatnonzero(np.isin(np.array(newest.table.kinds), _KINDS))  # [G]
    shares = np.stack([_subnormal_shares(signals)[sites] for _, signals in observed])  # [T, G]
    is_hit = shares > limits.subnormal_share
    found = np.flatnonzero(2 * is_hit.sum(axis=0) > len(observed))
    if not len(found):
        return None
    # A site may lack a gradient in the newest step: its order and dtype are those of the last step that has one.
    in_order = dict.fromkeys(site for _, signals in reversed(observed) for site in signals.events.sites)
    too_small = set(sites[found].tolist())
    chosen = [site for site in in_order if site in too_small]
    first = int(np.flatnonzero(sites == chosen[0])[0])
    share = float(np.median(shares[is_hit[:, first], first]))
    steps = (observed[0][0], observed[-1][0])
    events = next(signals.events for _, signals in reversed(observed) if chosen[0] in signals.events.sites)
    smallest = float(events.smallest_normal[chosen[0]])
    names = tuple(newest.table.names[site] for site in chosen)
    message = (
        f"steps {steps[0]} to {steps[1]}: the gradients at the outputs of {len(found)} of {len(sites)} modules are too "
        f"small for their dtype; the first is {quoted(names[0])}, where {min(share, 0.99):.0%} or more of the nonzero "
        f"values are below {smallest:.2g}, the smallest normal number"
    )
    n_zero = int((newest.columns["zero_fraction"][sites] == 1.0).sum())
    if n_zero:
        message += f"; in {n_zero} more modules every value has become zero"
    evidence = {"subnormal_share": share, "smallest_normal": smallest, "modules": float(len(found))}
    return PRECISION_LOSS.finding(names, steps, evidence, message)


def _subnormal_shares(signals: Signals) -> FloatArray:
    """Returns a lower bound on the share of nonzero values below the smallest normal number at each site. Shape [S]."""
    measured = signals.events.measured
    nonzero = 1.0 - signals.columns["zero_fraction"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # float64's smallest number divides to inf
        shares = 1.0 - signals.scaled_abs_mean / signals.events.smallest_normal / nonzero
    return np.where(measured.present & (measured.numels > 0) & np.isfinite(shares), shares, 0.0)


PRECISION_LOSS = Rule(
    "precision loss",
    meaning="gradients are too small for their dtype",
    formula="1 - mean magnitude / smallest normal number of the dtype / share of nonzero values > subnormal_share, for "
    "the gradient at the output of a module or residual add, before loss scaling is undone, in more than half of the "
    "observed steps, in a run that does not converge: by Markov's inequality at least that share of the nonzero values "
    "is below the smallest normal number; the limit is ours",
    source="Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740, section 3.2",
    cause="gradients too small for float16, whose smallest normal number is 2^-14 and smallest subnormal number 2^-24",
    remedies=(
        "scale the loss with torch.amp.GradScaler",
        "bfloat16, whose range is that of float32",
        "float32 for the layers named",
    ),
    check=_precision_loss,
    needs=("activations=True",),
)
