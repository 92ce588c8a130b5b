"""The tables of a run folder: their columns, and how snapshots and findings become rows.

Every step has a whole block of rows in each table, one row per site, absent ones included. The `raw_…` columns are the
raw statistics, in the order of `gradprobe.STATS`; from them a snapshot is read back exactly. The other statistics are
those of `SiteStats`, and are null where `present` is false.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gradprobe.diagnosis.finding import Finding
from gradprobe.ops.rows import STATS
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.records import JUNCTION_KINDS, FloatArray, Measured
from gradprobe.snapshot.signals import Signals
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import COLUMNS, finish_rows

Kind = Literal["int", "float", "bool", "text", "ints", "texts"]

_MEASURED: dict[str, Kind] = {
    **{name: "int" if name in ("nonfinite", "numel") else "float" for name in COLUMNS},
    **{f"raw_{name}": "float" for name in STATS},
}
_STEP: dict[str, Kind] = {"session": "int", "step": "int"}
_SITE: dict[str, Kind] = {"position": "int", "present": "bool"}

# Steps come last: a step is stored once its row in `steps` is.
SCHEMAS: dict[str, dict[str, Kind]] = {
    "parameters": {**_STEP, "parameter": "text", **_SITE, "differ": "bool", **_MEASURED},
    "activations": {
        **_STEP,
        "module": "text",
        "module_type": "text",
        "kind": "text",
        **_SITE,
        "smallest_normal": "float",
        **_MEASURED,
    },
    "residual_adds": {
        **_STEP,
        "module": "text",
        "kind": "text",
        **_SITE,
        "smallest_normal": "float",
        "shortcut_share": "float",
        **_MEASURED,
    },
    "updates": {
        **_STEP,
        "parameter": "text",
        **_SITE,
        "numel": "int",
        "ratio": "float",
        **{f"{part}_{name}": "float" for part in ("weight", "update") for name in COLUMNS[:-1]},
        **{f"raw_{part}_{name}": "float" for part in ("weight", "update") for name in STATS},
    },
    "findings": {
        **_STEP,
        "title": "text",
        "rule": "text",
        "pass": "text",
        "first_step": "int",
        "last_step": "int",
        "sites": "texts",
        "message": "text",
        "cause": "text",
        "remedies": "texts",
        "follows": "text",
        "finding": "text",
    },
    "steps": {
        **_STEP,
        "loss": "float",
        "total_norm": "float",
        "skipped": "bool",
        "clip_factor": "float",
        "scale": "float",
        "gradient_scale": "text",
        "gradient_reduction": "text",
        "gradient_state": "text",
        "is_accumulated": "bool",
        "is_contested": "bool",
        "parameter_table": "int",
        "update_table": "int",
        "signal_table": "int",
        "signal_scale": "float",
        "signal_reduction": "text",
        "execution": "ints",
    },
}


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of few different texts.

    Attributes:
        levels: The texts.
        codes: Position of each row's text among them.
    """

    levels: tuple[str, ...]
    codes: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Nullable:
    """A column in which values are missing.

    Attributes:
        values: The values; of any kind where they are missing.
        valid: Which are not missing.
    """

    values: npt.NDArray[np.generic]
    valid: npt.NDArray[np.bool_]


Column: TypeAlias = "npt.NDArray[np.generic] | Texts | Nullable | list[object]"
Rows: TypeAlias = "dict[str, Column]"  # column by name, of one length


@dataclass(frozen=True)
class TableIds:
    """Numbers of the site tables that a step refers to, as in about.json.

    Attributes:
        parameters: That of its parameters.
        updates: That of its updates, None if it has none.
        signals: That of its activations and residual adds, None if it has none.
    """

    parameters: int
    updates: int | None
    signals: int | None


