"""Appends steps to a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping

from gradprobe.sinks.append import FileTracker
from gradprobe.sinks.tracker import Profile, with_places
from gradprobe.snapshot.metrics import PREFIX


class CSV(FileTracker):
    """Appends steps to a CSV file with one row per number: step, name, value, and the text of findings.

    Control characters in names are spelled out. If the file exists, the rows are added to it. A step is written at once
    and whole, so a process that is killed loses none that was written.

    Args:
        path: The file.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`; such a step has each quantity at each place.

    Raises:
        ArgumentError: An argument is invalid.
    """

    _start = "step,name,value,text\n"

    def _open(self, about: Mapping[str, object]) -> None:
        super()._open(about)
        if self._lines.is_empty:
            self._lines.append(self._start)

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        self._append((step, name, value, "") for name, value in with_places(numbers, profile).items())

    def _say(self, step: int, title: str, text: str) -> None:
        self._append([(step, f"{PREFIX}finding/{title}", "", text)])

    def _append(self, rows: Iterable[tuple[int, str, float | str, str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._lines.append(text.getvalue())
