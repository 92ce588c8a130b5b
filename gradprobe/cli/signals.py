"""Lets a command end in order when it gets SIGTERM, as from `kill`, `timeout` or a cluster's scheduler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gradprobe.cli.exit_status import TERMINATED


class Terminated(SystemExit):
    """SIGTERM has arrived."""


@contextmanager
def raises_on_sigterm() -> Iterator[None]:
    """Raises `Terminated` on the first SIGTERM, which would end the process at once, and ignores further ones."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
