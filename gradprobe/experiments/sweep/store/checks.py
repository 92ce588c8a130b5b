"""Checks that a file is a sweep's and undamaged, and turns its rows into records."""

from __future__ import annotations

import json
import math
import reprlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store.schema import APPLICATION_ID, VERSIONS, has_junctions
from gradprobe.report.records import Cell, EpochRow, JunctionRow, LayerRow, Status

RecordT = TypeVar("RecordT", Cell, EpochRow, LayerRow, JunctionRow)

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


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns the errors of SQLite and of the operating system into a `StoreError` that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (sqlite3.Error, OSError, UnicodeError) as error:
        raise StoreError(f"{path}: {error}") from error


def damaged(path: Path, fault: str) -> StoreError:
    """Makes the error that says that a file is damaged, and how."""
    return StoreError(f"{path}: the file is damaged: {fault}")


def to_record(path: Path, kind: type[RecordT], values: Sequence[object]) -> RecordT:
    """Makes a record of a row, whose columns SQLite holds in any type and with any value."""
    read: list[Any] = []
    for field, stored in zip(fields(kind), values, strict=True):
        value = math.nan if stored is None and field.type == "float" else stored
        if not _is_valid(field, value):
            table = kind.__name__.removesuffix("Row").lower()
            raise damaged(path, f"{field.name} is {reprlib.repr(stored)} in a row of table {table}")
        read.append(value)
    return kind(*read)


def _is_valid(field: Field[Any], value: object) -> bool:
    if field.type == "float":
        limit = _LIMITS.get(field.name)
        return isinstance(value, float) and (limit is None or not math.isfinite(value) or 0 <= value <= limit)
    if field.type == "int":
        return isinstance(value, int) and value >= 0
    return isinstance(value, str) and (field.type != "Status" or value in get_args(Status))


def read_meta(path: Path, connection: sqlite3.Connection) -> dict[str, str]:
    """Reads the metadata; raises a StoreError if a necessary key is missing or a value is not text."""
    meta = dict(connection.execute("SELECT key, value FROM meta ORDER BY key").fetchall())
    for key in ("schema_version", "config"):
        if key not in meta:
            raise damaged(path, f"the metadata have no {key!r}")
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise damaged(path, f"the metadata hold {reprlib.repr(value)} for {reprlib.repr(key)}")
    return meta


def read_config(path: Path, meta: Mapping[str, str]) -> dict[str, Any]:
    """Reads the configuration in the metadata; raises a StoreError if it is none."""
    try:
        config = json.loads(meta["config"])
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise damaged(path, f"the configuration is {reprlib.repr(config)}")
    for key in _COUNTS:
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise damaged(path, f"{key} is {reprlib.repr(value)} in the configuration")
    return config


def exists(path: Path) -> bool:
    """Returns whether the path exists; raises a StoreError if it cannot."""
    try:
        return path.exists()
    except OSError as error:  # e.g. a name that is too long
        raise StoreError(f"{path}: cannot be used: {error.strerror}") from error


def has_content(path: Path) -> bool:
    """Returns whether the path exists and is not an empty file, which may be overwritten."""
    return exists(path) and not (path.is_file() and path.stat().st_size == 0)


def check_file(path: Path) -> None:
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


def check_version(path: Path, connection: sqlite3.Connection) -> int:
    """Returns the schema version; raises a StoreError if this gradprobe cannot read it."""
    version = read_meta(path, connection)["schema_version"]
    if version not in map(str, VERSIONS):
        raise StoreError(
            f"{path}: has schema version {version}; this gradprobe reads versions {VERSIONS[0]} to {VERSIONS[-1]}"
        )
    return int(version)


def check_rows(path: Path, connection: sqlite3.Connection, version: int) -> None:
    """Checks that no layer or residual add is missing: the seeds of a network are compared place by place."""
    for table in ("layer", "junction") if has_junctions(version) else ("layer",):
        query = (
            "SELECT family, depth, epoch FROM "
            f"(SELECT cell, epoch, count(*) AS n, max(position) AS last FROM {table} GROUP BY cell, epoch) "
            "JOIN cell ON cell.id = cell GROUP BY family, depth, epoch HAVING min(n) <> max(last) + 1"
        )
        for family, depth, epoch in connection.execute(query):
            raise damaged(path, f"rows of table {table} are missing for {family}-{depth} at epoch {epoch}")


def check_config(path: Path, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises a StoreError that names the settings that differ, if any do."""
    asked, stored = {**_IMPLIED, **asked}, {**_IMPLIED, **stored}
    differences = [
        f"{key} is {stored.get(key)!r} in the file and {asked.get(key)!r} now"
        for key in sorted({*asked, *stored})
        if asked.get(key) != stored.get(key)
    ]
    if differences:
        raise StoreError(f"{path}: written by a sweep with other options: {'; '.join(differences)}. Use another --out.")
