"""Reads the file of a sweep, also while a sweep writes it."""

from __future__ import annotations

import os
import reprlib
import sqlite3
from pathlib import Path
from typing import Any, TypeVar

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store.checks import (
    RecordT,
    check_file,
    check_rows,
    check_version,
    damaged,
    exists,
    read_config,
    read_meta,
    store_errors,
    to_record,
)
from gradprobe.experiments.sweep.store.schema import (
    JUNCTION_COLUMNS,
    LAYER_COLUMNS,
    cell_query,
    epoch_query,
    has_junctions,
)
from gradprobe.report.records import SPEC_KEY, Cell, EpochRow, JunctionRow, LayerRow

RunT = TypeVar("RunT", bound="Run")

TIMEOUT_S = 60.0


class Run:
    """A sweep's file, opened for reading, also while a sweep writes it. Close it or use it in ``with``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    def __enter__(self: RunT) -> RunT:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._db.close()

    def _rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with store_errors(self.path):
            return self._db.execute(query, arguments).fetchall()

    def _records(self, kind: type[RecordT], query: str, *arguments: object) -> list[RecordT]:
        return [to_record(self.path, kind, row) for row in self._rows(query, *arguments)]

    @property
    def meta(self) -> dict[str, str]:
        """The file's metadata: ``schema_version``, ``gradprobe_version``, ``torch_version``, ``config`` and more."""
        with store_errors(self.path):
            return read_meta(self.path, self._db)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that all cells share: data, epochs, recipe."""
        return read_config(self.path, self.meta)

    @property
    def _version(self) -> int:
        """The schema version, which a sweep may raise at any time."""
        return int(self.meta["schema_version"])

    def cells(self) -> list[Cell]:
        """Returns all cells, in the order in which they were added."""
        return self._records(Cell, cell_query(self._version))

    def specs(self) -> list[str]:
        """Returns the settings of each different command that wrote the file, as TOML; none in an older file."""
        specs = {int(key.partition(" ")[2] or 1): value for key, value in self.meta.items() if SPEC_KEY.fullmatch(key)}
        return [specs[number] for number in sorted(specs)]

    def epochs(self, cell_id: int) -> list[EpochRow]:
        """Returns the epochs of a cell recorded so far, from 0."""
        return self._records(EpochRow, epoch_query(self._version), cell_id)

    def layers(self, cell_id: int, epoch: int) -> list[LayerRow]:
        """Returns the gradients of a cell's weights in one epoch, by depth; empty if the epoch is not recorded."""
        query = f"SELECT {', '.join(LAYER_COLUMNS)} FROM layer WHERE cell = ? AND epoch = ? ORDER BY position"
        return self._records(LayerRow, query, cell_id, epoch)

    def junctions(self, cell_id: int, epoch: int) -> list[JunctionRow]:
        """Returns the residual adds of a cell in its first step after ``epoch`` completed epochs, in depth order.

        Empty for a plain network, if the step is not recorded, and in a file of schema version 1.
        """
        if not has_junctions(self._version):
            return []
        query = f"SELECT {', '.join(JUNCTION_COLUMNS)} FROM junction WHERE cell = ? AND epoch = ? ORDER BY position"
        return self._records(JunctionRow, query, cell_id, epoch)

    def checkpoint(self, cell_id: int) -> bytes | None:
        """Returns the checkpoint after a cell's last recorded epoch; None if no epoch is recorded."""
        rows = self._rows("SELECT state FROM checkpoint WHERE cell = ?", cell_id)
        if not rows:
            return None
        state = rows[0][0]
        if not isinstance(state, bytes):
            raise damaged(self.path, f"a checkpoint is {reprlib.repr(state)}")
        return state


def open_run(path: str | Path) -> Run:
    """Opens a sweep's file for reading.

    Args:
        path: File that ``gradprobe sweep --out`` wrote.

    Returns:
        The run; close it or use it in a ``with`` statement.

    Raises:
        StoreError: The file does not exist, is not a sweep's file, or cannot be read.

    Example:
        >>> import tempfile
        >>> from gradprobe.experiments.sweep.store import start_run
        >>> path = Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> start_run(path, {"data": "digits", "epochs": 2}, {"torch_version": "2.13.0"}).close()
        >>> with open_run(path) as run:
        ...     run.config["epochs"], run.cells()
        (2, [])
    """
    path = Path(path)
    if not exists(path):
        raise StoreError(f"{path}: no such file; gradprobe sweep --out {path} creates it")
    check_file(path)
    uri = path.resolve().as_uri()
    with store_errors(path):
        # Not mode=ro: such a reader leaves the WAL files behind.
        connection = sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=TIMEOUT_S)
        try:
            try:
                connection.execute("PRAGMA query_only = 1")
                check_rows(path, connection, check_version(path, connection))
            except sqlite3.OperationalError:
                # WAL needs a shared-memory file beside the database. A read-only folder cannot have one, but then no
                # process is writing either.
                if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
                    raise
                connection.close()
                connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)
                check_rows(path, connection, check_version(path, connection))
        except BaseException:
            connection.close()
            raise
    return Run(path, connection)
