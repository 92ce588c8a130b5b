"""One SQLite file per sweep: its configuration, its measurements, and the checkpoints from which it resumes.

The file is in WAL mode and is written by one process, one transaction per epoch of a cell, so it contains both the
measurements of an epoch and the checkpoint for the next one, or neither. SQLite has no NaN: it is stored as NULL.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, astuple, fields
from pathlib import Path
from typing import IO, Any, TypeVar, get_args

from gradprobe.errors import StoreError
from gradprobe.report.records import SPEC_KEY, Cell, EpochRow, JunctionRow, LayerRow, Status

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

APPLICATION_ID = 0x67725072  # "grPr"
SCHEMA_VERSION = 4
_WITHOUT_PROGRESS = 3  # the schema version whose table of progress within an epoch may be missing
_WITHOUT_RUNNING_ERRORS = 2  # the schema version that lacks the columns of running errors and the table of failures too
_WITHOUT_JUNCTIONS = 1  # the schema version that lacks the junction table as well

_TIMEOUT_S = 60.0

# Settings that files of older versions do not record, with the values that they had.
_IMPLIED = {
    "image_size": None,
    "per_class": None,
    "optimizer": "sgd",
    "norm": "batch",
    "init": "he",
    "precision": "float32",
    "device": "cpu",
}

# Settings of the configuration that are whole numbers; the report computes with them.
_COUNTS = ("epochs", "batch_size", "train_images", "test_images")
# Columns whose finite values are at least 0 and at most this.
_LIMITS = {"train_error_pct": 100.0, "test_error_pct": 100.0, "seconds": 1e12, "running_error_pct": 100.0}

RunT = TypeVar("RunT", bound="Run")
RecordT = TypeVar("RecordT", Cell, EpochRow, LayerRow, JunctionRow)

_JUNCTION_TABLE = """
CREATE TABLE junction(
    cell INTEGER NOT NULL REFERENCES cell(id), epoch INTEGER NOT NULL, position INTEGER NOT NULL, site TEXT NOT NULL,
    shortcut_norm_l2 REAL, branch_norm_l2 REAL, cosine REAL, shortcut_share REAL,
    PRIMARY KEY(cell, epoch, position)) WITHOUT ROWID;
"""
_FAILURE_TABLE = """
CREATE TABLE failure(cell INTEGER PRIMARY KEY REFERENCES cell(id), reason TEXT NOT NULL);
"""
_PROGRESS_TABLE = """
CREATE TABLE IF NOT EXISTS progress(cell INTEGER PRIMARY KEY REFERENCES cell(id), share REAL NOT NULL);
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
    test_error_pct REAL, seconds REAL, running_loss REAL, running_error_pct REAL, PRIMARY KEY(cell, epoch));
CREATE TABLE layer(
    cell INTEGER NOT NULL REFERENCES cell(id), epoch INTEGER NOT NULL, position INTEGER NOT NULL, site TEXT NOT NULL,
    norm_l2 REAL, rms REAL, abs_max REAL, zero_fraction REAL, nonfinite INTEGER NOT NULL, numel INTEGER NOT NULL,
    PRIMARY KEY(cell, epoch, position)) WITHOUT ROWID;
{_JUNCTION_TABLE}
{_FAILURE_TABLE}
{_PROGRESS_TABLE}
CREATE TABLE checkpoint(cell INTEGER PRIMARY KEY REFERENCES cell(id), epoch INTEGER NOT NULL, state BLOB NOT NULL);
"""


@contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    """Turns the errors of SQLite and of the operating system into a `StoreError` that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (sqlite3.Error, OSError, UnicodeError) as error:
        raise StoreError(f"{path}: {error}") from error


def _damaged(path: Path, fault: str) -> StoreError:
    return StoreError(f"{path}: the file is damaged: {fault}")


def _record(path: Path, kind: type[RecordT], values: Sequence[object]) -> RecordT:
    """Makes a record of a row, whose columns SQLite holds in any type and with any value."""
    read: list[Any] = []
    for field, stored in zip(fields(kind), values, strict=True):
        value = math.nan if stored is None and field.type == "float" else stored
        if not _is_valid(field, value):
            table = kind.__name__.removesuffix("Row").lower()
            raise _damaged(path, f"{field.name} is {reprlib.repr(stored)} in a row of table {table}")
        read.append(value)
    return kind(*read)


