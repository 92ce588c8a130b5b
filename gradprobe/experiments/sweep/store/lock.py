"""Lets one process at a time write the file of a sweep."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import IO

from gradprobe.errors import StoreError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def take_lock(path: Path) -> IO[bytes]:
    """Reserves ``path`` for its holder, until the file returned is closed or the process ends.

    The lock file stays: if it were removed, a process that has it open and one that creates it anew would each lock a
    file of their own.
    """
    # The file itself may be reached by several links.
    target = Path(os.path.realpath(path))
    if not os.access(target.parent, os.W_OK):  # the lock file may exist, but SQLite needs files of its own
        raise StoreError(f"{path}: cannot write in its folder: {os.strerror(errno.EACCES)}")
    try:
        lock = target.with_name(target.name + ".lock").open("ab")
    except OSError as error:
        raise StoreError(f"{path}: cannot write in its folder: {error.strerror}") from error
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise StoreError(f"{path}: another sweep is writing this file") from error
        raise StoreError(f"{path}: cannot be locked: {error.strerror}") from error
    return lock
