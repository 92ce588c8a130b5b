"""Files of sweeps as older versions wrote them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def make_version_3(path: str | Path) -> None:
    """Turns a sweep's file into one of schema version 3, which has no progress within an epoch."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE progress")
        database.execute("UPDATE meta SET value = '3' WHERE key = 'schema_version'")


def make_version_2(path: str | Path) -> None:
    """Turns a sweep's file into one of schema version 2, which has neither running errors nor reasons of failures."""
    make_version_3(path)
    with closing(sqlite3.connect(path)) as database, database:
        for column in ("running_loss", "running_error_pct"):
            database.execute(f"ALTER TABLE epoch DROP COLUMN {column}")
        database.execute("DROP TABLE failure")
        database.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")


def make_version_1(path: str | Path) -> None:
    """Turns a sweep's file into one of schema version 1, which has no residual adds either."""
    make_version_2(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE junction")
        database.execute("UPDATE meta SET value = '1' WHERE key = 'schema_version'")
