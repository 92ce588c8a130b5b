"""Appends steps to a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from gradprobe.sinks.append import AppendedFile
from gradprobe.sinks.tracker import Profile, Tracker, with_places
from gradprobe.snapshot.metrics import PREFIX, Detail

_HEADER = "step,name,value,text\n"


class CSV(Tracker):
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

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        detail: Detail = "summary",
        every: int = 1,
        profile_every: int = 100,
    ) -> None:
        super().__init__(detail, every, profile_every)
        self._path = Path(path)
        self._file: AppendedFile | None = None

    def _open(self, about: Mapping[str, object]) -> None:
        self._file = AppendedFile(self._path, _HEADER)
        if self._file.is_empty:
            self._file.append(_HEADER)

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        self._append((step, name, value, "") for name, value in with_places(numbers, profile).items())

    def _say(self, step: int, title: str, text: str) -> None:
        self._append([(step, f"{PREFIX}finding/{title}", "", text)])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, rows: Iterable[tuple[int, str, float | str, str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        assert self._file is not None
        self._file.append(text.getvalue())
