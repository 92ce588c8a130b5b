"""Reads a run folder back: the snapshots, exactly as they were written, and the findings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import StoreError
from gradprobe.log.folder import read_about
from gradprobe.log.formats import format_of
from gradprobe.ops.rows import STATS
from gradprobe.snapshot.records import Events, FloatArray, Measured, Provenance
from gradprobe.snapshot.signals import Signals, SignalTable
from gradprobe.snapshot.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.updates import Updates

_SITE = ("session", "step", "position", "present")
_MEASURED = (*_SITE, "numel", *(f"raw_{name}" for name in STATS))


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Its path.
        about: What about.json says: the sessions, i.e. the writers that have appended to the folder, with their options
            and versions, and the names of all sites.
    """

    folder: Path
    about: Mapping[str, Any]

    def snapshots(self, session: int | None = None) -> list[Snapshot]:
        """Returns the steps of the run in order, equal to those written.

        A run that resumes from a checkpoint repeats the steps after it; the newest of each counts.

        Args:
            session: Only those of one session, counted from 0.

        Raises:
            ArgumentError: The files are in Parquet, and pyarrow is not installed.
            StoreError: A file cannot be read.
        """
        steps = self._read("steps", STEP_COLUMNS)
        kept: list[int] = []
        for row in range(len(steps["step"])):
            if session is not None and steps["session"][row] != session:
                continue
            while kept and steps["step"][kept[-1]] >= steps["step"][row]:
                kept.pop()
            kept.append(row)
        about = read_about(self.folder) or self.about  # the steps may be of tables that are newer than this object
        tables = _Tables(
            [_site_table(*one) for one in about["parameter_tables"]],
            [SignalTable(*map(tuple, one)) for one in about["signal_tables"]],
            self._blocks("parameters", PARAMETER_COLUMNS),
            self._blocks("activations", (*_MEASURED, "smallest_normal")),
            self._blocks("residual_adds", (*_MEASURED, "smallest_normal")),
            self._blocks("updates", UPDATE_COLUMNS),
        )
        return [tables.snapshot({name: values[row] for name, values in steps.items()}) for row in kept]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings in the order in which they were made; of one that was made again, the newest."""
        found: dict[str, Finding] = {}
        for text in self._read("findings", ("finding",))["finding"]:
            finding = finding_of(text)
            found.pop(finding.title, None)
            found[finding.title] = finding
        return tuple(found.values())

    def _blocks(self, table: str, columns: Sequence[str]) -> _Blocks:
        return _Blocks(self.folder / table, self._read(table, columns))

    def _read(self, table: str, columns: Sequence[str]) -> dict[str, Any]:
        """Reads some columns of all parts of a table."""
        paths = sorted(path for path in (self.folder / table).glob("*") if not path.name.startswith("."))
        parts = []
        for path in paths:
            reader = format_of(path)
            try:
                parts.append(reader.read(path, columns))
            except (OSError, ValueError, KeyError) as error:
                raise StoreError(f"{path}: cannot read this file: {error}") from error
        return {name: _joined([part[name] for part in parts]) for name in columns}


def read_run(folder: str | PathLike[str]) -> Run:
    """Opens a run folder, which may still be written.

    Args:
        folder: The folder given to `attach(log_dir=...)`.

    Returns:
        The run.

    Raises:
        StoreError: It is no run folder.
    """
    path = Path(folder)
    about = read_about(path)
    if about is None:
        raise StoreError(f"{path}: needed a run folder, found no about.json in it")
    return Run(path, about)


PARAMETER_COLUMNS = (*_MEASURED, "differ")
UPDATE_COLUMNS = (*_SITE, "numel", *(f"raw_{part}_{name}" for part in ("weight", "update") for name in STATS))
STEP_COLUMNS = (
    "session",
    "step",
    "loss",
    "skipped",
    "clip_factor",
    "scale",
    "gradient_scale",
    "gradient_reduction",
    "gradient_state",
    "is_accumulated",
    "is_contested",
    "parameter_table",
    "update_table",
    "signal_table",
    "signal_scale",
    "signal_reduction",
    "execution",
)


def snapshot_of(
    step: Mapping[str, Any], about: Mapping[str, Any], parameters: Mapping[str, Any], updates: Mapping[str, Any] | None
) -> Snapshot:
    """Returns a step without its activations and residual adds.

    Args:
        step: Its row in the table `steps`.
        about: What about.json says.
        parameters: `PARAMETER_COLUMNS` of its rows in the table `parameters`.
        updates: `UPDATE_COLUMNS` of its rows in the table `updates`; None to leave the updates out.
    """
    nothing = _Blocks(Path(), {"position": ()})
    tables = _Tables(
        [_site_table(*one) for one in about["parameter_tables"]],
        (),
        _Blocks(Path("parameters"), parameters),
        nothing,
        nothing,
        nothing if updates is None else _Blocks(Path("updates"), updates),
    )
    is_bare = {"signal_table": None, **({"update_table": None} if updates is None else {})}
    return tables.snapshot({**step, **is_bare})


class _Blocks:
    """The rows of a table by session and step; of a step that was written twice, the newest."""

    def __init__(self, table: Path, columns: Mapping[str, Any]) -> None:
        self._table = table
        self._columns = columns
        starts = np.flatnonzero(np.asarray(columns["position"], dtype=np.int64) == 0).tolist()
        keys = [(int(columns["session"][start]), int(columns["step"][start])) for start in starts]
        self._start_of = dict(zip(keys, starts, strict=True))
        self._raw: dict[str, FloatArray] = {}

    def chosen(self, key: tuple[int, int], n: int) -> slice:
        """Returns the rows of a step, given their number."""
        if n > 0 and key not in self._start_of:
            raise StoreError(f"{self._table}: needed rows of step {key[1]} of session {key[0]}, found none")
        start = self._start_of.get(key, 0)
        return slice(start, start + n)

    def column(self, name: str, rows: slice) -> Any:
        return self._columns[name][rows]

    def raw(self, rows: slice, part: str = "") -> FloatArray:
        """Returns the raw statistics, [K, 6]."""
        if part not in self._raw:
            columns = [_floats(self._columns[f"raw_{part}{name}"]) for name in STATS]
            self._raw[part] = np.stack(columns, axis=-1)
        return self._raw[part][rows]

    def measured(self, rows: slice) -> Measured:
        present = np.asarray(self._columns["present"][rows], dtype=np.bool_)
        return Measured(present, np.asarray(self._columns["numel"][rows], dtype=np.int64))


@dataclass(frozen=True)
class _Tables:
    """Everything that snapshots are made of."""

    parameter_tables: Sequence[SiteTable]
    signal_tables: Sequence[SignalTable]
    parameters: _Blocks
    activations: _Blocks
    residual_adds: _Blocks
    updates: _Blocks

    def snapshot(self, step: Mapping[str, Any]) -> Snapshot:
        key = (int(step["session"]), int(step["step"]))
        table = self.parameter_tables[int(step["parameter_table"])]
        rows = self.parameters.chosen(key, len(table.names))
        differ = self.parameters.column("differ", rows)
        is_reduced = len(differ) > 0 and differ[0] is not None
        return Snapshot(
            step=key[1],
            loss=_optional(step["loss"]),
            provenance=Provenance(step["gradient_scale"], step["gradient_reduction"], step["gradient_state"]),
            skipped=bool(step["skipped"]),
            table=table,
            rows=self.parameters.raw(rows),
            measured=self.parameters.measured(rows),
            scale=float(step["scale"]),
            signals=None if step["signal_table"] is None else self._signals(step, key),
            parameter_updates=None if step["update_table"] is None else self._updates(int(step["update_table"]), key),
            clip_factor=_optional(step["clip_factor"]),
            differ=np.asarray(differ, dtype=np.bool_) if is_reduced else None,
            is_accumulated=bool(step["is_accumulated"]),
            is_contested=bool(step["is_contested"]),
        )

    def _signals(self, step: Mapping[str, Any], key: tuple[int, int]) -> Signals:
        table = self.signal_tables[int(step["signal_table"])]
        first = table.first_junction_site
        parts = [
            (blocks, blocks.chosen(key, n))
            for blocks, n in ((self.activations, first), (self.residual_adds, table.n_sites - first))
            if n
        ]
        measured = [blocks.measured(rows) for blocks, rows in parts]
        events = Events(
            sites=tuple(int(site) for site in step["execution"]),
            measured=Measured(
                np.concatenate([one.present for one in measured]), np.concatenate([one.numels for one in measured])
            ),
            smallest_normal=np.concatenate([_floats(blocks.column("smallest_normal", rows)) for blocks, rows in parts]),
        )
        raw = np.concatenate([blocks.raw(rows) for blocks, rows in parts])
        return Signals(table, raw, events, float(step["signal_scale"]), step["signal_reduction"])

    def _updates(self, number: int, key: tuple[int, int]) -> Updates:
        names = self.parameter_tables[number].names
        rows = self.updates.chosen(key, len(names))
        weights, moves = self.updates.raw(rows, "weight_"), self.updates.raw(rows, "update_")
        return Updates(names, weights, moves, self.updates.measured(rows))


def _site_table(
    names: Sequence[str], kinds: Sequence[str], ndims: Sequence[int], index: Mapping[str, int]
) -> SiteTable:
    return SiteTable(tuple(names), tuple(kinds), tuple(ndims), dict(index))


def finding_of(text: str) -> Finding:
    """Reads a finding back from the column `finding`."""
    values: dict[str, Any] = json.loads(text)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values["evidence"] = {name: float(value) for name, value in values["evidence"].items()}
    known = {each.name for each in fields(Finding)}
    return Finding(**{name: value for name, value in values.items() if name in known})


def _joined(parts: Sequence[Any]) -> Any:
    """Joins the values of several parts, an array if all are."""
    if parts and all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in (part.tolist() if isinstance(part, np.ndarray) else part)]


def _floats(values: Any) -> FloatArray:
    """Reads numbers, some of which may be spelled out, such as "nan"."""
    if isinstance(values, np.ndarray):
        return np.asarray(values, dtype=np.float64)
    return np.array([float(value) for value in values], dtype=np.float64)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