def _is_valid(field: Field[Any], value: object) -> bool:
    if field.type == "float":
        limit = _LIMITS.get(field.name)
        return isinstance(value, float) and (limit is None or not math.isfinite(value) or 0 <= value <= limit)
    if field.type == "int":
        return isinstance(value, int) and value >= 0
    return isinstance(value, str) and (field.type != "Status" or value in get_args(Status))


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
        with _store_errors(self.path):
            return self._db.execute(query, arguments).fetchall()

    def _records(self, kind: type[RecordT], query: str, *arguments: object) -> list[RecordT]:
        return [_record(self.path, kind, row) for row in self._rows(query, *arguments)]

    @property
    def meta(self) -> dict[str, str]:
        """The file's metadata: ``schema_version``, ``gradprobe_version``, ``torch_version``, ``config`` and more."""
        with _store_errors(self.path):
            return _meta(self.path, self._db)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that all cells share: data, epochs, recipe."""
        return _config(self.path, self.meta)

    @property
    def _version(self) -> int:
        """The schema version, which a sweep may raise at any time."""
        return int(self.meta["schema_version"])

    def cells(self) -> list[Cell]:
        """Returns all cells, in the order in which they were added."""
        failure, share = "''", "0.0"
        version = self._version
        if version > _WITHOUT_RUNNING_ERRORS:
            failure = "coalesce((SELECT reason FROM failure WHERE failure.cell = cell.id), '')"
        if version > _WITHOUT_PROGRESS:
            share = "(SELECT share FROM progress WHERE progress.cell = cell.id AND share BETWEEN 0 AND 1)"
            share = f"coalesce({share}, 0.0)"
        columns = f"id, family, depth, seed, parameters, status, {failure}, {share}"
        return self._records(Cell, f"SELECT {columns} FROM cell ORDER BY id")

    def specs(self) -> list[str]:
        """Returns the settings of each different command that wrote the file, as TOML; none in an older file."""
        specs = {int(key.partition(" ")[2] or 1): value for key, value in self.meta.items() if SPEC_KEY.fullmatch(key)}
        return [specs[number] for number in sorted(specs)]

    def epochs(self, cell_id: int) -> list[EpochRow]:
        """Returns the epochs of a cell recorded so far, from 0."""
        is_older = self._version <= _WITHOUT_RUNNING_ERRORS
        columns = ["NULL" if is_older and name in _RUNNING_COLUMNS else name for name in _EPOCH_COLUMNS]
        query = f"SELECT {', '.join(columns)} FROM epoch WHERE cell = ? ORDER BY epoch"
        return self._records(EpochRow, query, cell_id)

    def layers(self, cell_id: int, epoch: int) -> list[LayerRow]:
        """Returns the gradients of a cell's weights in one epoch, by depth; empty if the epoch is not recorded."""
        query = f"SELECT {', '.join(_LAYER_COLUMNS)} FROM layer WHERE cell = ? AND epoch = ? ORDER BY position"
        return self._records(LayerRow, query, cell_id, epoch)

    def junctions(self, cell_id: int, epoch: int) -> list[JunctionRow]:
        """Returns the residual adds of a cell in its first step after ``epoch`` completed epochs, in depth order.

        Empty for a plain network, if the step is not recorded, and in a file of schema version 1.
        """
        if self._version == _WITHOUT_JUNCTIONS:
            return []
        query = f"SELECT {', '.join(_JUNCTION_COLUMNS)} FROM junction WHERE cell = ? AND epoch = ? ORDER BY position"
        return self._records(JunctionRow, query, cell_id, epoch)

    def checkpoint(self, cell_id: int) -> bytes | None:
        """Returns the checkpoint after a cell's last recorded epoch; None if no epoch is recorded."""
        rows = self._rows("SELECT state FROM checkpoint WHERE cell = ?", cell_id)
        if not rows:
            return None
        state = rows[0][0]
        if not isinstance(state, bytes):
            raise _damaged(self.path, f"a checkpoint is {reprlib.repr(state)}")
        return state


