"""Writes snapshots as JSON Lines: those given at once, or each step as it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from gradprobe.sinks.append import FileTracker
from gradprobe.sinks.tracker import Profile, with_places
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.files import write_files
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import COLUMNS


class JSONL(FileTracker):
    """Appends each step to a file of strict JSON in UTF-8, one line per step or finding.

    A step's line holds its number and `Snapshot.metrics()`; a finding's holds step, title and text. NaN and infinities
    are written as the strings "nan", "inf" and "-inf". If the file exists, the lines are added to it. A line is written
    at once and whole, so a process that is killed loses none that was written.

    Args:
        path: The file.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`; such a step has each quantity at each place.

    Raises:
        ArgumentError: An argument is invalid.
    """

    _has_exact_names = True
    _start = '{"step":'

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        self._append({"step": step, **with_places(numbers, profile)})

    def _say(self, step: int, title: str, text: str) -> None:
        self._append({"step": step, "finding": title, "text": text})

    def _append(self, line: dict[str, object]) -> None:
        self._lines.append(json.dumps(strict(line), allow_nan=False) + "\n")


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
