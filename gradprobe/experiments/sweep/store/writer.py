"""Writes the file of a sweep."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store.checks import (
    check_config,
    check_file,
    check_version,
    damaged,
    has_content,
    read_config,
    read_meta,
    store_errors,
)
from gradprobe.experiments.sweep.store.lock import take_lock
from gradprobe.experiments.sweep.store.reader import TIMEOUT_S, Run
from gradprobe.experiments.sweep.store.schema import (
    EPOCH_COLUMNS,
    JUNCTION_COLUMNS,
    LAYER_COLUMNS,
    SCHEMA_VERSION,
    create_tables,
    migrate,
)
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow, Status


class RunWriter(Run):
    """A sweep's file, opened by the one process that writes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: IO[bytes]) -> None:
        super().__init__(path, connection)
        self._lock = lock

    def close(self) -> None:
        """Closes the file and lets another sweep write it."""
        super().close()
        self._lock.close()

    def add_cells(self, cells: Sequence[tuple[str, int, int, int]]) -> None:
        """Adds those cells, given as (family, depth, seed, parameters), that the file does not contain yet."""
        with store_errors(self.path), self._db:
            self._db.executemany(
                "INSERT INTO cell(family, depth, seed, parameters, status) VALUES(?, ?, ?, ?, 'pending') "
                "ON CONFLICT DO NOTHING",
                cells,
            )

    def add_spec(self, spec: str) -> None:
        """Adds the settings of another command that writes the file, unless the file is older and lacks the first."""
        specs = self.specs()
        if specs and spec not in specs:
            with store_errors(self.path), self._db:
                self._db.execute("INSERT INTO meta VALUES(?, ?)", (f"spec {len(specs) + 1}", spec))

    def record_failure(self, cell_id: int, reason: str) -> None:
        """Records the exception that stopped a cell; its next progress or epoch removes it."""
        with store_errors(self.path), self._db:
            text = reason.encode("utf-8", "backslashreplace").decode()
            self._db.execute("DELETE FROM progress WHERE cell = ?", (cell_id,))
            self._db.execute("INSERT OR REPLACE INTO failure VALUES(?, ?)", (cell_id, text))

    def record_progress(self, cell_id: int, share: float) -> None:
        """Records the share of the steps of a cell's epoch in progress that are done."""
        with store_errors(self.path), self._db:
            self._db.execute("DELETE FROM failure WHERE cell = ?", (cell_id,))
            self._db.execute("INSERT OR REPLACE INTO progress VALUES(?, ?)", (cell_id, share))

    def save(
        self,
        cell_id: int,
        epochs: Sequence[EpochRow],
        layers: Sequence[LayerRow],
        junctions: Sequence[JunctionRow],
        state: bytes,
        status: Status = "pending",
    ) -> None:
        """Records an epoch of a cell, in one transaction.

        Args:
            cell_id: Id of the cell.
            epochs: The epoch's row; for the first epoch also that of epoch 0.
            layers: The weights' gradients in the same epochs.
            junctions: The residual adds in the epoch's first step.
            state: Checkpoint for the next epoch; kept only while the status is ``"pending"``.
            status: New status of the cell.
        """
        with store_errors(self.path), self._db:
            for table, columns, rows in (
                ("epoch", EPOCH_COLUMNS, epochs),
                ("layer", LAYER_COLUMNS, layers),
                ("junction", JUNCTION_COLUMNS, junctions),
            ):
                self._db.executemany(
                    f"INSERT INTO {table}(cell, {', '.join(columns)}) VALUES(?{', ?' * len(columns)})",
                    [(cell_id, *astuple(row)) for row in rows],
                )
            for table in ("failure", "progress"):
                self._db.execute(f"DELETE FROM {table} WHERE cell = ?", (cell_id,))
            if status == "pending":
                last = max(row.epoch for row in epochs)
                self._db.execute("INSERT OR REPLACE INTO checkpoint VALUES(?, ?, ?)", (cell_id, last, state))
            else:
                self._db.execute("DELETE FROM checkpoint WHERE cell = ?", (cell_id,))
                self._db.execute("UPDATE cell SET status = ? WHERE id = ?", (status, cell_id))
        if status != "pending":
            with store_errors(self.path):
                # Frees the pages of the checkpoint, which is many times larger than all measurements.
                self._db.executescript("PRAGMA incremental_vacuum")


def start_run(path: str | Path, config: Mapping[str, Any], meta: Mapping[str, str]) -> RunWriter:
    """Opens a sweep's file for writing: creates it, or resumes it if it has the same configuration.

    A file of an older schema version gets the missing tables and columns.

    Args:
        path: The file; missing folders are created.
        config: Settings that all cells share, as JSON values. The cells are not part of it: a later sweep may add some.
        meta: Further metadata (versions, creation time), written only when the file is created.

    Returns:
        The writer; close it or use it in a ``with`` statement.

    Raises:
        StoreError: The file is not a sweep's file, is damaged, cannot be written, is being written by another sweep, or
            has another configuration (the message names the options that differ). The file is left unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> with start_run(path, {"data": "digits", "epochs": 2}, {}) as run:
        ...     run.add_cells([("plain", 8, 0, 75290)])
        ...     run.cells()[0].name, run.cells()[0].status
        ('plain-8', 'pending')
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot create its folder: {error}") from error
    if has_content(path):
        check_file(path)
    lock = take_lock(path)
    connection: sqlite3.Connection | None = None
    try:
        with store_errors(path):
            if not has_content(path):
                _create(path, {**meta, "schema_version": str(SCHEMA_VERSION), "config": _json(config)})
            connection = _connect(path)
            version = check_version(path, connection)
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise damaged(path, damage)
            check_config(path, json.loads(_json(config)), read_config(path, read_meta(path, connection)))
            connection.execute("PRAGMA synchronous = NORMAL")
            # Fails now, rather than an epoch later, if the file cannot be written.
            connection.execute("BEGIN IMMEDIATE")
            migrate(connection, version)
            connection.execute("DELETE FROM progress")
            connection.commit()
    except BaseException:
        if connection is not None:
            connection.close()
        lock.close()
        raise
    return RunWriter(path, connection, lock)


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _create(path: Path, meta: Mapping[str, str]) -> None:
    """Creates the file under a temporary name first, so that ``path`` is a complete file even after a kill."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        connection = _connect(unfinished)
        try:
            connection.execute("PRAGMA journal_mode = MEMORY")
            create_tables(connection)
            # The name of a data folder may have bytes that are not UTF-8, which SQLite rejects.
            rows = [(key, value.encode("utf-8", "backslashreplace").decode()) for key, value in sorted(meta.items())]
            connection.executemany("INSERT INTO meta VALUES(?, ?)", rows)
            connection.commit()
            connection.execute("PRAGMA journal_mode = WAL")
        finally:
            connection.close()
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _connect(path: Path) -> sqlite3.Connection:
    # An absolute path: SQLite does not treat ":memory:" and "file:…" as file names.
    return sqlite3.connect(path.absolute(), timeout=TIMEOUT_S)
