"""Names the machine that a benchmark runs on, and sets its memory allocator."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path


def processor() -> str:
    """Returns the processor's name as the system reports it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_memory() -> None:
    """Tells glibc to keep freed memory: otherwise page faults depend on what lies at the end of the heap."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)
