"""Appends whole lines to a file, for the sinks that write to one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import ClassVar

from gradprobe.errors import StoreError
from gradprobe.sinks.tracker import Tracker
from gradprobe.snapshot.files import create_folder
from gradprobe.snapshot.metrics import Detail


class AppendedFile:
    """A file of lines that grows by whole lines.

    A line that a killed process left unfinished at the end is removed, and so is a line that a full disk cuts off.

    Args:
        path: The file, which is created with its folder if it does not exist.
        start: How the first line of such a file starts; a file that starts otherwise is rejected.

    Raises:
        StoreError: The file cannot be opened, or is another file.
    """

    def __init__(self, path: str | PathLike[str], start: str) -> None:
        self._path = Path(path)
        create_folder(self._path.parent)
        try:
            self._file = self._path.open("a+b", buffering=0)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot write this file: {error.strerror or error}") from error
        try:
            self.is_empty = self._cut_unfinished(start.encode())
        except BaseException:
            self._file.close()
            raise

    def append(self, text: str) -> None:
        """Appends whole lines.

        Raises:
            StoreError: They cannot be written; then the file is as before.
        """
        end = self._file.seek(0, os.SEEK_END)
        content = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while len(content):
                content = content[self._file.write(content) :]
        except OSError as error:
            self._file.truncate(end)
            raise StoreError(f"{self._path}: cannot write this file: {error.strerror or error}") from error
        self.is_empty = False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _cut_unfinished(self, start: bytes) -> bool:
        """Cuts off an unfinished last line; returns whether the file is empty then."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if not start.startswith(self._file.read(len(start))):  # a shorter file has an unfinished first line
            raise StoreError(f"{self._path}: needed a file that this sink wrote, found another")
        position, block = end, 1 << 16
        while position > 0:
            first = max(0, position - block)
            self._file.seek(first)
            newline = self._file.read(position - first).rfind(b"\n")
            if newline >= 0:
                position = first + newline + 1
                break
            position = first
        if position < end:
            self._file.truncate(position)
        return position == 0


class FileTracker(Tracker):
    """A sink that appends to a file of its own.

    Args:
        path: The file.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`.

    Raises:
        ArgumentError: An argument is invalid.
    """

    _start: ClassVar[str]  # as for `AppendedFile`

    def __init__(
        self, path: str | PathLike[str], *, detail: Detail = "summary", every: int = 1, profile_every: int = 100
    ) -> None:
        super().__init__(detail, every, profile_every)
        self._path = Path(path)
        self._file: AppendedFile | None = None

    @property
    def _lines(self) -> AppendedFile:
        assert self._file is not None
        return self._file

    def _open(self, about: Mapping[str, object]) -> None:
        self._file = AppendedFile(self._path, self._start)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
