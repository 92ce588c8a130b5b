"""The tables of a sweep's file, and what older schema versions lack."""

from __future__ import annotations

import sqlite3
from dataclasses import fields

from gradprobe.report.records import EpochRow, JunctionRow, LayerRow

APPLICATION_ID = 0x67725072  # "grPr"
SCHEMA_VERSION = 4
_WITHOUT_PROGRESS = 3  # the version whose table of progress within an epoch may be missing
_WITHOUT_RUNNING_ERRORS = 2  # the version that lacks the columns of running errors and the table of failures, too
_WITHOUT_JUNCTIONS = 1  # the version that lacks the junction table, too
VERSIONS = range(_WITHOUT_JUNCTIONS, SCHEMA_VERSION + 1)
"""Schema versions that can be read."""

EPOCH_COLUMNS = tuple(field.name for field in fields(EpochRow))
LAYER_COLUMNS = tuple(field.name for field in fields(LayerRow))
JUNCTION_COLUMNS = tuple(field.name for field in fields(JunctionRow))
_RUNNING_COLUMNS = ("running_loss", "running_error_pct")

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


def create_tables(connection: sqlite3.Connection) -> None:
    """Creates the tables in an empty database."""
    # Allows the pages of deleted checkpoints to be freed; has an effect only before the first table.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.executescript(_SCHEMA)


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Adds what a version lacks, within the transaction of the connection."""
    if not has_junctions(version):
        connection.execute(_JUNCTION_TABLE)
    if version <= _WITHOUT_RUNNING_ERRORS:
        for column in _RUNNING_COLUMNS:
            connection.execute(f"ALTER TABLE epoch ADD COLUMN {column} REAL")
        connection.execute(_FAILURE_TABLE)
    if version <= _WITHOUT_PROGRESS:
        connection.execute(_PROGRESS_TABLE)
    connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))


def has_junctions(version: int) -> bool:
    """Returns whether files of a version have the table of residual adds."""
    return version > _WITHOUT_JUNCTIONS


def cell_query(version: int) -> str:
    """Returns the query for the fields of all cells."""
    failure, share = "''", "0.0"
    if version > _WITHOUT_RUNNING_ERRORS:
        failure = "coalesce((SELECT reason FROM failure WHERE failure.cell = cell.id), '')"
    if version > _WITHOUT_PROGRESS:
        share = "(SELECT share FROM progress WHERE progress.cell = cell.id AND share BETWEEN 0 AND 1)"
        share = f"coalesce({share}, 0.0)"
    return f"SELECT id, family, depth, seed, parameters, status, {failure}, {share} FROM cell ORDER BY id"


def epoch_query(version: int) -> str:
    """Returns the query for the fields of a cell's epochs."""
    is_older = version <= _WITHOUT_RUNNING_ERRORS
    columns = ["NULL" if is_older and name in _RUNNING_COLUMNS else name for name in EPOCH_COLUMNS]
    return f"SELECT {', '.join(columns)} FROM epoch WHERE cell = ? ORDER BY epoch"
