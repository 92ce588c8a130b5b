"""A step as a flat dictionary of numbers, for loggers that want one. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray

if TYPE_CHECKING:
    from gradprobe.snapshot.snapshot import Snapshot

Detail = Literal["summary", "all"]

PREFIX = "gradprobe/"
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_N_EXTREME = 10  # parameters named in a summary


def metrics(snapshot: Snapshot, detail: Detail = "summary") -> dict[str, float]:
    """Returns the numbers of a step under names such as `gradprobe/grad_norm/layer1.weight`.

    Args:
        snapshot: The step.
        detail: "summary": the total norm, five quantiles of each quantity over the model, and the gradient norms of the
            ten weights that are furthest from the median, by their ratio to it. "all": each quantity at each place.

    Returns:
        The numbers that the step holds.

    Raises:
        ArgumentError: The detail is unknown.
    """
    if detail not in ("summary", "all"):
        raise ArgumentError(f"detail: needed 'summary' or 'all', got {detail!r}")
    found: dict[str, float] = {} if snapshot.loss is None else {"loss": snapshot.loss}
    found["total_norm"] = snapshot.total_norm
    if snapshot.clip_factor is not None:
        found["clip_factor"] = snapshot.clip_factor
    found["skipped"] = float(snapshot.skipped)
    present = snapshot.measured.present
    found["nonfinite"] = float(snapshot.columns["nonfinite"][present].sum())
    for quantity, names, values in quantities(snapshot):
        if detail == "all":
            found |= {f"{quantity}/{name}": value for name, value in zip(names, values.tolist(), strict=True)}
            continue
        finite = values[np.isfinite(values)]
        if len(finite):
            levels = np.quantile(finite, list(QUANTILES.values())).tolist()
            found |= {f"{quantity}_{label}": level for label, level in zip(QUANTILES, levels, strict=True)}
        if quantity == "grad_norm":
            found |= {f"{quantity}/{names[k]}": float(values[k]) for k in _extremes(values)}
    return {PREFIX + name: value for name, value in found.items()}


def quantities(snapshot: Snapshot) -> Iterator[tuple[str, Sequence[str], FloatArray]]:
    """Yields each quantity with the names of its places, in order of depth, and its values."""
    present = snapshot.measured.present
    matrices = present & (np.asarray(snapshot.table.ndims) > 1)
    weights = np.flatnonzero(matrices if matrices.any() else present)
    yield "grad_norm", [snapshot.table.names[k] for k in weights], snapshot.columns["norm"][weights]
    updates = snapshot.parameter_updates
    if updates is not None:
        moved = [k for k in weights.tolist() if updates.measured.present[k]]
        yield "update_ratio", [updates.names[k] for k in moved], updates.ratios[moved]
    signals = snapshot.signals
    if signals is None:
        return
    ran = [site for site in dict.fromkeys(signals.events.sites) if signals.table.kinds[site] == "activation"]
    if ran:
        yield "act_rms", [signals.table.names[site] for site in ran], signals.columns["rms"][ran]
    shares = signals.shortcut_shares
    if shares:
        yield "shortcut_share", list(shares), np.array(list(shares.values()))


def _extremes(norms: FloatArray) -> list[int]:
    """Returns the positions of the norms furthest from their median, by ratio; zero and infinite ones come first."""
    usable = norms[np.isfinite(norms) & (norms > 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = np.abs(np.log(norms / (np.median(usable) if len(usable) else 1.0)))
    distances = np.where(np.isnan(distances), np.inf, distances)
    return sorted(int(k) for k in np.argsort(-distances, kind="stable")[:_N_EXTREME])
