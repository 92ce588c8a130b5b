"""One SQLite file per sweep: what was asked, what was measured, and what is needed to go on after a kill.

The file is in WAL mode and is written by one process, one transaction per epoch of a cell: the measurements of the
epoch and the checkpoint from which the next one starts are there together or not at all. Not-a-number is NULL in the
file and ``nan`` when read (SQLite has no NaN); infinities are kept.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gradprobe.errors import StoreError
from gradprobe.report.records import Cell, EpochRow, JunctionRow, LayerRow

APPLICATION_ID = 0x67725072  # "grPr"
SCHEMA_VERSION = 2
_WITHOUT_JUNCTIONS = 1  # the schema version that is this one but for the table of junctions

_TIMEOUT_S = 60.0

RunT = TypeVar("RunT", bound="Run")

_JUNCTION_TABLE = """
CREATE TABLE junction(
    cell INTEGER NOT NULL REFERENCES cell(id), epoch INTEGER NOT NULL, position INTEGER NOT NULL, site TEXT NOT NULL,
    shortcut_norm_l2 REAL, branch_norm_l2 REAL, cosine REAL, shortcut_share REAL,
    PRIMARY KEY(cell, epoch, position)) WITHOUT ROWID;
"""
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE cell(
    id INTEGER PRIMARY KEY, family TEXT NOT NULL, depth INTEGER NOT NULL, seed INTEGER NOT NULL,
    parameters INTEGER NOT NULL, status TEXT NOT NULL CHECK(status IN ('pending', 'done', 'diverged')),
    UNIQUE(family, depth, seed));
CREATE TABLE epoch(
    cell INTEGER NOT NULL REFERENCES cell(id), epoch INTEGER NOT NULL, train_loss REAL, train_error_pct REAL,
    test_error_pct REAL, seconds REAL, PRIMARY KEY(cell, epoch));
CREATE TABLE layer(
    cell INTEGER NOT NULL REFERENCES cell(id), epoch INTEGER NOT NULL, position INTEGER NOT NULL, site TEXT NOT NULL,
    norm_l2 REAL, rms REAL, abs_max REAL, zero_fraction REAL, nonfinite INTEGER NOT NULL, numel INTEGER NOT NULL,
    PRIMARY KEY(cell, epoch, position)) WITHOUT ROWID;
{_JUNCTION_TABLE}
CREATE TABLE checkpoint(cell INTEGER PRIMARY KEY REFERENCES cell(id), epoch INTEGER NOT NULL, state BLOB NOT NULL);
"""


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite raises about ``path`` into one line of ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class Run:
    """A sweep's file, opened for reading, also while a sweep writes it. Close it, or use it in ``with``."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    def __enter__(self: RunT) -> RunT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; calling it again does nothing."""
        self._db.close()

    def _rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with _sqlite_errors(self.path):
            return self._db.execute(query, arguments).fetchall()

    @property
    def meta(self) -> dict[str, str]:
        """The file's head: ``schema_version``, ``gradprobe_version``, ``torch_version``, ``config`` and more."""
        return dict(self._rows("SELECT key, value FROM meta ORDER BY key"))

    @property
    def config(self) -> dict[str, Any]:
        """What all cells share: the data, the epochs and the recipe."""
        config: dict[str, Any] = json.loads(self.meta["config"])
        return config

    def cells(self) -> list[Cell]:
        """All cells, by family, depth and seed in the order in which they were asked for."""
        return [
            Cell(*row) for row in self._rows("SELECT id, family, depth, seed, parameters, status FROM cell ORDER BY id")
        ]

    def epochs(self, cell_id: int) -> list[EpochRow]:
        """The epochs of a cell that are recorded so far, from 0 on."""
        query = f"SELECT {', '.join(_EPOCH_COLUMNS)} FROM epoch WHERE cell = ? ORDER BY epoch"
        return [EpochRow(row[0], *map(_number, row[1:])) for row in self._rows(query, cell_id)]

    def layers(self, cell_id: int, epoch: int) -> list[LayerRow]:
        """The gradients of a cell's weights in one epoch, in depth order; empty where that epoch is not recorded."""
        query = f"SELECT {', '.join(_LAYER_COLUMNS)} FROM layer WHERE cell = ? AND epoch = ? ORDER BY position"
        rows = self._rows(query, cell_id, epoch)
        return [LayerRow(*row[:3], *map(_number, row[3:7]), *row[7:]) for row in rows]

    def junctions(self, cell_id: int, epoch: int) -> list[JunctionRow]:
        """The residual junctions of a cell before its step after so many epochs, in depth order.

        Empty for a plain net, where that step is not recorded, and in a file of a version that recorded no junctions.
        """
        if self.meta["schema_version"] == str(_WITHOUT_JUNCTIONS):
            return []
        query = f"SELECT {', '.join(_JUNCTION_COLUMNS)} FROM junction WHERE cell = ? AND epoch = ? ORDER BY position"
        return [JunctionRow(*row[:3], *map(_number, row[3:])) for row in self._rows(query, cell_id, epoch)]


