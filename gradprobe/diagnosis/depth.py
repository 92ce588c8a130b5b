"""Compares the gradient norms of one backward pass over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.diagnosis.trend import Trend, fit_trend
from gradprobe.snapshot.snapshot import Snapshot

Flow = Literal["healthy", "non-finite", "vanishing", "exploding"]


def flow_verdict(norms: Sequence[float], thresholds: Thresholds = DEFAULTS) -> Flow:
    """Judges the gradient norms of one backward pass over depth.

    Compares the first norm with the last. If that is healthy and at least `slope_sites` weights lie between the two,
    fits a line to their norms. In such a deep network a gradient vanishes only if it does so relative to the last norm
    but one as well.

    Args:
        norms: Norms of the weight gradients, from the layer next to the input to the one next to the loss.
        thresholds: Limits of the rules.

    Returns:
        The verdict; "healthy" if there is nothing to compare.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021), beta1, beta2, beta3; the line and the last norm but one are ours.

    Example:
        >>> flow_verdict([1e-9, 1e-5, 1e-2])
        'vanishing'
    """
    if any(not math.isfinite(norm) for norm in norms):
        return "non-finite"
    if not norms:
        return "healthy"
    ends = ends_verdict(norms, thresholds)
    if ends != "healthy" or len(norms) - 2 < thresholds.slope_sites:
        return ends
    line = inner_trend(norms)
    is_slope = math.isfinite(line.factor) and abs(math.log(line.factor)) * line.factor > (
        thresholds.slope_errors * line.std_error
    )
    return layer_status(line.first, line.last, thresholds) if is_slope else ends


def ends_verdict(norms: Sequence[float], thresholds: Thresholds) -> Flow:
    """Judges the first of at least one norm against the last, as `flow_verdict` does, without the line."""
    ends = layer_status(norms[0], norms[-1], thresholds)
    is_deep = len(norms) - 2 >= thresholds.slope_sites
    # A last layer whose gradient stands out is no trend over depth.
    if ends == "vanishing" and is_deep and layer_status(norms[0], norms[-2], thresholds) != ends:
        return "healthy"
    return ends


def inner_trend(norms: Sequence[float]) -> Trend:
    """Fits a line to the logarithms of all norms except the first and the last, whose layers have other shapes."""
    with np.errstate(divide="ignore"):
        return fit_trend(np.log(norms[1:-1]).tolist())


def layer_status(norm: float, last_norm: float, thresholds: Thresholds = DEFAULTS) -> Flow:
    """Judges one layer's gradient norm against that of the layer next to the loss.

    Args:
        norm: Norm of the layer's gradient.
        last_norm: Norm of the last layer's gradient.
        thresholds: Limits of the rules.

    Returns:
        The verdict.

    Source:
        AUTOTRAINER (Zhang et al., ICSE 2021), beta1, beta2, beta3, which compares the first layer with the last.
    """
    if not math.isfinite(norm) or not math.isfinite(last_norm):
        return "non-finite"
    if norm < thresholds.vanishing_norm and norm <= thresholds.vanishing_ratio * last_norm:
        return "vanishing"
    if norm > thresholds.exploding_ratio * last_norm:
        return "exploding"
    return "healthy"


def weight_names(snapshot: Snapshot) -> list[str]:
    """Returns the names of the parameters that `weight_norms` covers."""
    return [snapshot.table.names[k] for k in _weights(snapshot)]


def weight_norms(snapshot: Snapshot) -> list[float]:
    """Returns the gradient norms of the weights in model order. Length W.

    Weights are parameters with more than one dimension and a gradient, or all with a gradient if there is none.
    """
    norms: list[float] = snapshot.columns["norm"][_weights(snapshot)].tolist()
    return norms


def _weights(snapshot: Snapshot) -> npt.NDArray[np.intp]:
    present = snapshot.measured.present  # [K]
    matrices = present & (np.asarray(snapshot.table.ndims) > 1)
    return np.flatnonzero(matrices if matrices.any() else present)
