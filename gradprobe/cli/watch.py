"""Follows a training or a sweep, on the screen of a terminal or line by line."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from gradprobe.cli.logged import needed_kind, run_kind
from gradprobe.cli.output import print_table
from gradprobe.cli.signals import raises_on_sigterm
from gradprobe.errors import ArgumentError, printable
from gradprobe.log.follower import RunFollower
from gradprobe.log.reader import read_run
from gradprobe.report.live import LiveTraining, finding_line
from gradprobe.report.live_sweep import LiveSweep

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType, RenderResult

    from gradprobe.experiments.sweep.store import Run

_ON_SCREEN_S, _LINE_BY_LINE_S = 1.0, 10.0  # between two looks


def watch(path: Path, once: bool = False, every_s: float | None = None) -> None:
    """Shows a run until it ends, or Ctrl-C.

    Args:
        path: A run folder or the file of a sweep.
        once: Print the present state and end.
        every_s: Seconds between two looks; by default 1 on a screen, and 10 where the output is not a terminal.

    Raises:
        ArgumentError: The number of seconds is not above 0; or the files are in Parquet, and pyarrow is not installed.
        StoreError: It is neither, or it cannot be read; with `once` also if it does not exist.
    """
    if every_s is not None and not 0 < every_s < math.inf:
        raise ArgumentError(f"--every: needed a number of seconds above 0, got {every_s}")
    has_screen = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    with contextlib.closing(_Watched(path)) as watched:
        if once:
            watched.look()
            watched.require()
            print_table(watched.shown)
        elif has_screen:
            _on_screen(watched, every_s or _ON_SCREEN_S)
        else:
            _line_by_line(watched, every_s or _LINE_BY_LINE_S)


def _on_screen(watched: _Watched, every_s: float) -> None:
    from rich.live import Live

    console = Console()
    with (
        raises_on_sigterm(),  # leaves the screen as it was
        contextlib.suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            watched.look()
            live.update(_Fitted(watched.shown), refresh=True)
            if watched.is_over:
                break
            time.sleep(every_s)
    console.print(watched.shown)


class _Fitted:
    """Tells a renderable how many lines the screen has; Live does not."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._renderable, options.update_height(console.height))


def _line_by_line(watched: _Watched, every_s: float) -> None:
    mark: object = None
    with contextlib.suppress(KeyboardInterrupt), _ends_with_its_reader():
        while True:
            for text in watched.look():
                _print(text)
            if watched.mark != mark:
                mark = watched.mark
                _print(watched.line)
            if watched.is_over:
                return
            time.sleep(every_s)


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextlib.contextmanager
def _ends_with_its_reader() -> Iterator[None]:
    """Ends quietly when nobody reads the output any more, as in `gradprobe watch RUN | head`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit


class _Watched:
    """A path, which may be a run folder or the file of a sweep, appear later and be replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = printable(str(path))
        self._source: _Training | _Sweep | None = None

    def look(self) -> list[str]:
        """Reads what is new; returns the events among it, one line each."""
        if self._source is None or not self._source.is_at(self._path):
            self.close()
            kind = run_kind(self._path)
            if kind is not None:
                self._source = _Training(self._path) if kind == "training" else _Sweep(self._path)
        if self._source is None:
            return []
        events = self._source.look()
        return [*events, *self._source.look()] if self._source.is_over else events  # what came before the end

    def require(self) -> None:
        """Raises a StoreError if there is no run."""
        if self._source is None:
            needed_kind(self._path)
        else:
            self._source.require()

    @property
    def is_over(self) -> bool:
        return self._source is not None and self._source.is_over

    @property
    def mark(self) -> object:
        """Equal for two moments between which nothing has happened."""
        return self._source is not None and self._source.view.mark

    @property
    def line(self) -> str:
        return self._waiting if self._source is None else self._source.view.line()

    @property
    def shown(self) -> RenderableType:
        return Text(self._waiting) if self._source is None else self._source.view

    @property
    def _waiting(self) -> str:
        return f"waiting for {self._name}, which does not exist yet"

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = None


class _Training:
    """A run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._follower = RunFollower(path)
        self.view = LiveTraining(str(path))

    def is_at(self, path: Path) -> bool:
        return run_kind(path) == "training"

    def look(self) -> list[str]:
        news = self._follower.look()
        self.view.take(news, self._follower.sessions, self._follower.stored_at)
        return [finding_line(finding) for _, finding in news.findings]

    def require(self) -> None:
        read_run(self._path)

    @property
    def is_over(self) -> bool:
        return self.view.is_over

    def close(self) -> None:
        pass


class _Sweep:
    """The file of a sweep."""

    def __init__(self, path: Path) -> None:
        from gradprobe.experiments.sweep.store import open_run

        self._run: Run = open_run(path)
        self._path = path
        self._id = _id(path)
        self.view = LiveSweep(str(path))

    def is_at(self, path: Path) -> bool:
        return _id(path) == self._id

    def look(self) -> list[str]:
        self.view.take(self._run, self._changed_at())
        return []

    def require(self) -> None:
        pass

    @property
    def is_over(self) -> bool:
        return self.view.is_over

    def close(self) -> None:
        self._run.close()

    def _changed_at(self) -> float:
        """Returns when the sweep last wrote: to the file, or to the log that SQLite keeps beside it."""
        times = []
        for path in (self._path, self._path.with_name(f"{self._path.name}-wal")):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times, default=time.time())


def _id(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