def rows_of(snapshots: Sequence[Snapshot], ids: Callable[[Snapshot], TableIds], session: int) -> dict[str, list[Rows]]:
    """Turns snapshots into rows of the tables.

    Args:
        snapshots: Steps in order.
        ids: Gives the numbers of a step's site tables.
        session: Number of the session, the first column.

    Returns:
        Blocks of rows by table.
    """
    found: dict[str, list[Rows]] = {}
    numbered = [(ids(snapshot), snapshot) for snapshot in snapshots]
    for _, group in groupby(numbered, key=lambda pair: pair[0].parameters):
        found.setdefault("parameters", []).append(_parameters([one for _, one in group], session))
    with_signals = [(number.signals, one.step, one.signals) for number, one in numbered if one.signals is not None]
    for _, observed in groupby(with_signals, key=lambda triple: triple[0]):
        same = [(step, signals) for _, step, signals in observed]
        for table, rows in _signals(same, session).items():
            found.setdefault(table, []).append(rows)
    with_updates = [pair for pair in numbered if pair[1].parameter_updates is not None]
    for _, group in groupby(with_updates, key=lambda pair: pair[0].updates):
        found.setdefault("updates", []).append(_updates([one for _, one in group], session))
    found["steps"] = [_steps(numbered, session)]
    return found


def finding_rows(step: int, finding: Finding, session: int) -> Rows:
    """Returns the row of a finding.

    Args:
        step: The newest step when it was made.
        finding: The finding.
        session: Number of the session.
    """
    values: dict[str, object] = {
        "session": session,
        "step": step,
        "title": finding.title,
        "rule": finding.rule,
        "pass": finding.where,
        "first_step": finding.steps[0],
        "last_step": finding.steps[1],
        "sites": list(finding.sites),
        "message": finding.message,
        "cause": finding.cause,
        "remedies": list(finding.remedies),
        "follows": finding.follows,
        "finding": json.dumps(strict(asdict(finding))),
    }
    return {name: [value] for name, value in values.items()}


def _steps(numbered: Sequence[tuple[TableIds, Snapshot]], session: int) -> Rows:
    rows: dict[str, list[object]] = {name: [] for name in SCHEMAS["steps"]}
    for number, one in numbered:
        signals = one.signals
        values = {
            "session": session,
            "step": one.step,
            "loss": one.loss,
            "total_norm": one.total_norm,
            "skipped": one.skipped,
            "clip_factor": one.clip_factor,
            "scale": one.scale,
            "gradient_scale": one.provenance.scale,
            "gradient_reduction": one.provenance.reduction,
            "gradient_state": one.provenance.state,
            "is_accumulated": one.is_accumulated,
            "is_contested": one.is_contested,
            "parameter_table": number.parameters,
            "update_table": number.updates,
            "signal_table": number.signals,
            "signal_scale": None if signals is None else signals.scale,
            "signal_reduction": None if signals is None else signals.reduction,
            "execution": None if signals is None else list(signals.events.sites),
        }
        for name, value in values.items():
            rows[name].append(value)
    return dict(rows)


def _parameters(snapshots: Sequence[Snapshot], session: int) -> Rows:
    measured = [one.measured for one in snapshots]
    scales = np.array([one.scale for one in snapshots])[:, None]
    raw = np.stack([one.rows for one in snapshots])  # [T, K, 6]
    n_sites = raw.shape[1]
    absent = np.zeros(n_sites, dtype=np.bool_)
    differ = np.stack([absent if one.differ is None else one.differ for one in snapshots])
    is_known = np.repeat([one.differ is not None for one in snapshots], n_sites)
    return {
        **_head([one.step for one in snapshots], n_sites, session),
        "parameter": _tiled(snapshots[0].table.names, len(snapshots)),
        **_sites(measured),
        "differ": Nullable(differ.reshape(-1), is_known),
        **_statistics(raw, measured, scales),
    }


def _signals(observed: Sequence[tuple[int, Signals]], session: int) -> dict[str, Rows]:
    table = observed[0][1].table
    first, steps = table.first_junction_site, [step for step, _ in observed]
    types = tuple(module_type for module_type in table.module_types for _ in range(2))
    scales = np.stack([np.where(table.is_gradient, one.scale, 1.0) for _, one in observed])  # [T, S]
    raw = np.stack([one.rows for _, one in observed])  # [T, S, 6]
    found = {}
    for name, chosen in (("activations", slice(0, first)), ("residual_adds", slice(first, None))):
        names = table.names[chosen]
        if not names:
            continue
        measured = [
            Measured(one.events.measured.present[chosen], one.events.measured.numels[chosen]) for _, one in observed
        ]
        smallest = np.stack([one.events.smallest_normal[chosen] for _, one in observed])
        rows: Rows = {**_head(steps, len(names), session), "module": _tiled(names, len(steps))}
        if name == "activations":
            rows["module_type"] = _tiled(types, len(steps))
        rows["kind"] = _tiled(table.kinds[chosen], len(steps))
        rows |= _sites(measured)
        rows["smallest_normal"] = smallest.reshape(-1)
        statistics = _statistics(raw[:, chosen], measured, scales[:, chosen])
        if name == "residual_adds":
            rows["shortcut_share"] = _shortcut_shares(statistics, measured)
        found[name] = rows | statistics
    return found