_EPOCH_COLUMNS = tuple(field.name for field in fields(EpochRow))
_LAYER_COLUMNS = tuple(field.name for field in fields(LayerRow))
_JUNCTION_COLUMNS = tuple(field.name for field in fields(JunctionRow))


class RunWriter(Run):
    """A sweep's file, opened by the one process that writes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: sqlite3.Connection) -> None:
        super().__init__(path, connection)
        self._lock = lock

    def close(self) -> None:
        """Closes the file and lets another sweep write it."""
        super().close()
        _release(self.path, self._lock)

    def add_cells(self, cells: Sequence[tuple[str, int, int, int]]) -> None:
        """Adds the cells that are not in the file yet.

        Args:
            cells: (family, depth, seed, parameters) of each.
        """
        with _sqlite_errors(self.path), self._db:
            self._db.executemany(
                "INSERT INTO cell(family, depth, seed, parameters, status) VALUES(?, ?, ?, ?, 'pending') "
                "ON CONFLICT DO NOTHING",
                cells,
            )

    def checkpoint(self, cell_id: int) -> bytes | None:
        """The state after a cell's last recorded epoch; None where no epoch is recorded."""
        rows = self._rows("SELECT state FROM checkpoint WHERE cell = ?", cell_id)
        return bytes(rows[0][0]) if rows else None

    def save(
        self,
        cell_id: int,
        epochs: Sequence[EpochRow],
        layers: Sequence[LayerRow],
        junctions: Sequence[JunctionRow],
        state: bytes,
        status: str = "pending",
    ) -> None:
        """Records an epoch of a cell, in one transaction.

        Args:
            cell_id: the cell.
            epochs: the epoch's row; for the first epoch also that of epoch 0.
            layers: the gradients of the same epochs.
            junctions: the residual junctions of the epoch's first step.
            state: what the next epoch starts from; kept only while the status is ``"pending"``.
            status: the cell's status from now on.
        """
        with _sqlite_errors(self.path), self._db:
            for table, columns, rows in (
                ("epoch", _EPOCH_COLUMNS, epochs),
                ("layer", _LAYER_COLUMNS, layers),
                ("junction", _JUNCTION_COLUMNS, junctions),
            ):
                self._db.executemany(
                    f"INSERT INTO {table}(cell, {', '.join(columns)}) VALUES(?{', ?' * len(columns)})",
                    [(cell_id, *astuple(row)) for row in rows],
                )
            if status == "pending":
                last = max(row.epoch for row in epochs)
                self._db.execute("INSERT OR REPLACE INTO checkpoint VALUES(?, ?, ?)", (cell_id, last, state))
            else:
                self._db.execute("DELETE FROM checkpoint WHERE cell = ?", (cell_id,))
                self._db.execute("UPDATE cell SET status = ? WHERE id = ?", (status, cell_id))
        if status != "pending":
            with _sqlite_errors(self.path):
                # Gives back the pages of the checkpoint, which is many times larger than all measurements.
                self._db.executescript("PRAGMA incremental_vacuum")


def open_run(path: str | Path) -> Run:
    """Opens a sweep's file for reading.

    Args:
        path: the file that ``gradprobe sweep --out`` wrote.

    Returns:
        The run; close it, or use it in a ``with`` statement.

    Raises:
        StoreError: there is no such file, it is not one of ours, or it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> start_run(path, {"data": "digits", "epochs": 2}, {"torch_version": "2.13.0"}).close()
        >>> with open_run(path) as run:
        ...     run.config["epochs"], run.cells()
        (2, [])
    """
    path = Path(path)
    if not _exists(path):
        raise StoreError(f"{path}: there is no such file; gradprobe sweep --out {path} makes it")
    _check_ours(path)
    uri = path.resolve().as_uri()
    with _sqlite_errors(path):
        # Not mode=ro: such a reader leaves the files of the WAL behind.
        connection = sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=_TIMEOUT_S)
        try:
            try:
                connection.execute("PRAGMA query_only = 1")
                _check_version(path, connection)
            except sqlite3.OperationalError:
                # WAL needs a file of shared memory beside the database; a read-only folder allows none, and so nobody
                # is writing there either.
                if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
                    raise
                connection.close()
                connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)
                _check_version(path, connection)
        except BaseException:
            connection.close()
            raise
    return Run(path, connection)