_RUNNING_COLUMNS = ("running_loss", "running_error_pct")
_EPOCH_COLUMNS = tuple(field.name for field in fields(EpochRow))
_LAYER_COLUMNS = tuple(field.name for field in fields(LayerRow))
_JUNCTION_COLUMNS = tuple(field.name for field in fields(JunctionRow))


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
        with _store_errors(self.path), self._db:
            self._db.executemany(
                "INSERT INTO cell(family, depth, seed, parameters, status) VALUES(?, ?, ?, ?, 'pending') "
                "ON CONFLICT DO NOTHING",
                cells,
            )

    def add_spec(self, spec: str) -> None:
        """Adds the settings of another command that writes the file, unless the file is older and lacks the first."""
        specs = self.specs()
        if specs and spec not in specs:
            with _store_errors(self.path), self._db:
                self._db.execute("INSERT INTO meta VALUES(?, ?)", (f"spec {len(specs) + 1}", spec))

    def record_failure(self, cell_id: int, reason: str) -> None:
        """Records the exception that stopped a cell; its next progress or epoch removes it."""
        with _store_errors(self.path), self._db:
            text = reason.encode("utf-8", "backslashreplace").decode()
            self._db.execute("DELETE FROM progress WHERE cell = ?", (cell_id,))
            self._db.execute("INSERT OR REPLACE INTO failure VALUES(?, ?)", (cell_id, text))

    def record_progress(self, cell_id: int, share: float) -> None:
        """Records the share of the steps of a cell's epoch in progress that are done."""
        with _store_errors(self.path), self._db:
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
        with _store_errors(self.path), self._db:
            for table, columns, rows in (
                ("epoch", _EPOCH_COLUMNS, epochs),
                ("layer", _LAYER_COLUMNS, layers),
                ("junction", _JUNCTION_COLUMNS, junctions),
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
            with _store_errors(self.path):
                # Frees the pages of the checkpoint, which is many times larger than all measurements.
                self._db.executescript("PRAGMA incremental_vacuum")


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
        >>> path = Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> start_run(path, {"data": "digits", "epochs": 2}, {"torch_version": "2.13.0"}).close()
        >>> with open_run(path) as run:
        ...     run.config["epochs"], run.cells()
        (2, [])
    """
    path = Path(path)
    if not _exists(path):
        raise StoreError(f"{path}: no such file; gradprobe sweep --out {path} creates it")
    _check_file(path)
    uri = path.resolve().as_uri()
    with _store_errors(path):
        # Not mode=ro: such a reader leaves the WAL files behind.
        connection = sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=_TIMEOUT_S)
        try:
            try:
                connection.execute("PRAGMA query_only = 1")
                _check_rows(path, connection, _check_version(path, connection))
            except sqlite3.OperationalError:
                # WAL needs a shared-memory file beside the database. A read-only folder cannot have one, but then no
                # process is writing either.
                if os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
                    raise
                connection.close()
                connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)
                _check_rows(path, connection, _check_version(path, connection))
        except BaseException:
            connection.close()
            raise
    return Run(path, connection)


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
    if _has_content(path):
        _check_file(path)
    lock = _take_lock(path)
    connection: sqlite3.Connection | None = None
    try:
        with _store_errors(path):
            if not _has_content(path):
                _create(path, {**meta, "schema_version": str(SCHEMA_VERSION), "config": _json(config)})
            connection = _connect(path)
            version = _check_version(path, connection)
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise _damaged(path, damage)
            _check_config(path, json.loads(_json(config)), _config(path, _meta(path, connection)))
            connection.execute("PRAGMA synchronous = NORMAL")
            # Fails now, rather than an epoch later, if the file cannot be written.
            connection.execute("BEGIN IMMEDIATE")
            if version == _WITHOUT_JUNCTIONS:
                connection.execute(_JUNCTION_TABLE)
            if version <= _WITHOUT_RUNNING_ERRORS:
                for column in _RUNNING_COLUMNS:
                    connection.execute(f"ALTER TABLE epoch ADD COLUMN {column} REAL")
                connection.execute(_FAILURE_TABLE)
            if version <= _WITHOUT_PROGRESS:
                connection.execute(_PROGRESS_TABLE)
            connection.execute("DELETE FROM progress")
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))
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
            # Allows the pages of deleted checkpoints to be freed; has an effect only before the first table.
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.executescript(_SCHEMA)
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


def _meta(path: Path, connection: sqlite3.Connection) -> dict[str, str]:
    meta = dict(connection.execute("SELECT key, value FROM meta ORDER BY key").fetchall())
    for key in ("schema_version", "config"):
        if key not in meta:
            raise _damaged(path, f"the metadata have no {key!r}")
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise _damaged(path, f"the metadata hold {reprlib.repr(value)} for {reprlib.repr(key)}")
    return meta


def _config(path: Path, meta: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(meta["config"])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _damaged(path, f"the configuration is {reprlib.repr(config)}")
    for key in _COUNTS:
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _damaged(path, f"{key} is {reprlib.repr(value)} in the configuration")
    return config


def _connect(path: Path) -> sqlite3.Connection:
    # An absolute path: SQLite does not treat ":memory:" and "file:…" as file names.
    return sqlite3.connect(path.absolute(), timeout=_TIMEOUT_S)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # e.g. a name that is too long
        raise StoreError(f"{path}: cannot be used: {error.strerror}") from error


def _has_content(path: Path) -> bool:
    """Returns whether the path exists and is not an empty file, which may be overwritten."""
    return _exists(path) and not (path.is_file() and path.stat().st_size == 0)


def _check_file(path: Path) -> None:
    """Checks the application id in the file's header, so that SQLite never opens another program's file."""
    if not path.is_file():
        raise StoreError(f"{path}: needed a file, found a {'folder' if path.is_dir() else 'device or pipe'}")
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if not head.startswith(b"SQLite format 3\0"):
        raise StoreError(f"{path}: needed a file written by gradprobe sweep, found one that is not an SQLite database")
    if head[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise StoreError(f"{path}: needed a file written by gradprobe sweep, found another SQLite database")


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    version = _meta(path, connection)["schema_version"]
    if version not in map(str, range(_WITHOUT_JUNCTIONS, SCHEMA_VERSION + 1)):
        raise StoreError(
            f"{path}: has schema version {version}; this gradprobe reads versions {_WITHOUT_JUNCTIONS} to "
            f"{SCHEMA_VERSION}"
        )
    return int(version)


def _check_rows(path: Path, connection: sqlite3.Connection, version: int) -> None:
    """Checks that no layer or residual add is missing: the seeds of a network are compared place by place."""
    for table in ("layer",) if version == _WITHOUT_JUNCTIONS else ("layer", "junction"):
        query = (
            "SELECT family, depth, epoch FROM "
            f"(SELECT cell, epoch, count(*) AS n, max(position) AS last FROM {table} GROUP BY cell, epoch) "
            "JOIN cell ON cell.id = cell GROUP BY family, depth, epoch HAVING min(n) <> max(last) + 1"
        )
        for family, depth, epoch in connection.execute(query):
            raise _damaged(path, f"rows of table {table} are missing for {family}-{depth} at epoch {epoch}")


def _check_config(path: Path, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    asked, stored = {**_IMPLIED, **asked}, {**_IMPLIED, **stored}
    differences = [
        f"{key} is {stored.get(key)!r} in the file and {asked.get(key)!r} now"
        for key in sorted({*asked, *stored})
        if asked.get(key) != stored.get(key)
    ]
    if differences:
        raise StoreError(f"{path}: written by a sweep with other options: {'; '.join(differences)}. Use another --out.")


def _take_lock(path: Path) -> IO[bytes]:
    """Reserves ``path`` for its holder, until the file returned is closed or the process ends.

    The lock file stays: if it were removed, a process that has it open and one that creates it anew would each lock a
    file of their own.
    """
    # The file itself may be reached by several links.
    target = Path(os.path.realpath(path))
    if not os.access(target.parent, os.W_OK):  # the lock file may exist, but SQLite needs files of its own
        raise StoreError(f"{path}: cannot write in its folder: {os.strerror(errno.EACCES)}")
    try:
        lock = target.with_name(target.name + ".lock").open("ab")
    except OSError as error:
        raise StoreError(f"{path}: cannot write in its folder: {error.strerror}") from error
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise StoreError(f"{path}: another sweep is writing this file") from error
        raise StoreError(f"{path}: cannot be locked: {error.strerror}") from error
    return lock
