"""What `gradprobe watch` shows of a sweep: each training run with its epochs and errors, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from gradprobe.errors import printable
from gradprobe.report.formatting import duration, runs_done
from gradprobe.report.records import Cell, EpochRow, Net, SweepRun
from gradprobe.report.spark import bars
from gradprobe.report.terminal import NAME_WIDTH, plain_table
from gradprobe.report.time_left import Paces, time_left

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_PATIENCE_S, _PATIENCE_EPOCHS = 60.0, 3.0  # without progress, whichever is longer
_WITH_TEST, _WITH_CURVE = 46, 72  # widths of the screen from which these columns are shown
_CURVE = 16  # characters
_HEAD = 4  # lines of a table besides its rows


@dataclass(frozen=True)
class _Row:
    """A training run, and its epochs so far."""

    cell: Cell
    epochs: Sequence[EpochRow]

    @property
    def epoch(self) -> int:
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def progress(self) -> str:
        """The number of epochs done, with a decimal while one is in progress."""
        tenths = math.floor(10 * self.cell.progress)
        return f"{self.epoch}.{min(tenths, 9)}" if tenths and self.is_pending else str(self.epoch)

    @property
    def train_errors(self) -> list[float]:
        return [row.any_train_error_pct for row in self.epochs]

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be trained, at least in part."""
        return self.cell.status == "pending" and not self.cell.failure

    @property
    def is_started(self) -> bool:
        return self.is_pending and (bool(self.epochs) or self.cell.progress > 0)


class LiveSweep:
    """A sweep as it runs, for `rich`.

    Args:
        name: Name of the sweep.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[_Row] = []
        self._n_epochs = 0
        self._paces: dict[Net, float] = {}
        self._changed_at = time.time()

    def take(self, run: SweepRun, changed_at: float) -> None:
        """Takes the present state. Finished training runs are read once.

        Args:
            run: The sweep.
            changed_at: When its file was last written, in seconds since the epoch.
        """
        settled = {row.cell.id: row for row in self._rows if row.cell.status != "pending"}
        cells = run.cells()
        self._rows = [settled.get(cell.id) or _Row(cell, run.epochs(cell.id)) for cell in cells]
        epochs = run.config.get("epochs")
        self._n_epochs = epochs if isinstance(epochs, int) else 0
        paces = Paces()
        for row in self._rows:
            paces.add(row.cell, row.epochs)
        self._paces = paces.known()
        self._changed_at = changed_at

    @property
    def is_over(self) -> bool:
        """Whether every training run has ended."""
        return bool(self._rows) and not any(row.is_pending for row in self._rows)

    @property
    def mark(self) -> object:
        """Equal for two moments between which nothing has happened."""
        return [(row.cell, row.epoch) for row in self._rows], self._is_stale

    @property
    def _is_stale(self) -> bool:
        slowest = max(self._paces.values(), default=0.0)
        return time.time() - self._changed_at > max(_PATIENCE_S, _PATIENCE_EPOCHS * slowest)

    def state(self) -> Text:
        """Says how far the sweep is, and whether it runs."""
        text = Text(runs_done([row.cell for row in self._rows]))
        text.highlight_regex(r"\d+ diverged", "red")
        text.highlight_regex(r"\d+ failed", "bold red")
        if self.is_over:
            return text
        if self._is_stale:
            age = time.time() - self._changed_at
            return text.append(f"; no progress for {duration(age)}: the sweep may have been stopped", "bold yellow")
        # As many processes share the runs as have started one.
        n_started = sum(row.is_started for row in self._rows)
        runs = [(row.cell.net, self._n_epochs - row.epoch - row.cell.progress) for row in self._rows if row.is_pending]
        left = time_left(runs, self._paces, n_started)
        return text.append(f", {left}", "green") if left is not None else text

    def line(self) -> str:
        """Returns the state in one line, for where there is no screen."""
        started = [self._progress(row) for row in self._rows if row.is_started]
        return "; ".join([self.state().plain, *started])

    def _progress(self, row: _Row) -> str:
        epoch = f"{_name(row.cell)} seed {row.cell.seed}: epoch {row.progress}/{self._n_epochs}"
        return f"{epoch}, training error {_percent(row.train_errors[-1])} %" if row.epochs else epoch

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        name = Text(printable(self._name, NAME_WIDTH), "bold", no_wrap=True)
        name.truncate(width, overflow="ellipsis")
        yield name
        state = self.state().wrap(console, width)
        yield from state
        room = None if options.height is None else max(1, options.height - 1 - len(state) - _HEAD)
        shown = self._rows if room is None or len(self._rows) <= room else self._most_telling(room - 1)
        columns = ["network", "seed", "epoch", "train %"]
        columns += ["test %"] if width >= _WITH_TEST else []
        columns += ["training error by epoch"] if width >= _WITH_CURVE else []
        table = plain_table(*columns, "", numeric=("seed", "epoch", "train %", "test %"))
        for column in table.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        for row in shown:
            table.add_row(*self._cells(row, columns, options.ascii_only), self._outcome(row))
        yield table
        if len(shown) < len(self._rows):
            more = Text(f"and {len(self._rows) - len(shown)} more", "dim", no_wrap=True)
            yield more

    def _most_telling(self, most: int) -> list[_Row]:
        """Returns at most so many rows in the order of the sweep: the running ones first, then what has ended."""
        order = sorted(self._rows, key=lambda row: (not row.is_started, row.is_pending, -row.cell.id))
        chosen = {row.cell.id for row in order[: max(0, most)]}
        return [row for row in self._rows if row.cell.id in chosen]

    def _cells(self, row: _Row, columns: Sequence[str], ascii_only: bool) -> list[Text]:
        newest = row.epochs[-1] if row.epochs else None
        found = {
            "network": Text(_name(row.cell)),
            "seed": Text(str(row.cell.seed)),
            "epoch": Text(f"{row.progress}/{self._n_epochs}"),
            "train %": Text("–" if newest is None else _percent(row.train_errors[-1])),
            "test %": Text("–" if newest is None else _percent(newest.test_error_pct)),
            "training error by epoch": bars(_thinned(row.train_errors, _CURVE), log=False, ascii_only=ascii_only),
        }
        return [found[column] for column in columns]

    def _outcome(self, row: _Row) -> Text:
        if row.cell.status == "done":
            return Text("done", "green")
        if not row.is_pending:
            return Text("failed" if row.cell.failure else row.cell.status, "bold red")
        return Text("running", "cyan") if row.is_started else Text("waiting", "dim")


def _name(cell: Cell) -> str:
    return printable(cell.name, NAME_WIDTH)


def _percent(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "NaN"


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """Returns at most so many of the values at equal distances, the last one included."""
    size = max(1, -(-len(values) // most))
    return list(reversed(values[::-1][::size]))
