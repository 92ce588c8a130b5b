"""Writes exports beside their target and renames them, so that a failed export leaves what was there."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from gradprobe.errors import GradprobeError, StoreError


def write_files(contents: Mapping[Path, Iterable[str | bytes]], *, new: bool = False) -> None:
    r"""Writes files: all of them or, if one cannot be written, none.

    A file that exists is replaced only after all new ones are complete on disk, and keeps its permissions. A pipe or a
    device, which cannot be replaced, is written directly.

    Args:
        contents: The parts of each file; text is written as UTF-8. Missing folders are not created.
        new: Reject a file that exists instead of replacing it.

    Raises:
        StoreError: A file cannot be written. The old files are unchanged, and no temporary file is left.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> write_files({path: ["a,b\n", "1,2\n"]})
        >>> path.read_text()
        'a,b\n1,2\n'
    """
    drafts: dict[Path, Path] = {}  # temporary file -> the file that it replaces
    claimed: list[Path] = []
    path = Path()
    try:
        for path, parts in contents.items():
            target = _replaceable(path)
            if new:
                # Claims the name: a rename would replace a file that another process creates in the meantime.
                path.open("xb").close()
                claimed.append(path)
            if target is None:
                with path.open("wb") as file:
                    _write(file, parts)
                continue
            # Not derived from the target's name, which may be as long as the file system allows.
            draft = target.with_name(f".{secrets.token_hex(8)}.unfinished")
            with draft.open("xb") as file:
                drafts[draft] = target
                if target.exists():
                    shutil.copymode(target, draft)
                _write(file, parts)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
        while drafts:
            draft, path = next(iter(drafts.items()))
            draft.replace(path)
            del drafts[draft]
        claimed.clear()
    except GradprobeError:  # the contents cannot be read
        raise
    except FileExistsError as error:
        raise StoreError(f"{path}: needed a file that does not exist yet, found one") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot write this file: {error.strerror or error}") from error
    finally:
        for leftover in (*drafts, *claimed):
            leftover.unlink(missing_ok=True)


def create_folder(folder: Path) -> None:
    """Creates a folder for exports and those above it, if they do not exist.

    Raises:
        StoreError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{folder}: cannot write in this folder: {reason or error}") from error


def _replaceable(path: Path) -> Path | None:
    """Returns the regular file behind a path, which need not exist; None if the path is a pipe or a device."""
    try:
        target = Path(os.path.realpath(path))
        target.lstat()
    except FileNotFoundError:
        return None if path.exists() else target
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from error
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return target if target.is_file() else None


def _write(file: BinaryIO, parts: Iterable[str | bytes]) -> None:
    for part in parts:
        # Not "strict": a name may hold half of a surrogate pair, which UTF-8 cannot represent.
        file.write(part.encode("utf-8", "backslashreplace") if isinstance(part, str) else part)