def _shortcut_shares(statistics: Rows, measured: Sequence[Measured]) -> Nullable:
    """Returns `Junction.shortcut_share` in the rows of kind "shortcut_grad"."""
    n_kinds, (shortcut, branch) = len(JUNCTION_KINDS), map(JUNCTION_KINDS.index, ("shortcut_grad", "branch_grad"))
    norms = statistics["norm"]
    assert isinstance(norms, Nullable)
    sizes = norms.values.astype(np.float64).reshape(-1, n_kinds)  # [T J, 7]
    present = norms.valid.reshape(-1, n_kinds)
    numels = np.stack([one.numels for one in measured]).reshape(-1, n_kinds)
    shares = np.full(sizes.shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares[:, shortcut] = sizes[:, shortcut] / (sizes[:, shortcut] + sizes[:, branch])
    is_known = present[:, shortcut] & present[:, branch] & (numels[:, shortcut] == numels[:, branch])
    shares[~is_known] = np.nan
    return Nullable(shares.reshape(-1), np.isfinite(shares.reshape(-1)))


def _updates(snapshots: Sequence[Snapshot], session: int) -> Rows:
    updates = [one.parameter_updates for one in snapshots if one.parameter_updates is not None]
    measured = [one.measured for one in updates]
    present = np.stack([one.present for one in measured]).reshape(-1)
    numels = np.stack([one.numels for one in measured])
    rows: Rows = {
        **_head([one.step for one in snapshots], numels.shape[1], session),
        "parameter": _tiled(updates[0].names, len(updates)),
        **_sites(measured),
        "numel": numels.reshape(-1),
        "ratio": Nullable(np.stack([one.ratios for one in updates]).reshape(-1), present),
    }
    raw = {
        "weight": np.stack([one.weight_rows for one in updates]),
        "update": np.stack([one.update_rows for one in updates]),
    }
    for part, values in raw.items():
        columns = finish_rows(values, numels, 1.0, COLUMNS[:-1])
        rows |= {f"{part}_{name}": Nullable(column.reshape(-1), present) for name, column in columns.items()}
    for part, values in raw.items():
        rows |= {f"raw_{part}_{name}": values[..., k].reshape(-1) for k, name in enumerate(STATS)}
    return rows


def _head(steps: Sequence[int], n_sites: int, session: int) -> Rows:
    repeated = np.repeat(np.asarray(steps, dtype=np.int64), n_sites)
    return {"session": np.full_like(repeated, session), "step": repeated}


def _tiled(texts: Sequence[str], n_steps: int) -> Texts:
    return Texts(tuple(texts), np.tile(np.arange(len(texts)), n_steps))


def _sites(measured: Sequence[Measured]) -> Rows:
    return {
        "position": np.tile(np.arange(len(measured[0].present)), len(measured)),
        "present": np.stack([one.present for one in measured]).reshape(-1),
    }


def _statistics(raw: FloatArray, measured: Sequence[Measured], scales: FloatArray) -> Rows:
    numels = np.stack([one.numels for one in measured])
    present = np.stack([one.present for one in measured]).reshape(-1)
    rows: Rows = {}
    for name, column in finish_rows(raw, numels, scales).items():
        flat = column.reshape(-1)
        if name == "numel":
            rows[name] = numels.reshape(-1)
        elif name == "nonfinite":
            rows[name] = Nullable(np.where(present, flat, 0.0).astype(np.int64), present)
        else:
            rows[name] = Nullable(flat, present)
    return rows | {f"raw_{name}": raw[..., k].reshape(-1) for k, name in enumerate(STATS)}


def length(rows: Mapping[str, Column]) -> int:
    """Returns the number of rows."""
    column = next(iter(rows.values()))
    return len(column.codes if isinstance(column, Texts) else column.values if isinstance(column, Nullable) else column)
