"""Shows how far a sweep is: a bar on a terminal, elsewhere a line for each epoch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import TextColumn

from gradprobe.errors import printable
from gradprobe.experiments.common import progress_bar
from gradprobe.experiments.train import EpochProgress, EpochResult
from gradprobe.report.records import Cell, Net, SweepRun
from gradprobe.report.time_left import Paces, time_left


class SweepProgress:
    """The progress of a sweep on a console, for a ``with`` statement.

    The bar counts epochs, weighted by the cost of the network. The time left follows from the measured time of an epoch
    of each network; networks that have not been timed count in proportion to their cost.

    Args:
        console: The console; None shows nothing.
        run: The sweep's file with the epochs recorded so far.
        cells: The cells to show.
        costs: Cost of an epoch of each network, in any unit.
        n_epochs: Epochs of each cell.
        n_at_once: Number of cells trained in parallel.
    """

    def __init__(
        self,
        console: Console | None,
        run: SweepRun,
        cells: Sequence[Cell],
        costs: Mapping[Net, int],
        n_epochs: int,
        n_at_once: int,
    ) -> None:
        self._console = Console(quiet=True) if console is None else console
        self._cells = {cell.id: cell for cell in cells}
        self._costs = costs
        self._n_epochs = n_epochs
        self._n_at_once = n_at_once
        self._paces = Paces()
        self._first_paces: dict[Net, float] = {}  # from the first epoch of a network, while it is trained
        self._done: dict[int, float] = {}  # epochs of each cell
        for cell in cells:
            epochs = run.epochs(cell.id)
            self._paces.add(cell, epochs)
            # A finished cell counts in full, although a diverged one has fewer epochs.
            self._done[cell.id] = n_epochs if cell.status != "pending" else max(len(epochs) - 1, 0)
        self._open = {cell.id for cell in cells if cell.status == "pending"}
        self._bar = progress_bar(console, TextColumn("{task.fields[left]}"))
        total = sum(costs[cell.net] * n_epochs for cell in cells)
        self._task = self._bar.add_task("", total=total, left="")
        self._bar.update(self._task, completed=self._completed())

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def within_epoch(self, cell: Cell, progress: EpochProgress) -> None:
        """Shows the progress of an epoch."""
        self._done[cell.id] = int(self._done[cell.id]) + min(progress.share, 0.999)
        self._first_paces[cell.net] = progress.seconds / progress.share
        self._update()

    def epoch(self, cell: Cell, result: EpochResult) -> None:
        """Shows the end of an epoch."""
        last = result.epochs[-1]
        self._paces.add(cell, result.epochs)
        self._done[cell.id] = self._n_epochs if result.status == "diverged" else last.epoch
        if result.status != "pending":
            self._open.discard(cell.id)
        error = f"train error {last.any_train_error_pct:.1f} %"
        text = f"{printable(cell.title)}: epoch {last.epoch}/{self._n_epochs}, {error}"
        left = self._update(text)
        if not self._console.is_terminal:
            self._print(f"{text}, {left}" if left else text)

    def failure(self, cell: Cell, reason: str) -> None:
        """Says that a cell has failed."""
        self._open.discard(cell.id)
        self._update()
        self._print(f"{printable(cell.title)}: failed: {printable(reason)}")

    def _update(self, text: str | None = None) -> str:
        """Moves the bar; returns the time left."""
        paces = self._first_paces | self._paces.known()
        if paces:
            unit = statistics.median(seconds / self._costs[net] for net, seconds in paces.items())
            paces = {net: unit * cost for net, cost in self._costs.items()} | paces
        runs = [(self._cells[id].net, self._n_epochs - self._done[id]) for id in self._open]
        left = str(time_left(runs, paces, self._n_at_once) or "")
        self._bar.update(self._task, completed=self._completed(), description=text, left=left)
        return left

    def _completed(self) -> float:
        return sum(self._costs[cell.net] * self._done[id] for id, cell in self._cells.items())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
