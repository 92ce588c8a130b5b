"""What a run folder says of itself in about.json, and who writes to it."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import IO, Any

from gradprobe.errors import StoreError

if sys.platform != "win32":
    import fcntl

FORMAT = 1

_LISTS = ("sessions", "parameter_tables", "signal_tables")  # in about.json

_in_use: set[Path] = set()  # by this process, whose own locks do not exclude each other


def read_about(folder: Path) -> dict[str, Any] | None:
    """Reads about.json, None if there is none.

    Args:
        folder: The run folder.

    Raises:
        StoreError: It cannot be read, or is not that of a run folder.
    """
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot read this file: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{path}: needed JSON, got something else: {error}") from error
    if (
        not isinstance(about, dict)
        or about.get("format") != FORMAT
        or not all(isinstance(about.get(name), list) for name in _LISTS)
    ):
        raise StoreError(f"{path}: needed a run folder of format {FORMAT}, got another")
    return about


def part_path(table: Path, session: int, number: int, suffix: str) -> Path:
    """Returns the path of a part of a table.

    Args:
        table: The folder of the table.
        session: Number of the session that writes the part.
        number: Number of the part within the session.
        suffix: That of the file's format.
    """
    return table / f"{session:04d}-{number:06d}{suffix}"


class FolderLock:
    """Reserves a folder for one writer, until it is released or the process ends.

    Args:
        folder: The folder, which exists.

    Raises:
        StoreError: Another writer uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        if self._folder in _in_use:
            raise StoreError(f"{folder}: another probe is writing in this folder")
        try:
            self._file: IO[bytes] = (folder / ".lock").open("ab")
        except OSError as error:
            raise StoreError(f"{folder}: cannot write in this folder: {error.strerror}") from error
        try:
            if sys.platform != "win32":
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by a fork
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.close()
                raise StoreError(f"{folder}: another process is writing in this folder") from error
            # a file system without locks
        _in_use.add(self._folder)

    def release(self) -> None:
        """Lets go of the folder."""
        _in_use.discard(self._folder)
        self._file.close()
