"""Writes snapshots as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from gradprobe.snapshot.export import strict
from gradprobe.snapshot.files import write_files
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
        StoreError: The file exists, or it cannot be written; then it does not exist afterwards.
    """
    lines = (json.dumps(strict(line), allow_nan=False) + "\n" for snapshot in snapshots for line in _lines(snapshot))
    write_files({Path(path): lines}, new=True)


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
