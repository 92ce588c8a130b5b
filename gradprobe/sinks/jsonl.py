"""Writes snapshots as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from gradprobe.errors import StoreError
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import COLUMNS


def write_jsonl(snapshots: Iterable[Snapshot], path: str | PathLike[str]) -> None:
    """Writes snapshots to a new file of strict JSON in UTF-8, one line per step and site.

    A site is one place where statistics are taken: a parameter, an activation or an operand of a residual add. NaN and
    infinities, which JSON lacks, are written as the strings "nan", "inf" and "-inf".

    Args:
        snapshots: Any number of snapshots.
        path: The file to create.

    Raises:
        StoreError: The file exists or cannot be written.
    """
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            for snapshot in snapshots:
                for line in _lines(snapshot):
                    file.write(json.dumps(strict(line), allow_nan=False) + "\n")
    except FileExistsError as error:
        raise StoreError(f"path: needed a file that does not exist yet; {path} exists") from error
    except OSError as error:
        raise StoreError(f"path: cannot write {path}: {error.strerror}") from error


def _lines(snapshot: Snapshot) -> Iterable[dict[str, object]]:
    head: dict[str, object] = {
        "step": snapshot.step,
        "loss": snapshot.loss,
        "skipped": snapshot.skipped,
        **snapshot.provenance._asdict(),
    }
    for stats in snapshot.all_stats():
        values = {column: getattr(stats, column) for column in COLUMNS}
        yield {**head, "site": stats.name, "kind": stats.kind, **values}