def start_run(path: str | Path, config: Mapping[str, Any], meta: Mapping[str, str]) -> RunWriter:
    """Opens a sweep's file for writing: makes it, or goes on with it when it was made with the same configuration.

    A file of an older version gets the table that it lacks.

    Args:
        path: the file; missing folders are made.
        config: what all cells share, as JSON values. Cells are no part of it: a later sweep may add some.
        meta: further facts for the file's head (versions, creation time); kept from the file's first sweep.

    Returns:
        The writer; close it, or use it in a ``with`` statement.

    Raises:
        StoreError: the file is not one of ours, is damaged, cannot be written, is being written by another sweep, or
            was made with another configuration (the message names the options that differ). The file is left as it is.

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
        raise StoreError(f"{path}: cannot make its folder: {error}") from error
    if _is_there(path):
        _check_ours(path)
    lock = _take_lock(path)
    connection: sqlite3.Connection | None = None
    try:
        with _sqlite_errors(path):
            if not _is_there(path):
                _create(path, {**meta, "schema_version": str(SCHEMA_VERSION), "config": _json(config)})
            connection = _connect(path, _TIMEOUT_S)
            version = _check_version(path, connection)
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise StoreError(f"{path}: the file is damaged: {damage}")
            _check_config(path, json.loads(_json(config)), json.loads(_meta(connection, "config")))
            connection.execute("PRAGMA synchronous = NORMAL")
            # Fails here, not an epoch later, where the file cannot be written.
            connection.execute("BEGIN IMMEDIATE")
            if version == _WITHOUT_JUNCTIONS:
                connection.execute(_JUNCTION_TABLE)
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))
            connection.commit()
    except BaseException:
        if connection is not None:
            connection.close()
        _release(path, lock)
        raise
    return RunWriter(path, connection, lock)


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _create(path: Path, meta: Mapping[str, str]) -> None:
    """Makes the file under another name first: whatever kills us, ``path`` is a whole run or is not there."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    connection = _connect(unfinished, _TIMEOUT_S)
    try:
        connection.execute("PRAGMA journal_mode = MEMORY")
        # Lets the pages of finished checkpoints be given back; works only before the first table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.executescript(_SCHEMA)
        connection.executemany("INSERT INTO meta VALUES(?, ?)", sorted(meta.items()))
        connection.commit()
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()
    unfinished.replace(path)


def _meta(connection: sqlite3.Connection, key: str) -> str:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"the file's head has no {key!r}")
    value: str = row[0]
    return value


def _connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    # By the whole path: SQLite takes ":memory:" for no file, and "file:…" for an address.
    return sqlite3.connect(path.absolute(), timeout=timeout_s)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # too long a name
        raise StoreError(f"{path}: cannot be used: {error.strerror}") from error


def _is_there(path: Path) -> bool:
    """Whether there is more than an empty file, which may be overwritten."""
    return _exists(path) and not (path.is_file() and path.stat().st_size == 0)


def _check_ours(path: Path) -> None:
    """Reads the mark in the file's first bytes, so that SQLite never opens what is not ours."""
    if not path.is_file():
        raise StoreError(f"{path}: needed a file, found a {'folder' if path.is_dir() else 'device or pipe'}")
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if not head.startswith(b"SQLite format 3\0"):
        raise StoreError(f"{path}: needed a run written by gradprobe sweep, found a file that is no SQLite database")
    if head[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise StoreError(f"{path}: needed a run written by gradprobe sweep, found another SQLite database")


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    version = _meta(connection, "schema_version")
    if version not in (str(_WITHOUT_JUNCTIONS), str(SCHEMA_VERSION)):
        raise StoreError(
            f"{path}: written with schema version {version}; this gradprobe reads versions {_WITHOUT_JUNCTIONS} to "
            f"{SCHEMA_VERSION}"
        )
    return int(version)


def _check_config(path: Path, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    differences = [
        f"{key} is {stored.get(key)!r} in the file and {asked.get(key)!r} now"
        for key in sorted({*asked, *stored})
        if asked.get(key) != stored.get(key)
    ]
    if differences:
        raise StoreError(f"{path}: made by a sweep with other options: {'; '.join(differences)}. Give another --out.")


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _take_lock(path: Path) -> sqlite3.Connection:
    """Holds ``path`` for this process. SQLite's own locks work on every system and end with their process."""
    lock: sqlite3.Connection | None = None
    try:
        lock = _connect(_lock_path(path), 0.0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if lock is not None:
            lock.close()
        if "locked" in str(error):
            raise StoreError(f"{path}: another sweep is writing this file") from error
        raise StoreError(f"{path}: cannot write in its folder: {error}") from error
    return lock


def _release(path: Path, lock: sqlite3.Connection) -> None:
    # The file goes first: whoever comes next makes a new one.
    _lock_path(path).unlink(missing_ok=True)
    lock.close()
