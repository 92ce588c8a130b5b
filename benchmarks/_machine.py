"""What a benchmark says of the machine that it ran on, and asks of it."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path


def processor() -> str:
    """Names the processor as the system does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_memory() -> None:
    """Tells glibc to keep what is freed: else pages come and go with whatever lies at the end of the heap."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)
