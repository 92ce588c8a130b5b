"""Snapshots as a pandas table, and values as strict JSON. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import COLUMNS

if TYPE_CHECKING:
    import pandas


def to_pandas(snapshots: Iterable[Snapshot]) -> pandas.DataFrame:
    """Collects snapshots in one tidy table.

    Args:
        snapshots: Any number of snapshots.

    Returns:
        One row per step and site: step, loss, site, kind, then `COLUMNS`. In each step the gradients of the parameters
        come first, then the activations and residual adds in order of execution, the parameters before the optimizer's
        step, and the updates.

    Raises:
        ArgumentError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ArgumentError("to_pandas: needs pandas; install it with: pip install 'gradprobe[pandas]'") from error
    frames = []
    for snapshot in snapshots:
        present = np.flatnonzero(snapshot.measured.present)
        frames.append(_frame(pandas, snapshot, snapshot.table.names, snapshot.table.kinds, snapshot.columns, present))
        if snapshot.signals is not None:
            table, columns = snapshot.signals.table, snapshot.signals.columns
            frames.append(_frame(pandas, snapshot, table.names, table.kinds, columns, snapshot.signals.observed))
        if snapshot.parameter_updates is not None:
            updates, present = snapshot.parameter_updates, np.flatnonzero(snapshot.parameter_updates.measured.present)
            for kind, columns in (("weight", updates.weight_columns), ("update", updates.update_columns)):
                frames.append(_frame(pandas, snapshot, updates.names, [kind] * len(updates.names), columns, present))
    if not frames:
        return pandas.DataFrame(columns=["step", "loss", "site", "kind", *COLUMNS])
    return pandas.concat(frames, ignore_index=True)


def _frame(
    pandas: Any,
    snapshot: Snapshot,
    names: Sequence[str],
    kinds: Sequence[str],
    columns: Mapping[str, FloatArray],
    sites: Sequence[int] | npt.NDArray[np.intp],
) -> pandas.DataFrame:
    chosen = np.asarray(sites, dtype=np.int64)
    values = {
        name: column[chosen].astype(np.int64) if name in ("nonfinite", "numel") else column[chosen]
        for name, column in columns.items()
    }
    loss = math.nan if snapshot.loss is None else snapshot.loss
    named = {"site": np.asarray(names, dtype=object)[chosen], "kind": np.asarray(kinds, dtype=object)[chosen]}
    return pandas.DataFrame({"step": snapshot.step, "loss": loss, **named, **values})


def strict(value: object) -> object:
    """Replaces the floats that JSON has no notation for by strings, which `float()` reads back.

    Args:
        value: Dicts, lists, tuples and plain values, nested in any way.

    Returns:
        The same as dicts with string keys and lists, with "nan", "inf" and "-inf" for such floats.

    Example:
        >>> strict({"norms": (1.0, math.inf)})
        {'norms': [1.0, 'inf']}
    """
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
