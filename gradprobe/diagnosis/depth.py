"""Compares the gradient norms of one backward pass over depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.diagnosis.trend import Trend, fit_trend, fit_trends, rises
from gradprobe.snapshot.records import FloatArray, IntArray
from gradprobe.snapshot.snapshot import SiteTable, Snapshot

Flow = Literal["healthy", "non-finite", "vanishing", "exploding"]

_FLOWS: tuple[Flow, ...] = ("healthy", "non-finite", "vanishing", "exploding")
_HEALTHY, _NON_FINITE, _VANISHING, _EXPLODING = range(4)


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
    if not len(norms):
        return "healthy"
    return flow_verdicts(np.array([norms], dtype=np.float64), thresholds)[0]


def flow_verdicts(norms: FloatArray, thresholds: Thresholds = DEFAULTS) -> list[Flow]:
    """Judges the gradient norms of T backward passes over depth, each as `flow_verdict` does.

    Args:
        norms: Norms of the weight gradients, from the layer next to the input to the one next to the loss. [T, W], with
            W at least 1.
        thresholds: Limits of the rules.

    Returns:
        The verdicts. Length T.
    """
    ends = _ends_verdicts(norms, thresholds)  # [T]
    if _is_deep(norms.shape[1], thresholds):
        least = math.log(min(thresholds.exploding_ratio, 1 / thresholds.vanishing_ratio))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(norms[:, 1:-1])  # [T, L]
            steep = np.flatnonzero((ends == _HEALTHY) & (np.abs(rises(logs)) > least))  # most are not
            lines = fit_trends(logs[steep])
            is_slope = np.abs(np.log(lines.factor)) * lines.factor > thresholds.slope_errors * lines.std_error
            is_slope &= np.isfinite(lines.first) & np.isfinite(lines.last)  # a line may leave the range of floats
        ends[steep[is_slope]] = _statuses(lines.first, lines.last, thresholds)[is_slope]
    ends = np.where(np.isfinite(norms).all(axis=1), ends, _NON_FINITE)
    return [_FLOWS[code] for code in ends.tolist()]


def ends_verdict(norms: Sequence[float], thresholds: Thresholds) -> Flow:
    """Judges the first of at least one norm against the last, as `flow_verdict` does, without the line."""
    return _FLOWS[int(_ends_verdicts(np.array([norms], dtype=np.float64), thresholds)[0])]


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
    return _FLOWS[int(_statuses(np.float64(norm), np.float64(last_norm), thresholds))]


def layer_statuses(norms: Sequence[float], last_norm: float, thresholds: Thresholds = DEFAULTS) -> list[Flow]:
    """Judges the gradient norms of several layers as `layer_status` does.

    Args:
        norms: Norms of the layers' gradients. Length L.
        last_norm: Norm of the last layer's gradient.
        thresholds: Limits of the rules.

    Returns:
        The verdicts. Length L.
    """
    statuses = _statuses(np.asarray(norms, dtype=np.float64), np.float64(last_norm), thresholds)
    return [_FLOWS[code] for code in statuses.tolist()]


def weight_names(snapshot: Snapshot) -> list[str]:
    """Returns the names of the parameters that `weight_norms` covers."""
    return [snapshot.table.names[k] for k in _weights(snapshot)]


def weight_norms(snapshot: Snapshot) -> list[float]:
    """Returns the gradient norms of the weights in model order. Length W.

    `weights_among` says which parameters are weights.
    """
    norms: list[float] = snapshot.columns["norm"][_weights(snapshot)].tolist()
    return norms


def weights_among(present: npt.NDArray[np.bool_], table: SiteTable) -> npt.NDArray[np.intp]:
    """Returns the positions of the weights that can be compared over depth.

    These have a gradient, more than one dimension and one place in the model: the gradient of a tied weight is the sum
    of those at all its places. If there is none, all parameters with a gradient count.

    Args:
        present: Which parameters have a gradient. [K]
        table: The parameters.
    """
    matrices = present & (np.asarray(table.ndims) > 1)
    n_names = np.bincount(np.fromiter(table.index.values(), dtype=np.intp), minlength=len(present))
    for found in (matrices & (n_names <= 1), matrices):
        if found.any():
            return np.flatnonzero(found)
    return np.flatnonzero(present)


def _weights(snapshot: Snapshot) -> npt.NDArray[np.intp]:
    return weights_among(snapshot.measured.present, snapshot.table)


def _is_deep(n_weights: int, thresholds: Thresholds) -> bool:
    return n_weights - 2 >= thresholds.slope_sites


def _ends_verdicts(norms: FloatArray, thresholds: Thresholds) -> IntArray:
    """Returns the codes of the verdicts on T backward passes, without the line. Shape [T]."""
    ends = _statuses(norms[:, 0], norms[:, -1], thresholds)
    if not _is_deep(norms.shape[1], thresholds):
        return ends
    # A last layer whose gradient stands out is no trend over depth.
    is_trend = _statuses(norms[:, 0], norms[:, -2], thresholds) == _VANISHING
    return np.where((ends == _VANISHING) & ~is_trend, _HEALTHY, ends)


def _statuses(norms: FloatArray | np.float64, last_norms: FloatArray | np.float64, thresholds: Thresholds) -> IntArray:
    """Returns the codes of `layer_status`, of the shape of the norms."""
    with np.errstate(invalid="ignore", over="ignore"):
        is_vanishing = (norms < thresholds.vanishing_norm) & (norms <= thresholds.vanishing_ratio * last_norms)
        is_exploding = norms > thresholds.exploding_ratio * last_norms
    code = np.where(is_vanishing, _VANISHING, np.where(is_exploding, _EXPLODING, _HEALTHY))
    return np.where(np.isfinite(norms) & np.isfinite(last_norms), code, _NON_FINITE)
