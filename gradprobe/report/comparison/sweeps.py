"""Compares two sweeps, network by network: the first epoch at which they differ, and the final errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe.errors import ArgumentError, printable
from gradprobe.report.formatting import RUNNING_NOTE
from gradprobe.report.records import Cell, EpochRow, SweepRun, measured_by_both

_NAME_WIDTH = 40
_ERRORS = ("train_error_pct", "test_error_pct")


@dataclass(frozen=True)
class CellComparison:
    """A network that is in both sweeps.

    Attributes:
        name: Family and depth.
        seed: Its seed.
        epochs: Number of completed epochs that both have.
        first_epoch: The first epoch at which loss, errors or gradients differ, None if all that both have are equal.
        errors: Training and test error at the last of these epochs, in percent, in both sweeps; empty without epochs.
            Training errors are running ones in both sweeps if one of them has nothing else.
        is_running: Whether the training error is a running one, in both sweeps.
    """

    name: str
    seed: int
    epochs: int
    first_epoch: int | None
    errors: Mapping[str, tuple[float, float]]
    is_running: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class SweepComparison:
    """Two sweeps; prints as a table.

    Attributes:
        cells: The networks that are in both.
        only: The networks, with their seeds, that one sweep has alone.
        settings: The settings that differ, in both sweeps.
        paths: Where the sweeps are.
    """

    cells: tuple[CellComparison, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    settings: Mapping[str, tuple[object, object]]
    paths: tuple[str, str]

    @property
    def equal(self) -> bool:
        """Whether both have the same networks and all that both recorded of them is the same."""
        return not any(self.only) and all(cell.first_epoch is None for cell in self.cells)

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        differ = sum(cell.first_epoch is not None for cell in self.cells)
        if differ:
            return f"{differ} of the {len(self.cells)} networks that both sweeps have differ."
        what = "have different networks; in those that both have," if any(self.only) else "are equal:"
        return f"The sweeps {what} loss, errors and gradients are the same, bit for bit, at every epoch that both have."

    def as_dict(self) -> dict[str, object]:
        """Returns the comparison as plain data."""
        return {
            "sweeps": dict(zip(("a", "b"), self.paths, strict=True)),
            "equal": self.equal,
            "headline": self.headline,
            "networks": [
                {
                    "name": cell.name,
                    "seed": cell.seed,
                    "epochs": cell.epochs,
                    "first_different_epoch": cell.first_epoch,
                    **{error: list(values) for error, values in cell.errors.items()},
                    "train_error_is_running": list(cell.is_running),
                }
                for cell in self.cells
            ],
            "only_a": list(self.only[0]),
            "only_b": list(self.only[1]),
            "settings": {name: list(values) for name, values in self.settings.items()},
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for name, path in zip("AB", self.paths, strict=True):
            yield Text(f"{name}: {printable(path)}", style="dim")
        yield Text(self.headline, style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("network")
        for head in ("seed", "epochs", "differs from", "train % A", "B", "test % A", "B"):
            table.add_column(head, justify="right")
        for cell in self.cells:
            errors = [_shown(value) for error in _ERRORS for value in cell.errors.get(error, (math.nan, math.nan))]
            errors[:2] = [
                f"{error}*" if is_so else error for error, is_so in zip(errors[:2], cell.is_running, strict=True)
            ]
            first = "–" if cell.first_epoch is None else f"epoch {cell.first_epoch}"
            table.add_row(Text(printable(cell.name, _NAME_WIDTH)), str(cell.seed), str(cell.epochs), first, *errors)
        yield table
        if any(any(cell.is_running) for cell in self.cells):
            yield Text(RUNNING_NOTE, style="dim")
        for name, networks in zip("AB", self.only, strict=True):
            if networks:
                yield Text(printable(f"Only {name} has {', '.join(networks)}."), style="dim")
        for name, (a, b) in self.settings.items():
            yield Text(printable(f"{name}: {a} in A, {b} in B."), style="dim")


def compare_sweeps(a: SweepRun, b: SweepRun, paths: tuple[str, str]) -> SweepComparison:
    """Compares the networks that two sweeps have in common.

    Args:
        a: One sweep, finished or not.
        b: The other sweep.
        paths: Where they are.

    Returns:
        The comparison.

    Raises:
        ArgumentError: They have no network in common.
    """
    ours, theirs = ({(cell.name, cell.seed): cell for cell in run.cells()} for run in (a, b))
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise ArgumentError("sweeps: needed two sweeps with a network and seed in common, got none")
    only = tuple(
        tuple(f"{name} seed {seed}" for name, seed in one if (name, seed) not in other)
        for one, other in ((ours, theirs), (theirs, ours))
    )
    names = [name for name in {**a.config, **b.config} if a.config.get(name) != b.config.get(name)]
    return SweepComparison(
        tuple(_cell(a, ours[key], b, theirs[key]) for key in shared),
        (only[0], only[1]),
        {name: (a.config.get(name), b.config.get(name)) for name in names},
        paths,
    )


def _cell(a: SweepRun, one: Cell, b: SweepRun, other: Cell) -> CellComparison:
    there = {row.epoch: row for row in b.epochs(other.id)}
    rows = [(row, there[row.epoch]) for row in a.epochs(one.id) if row.epoch in there]
    first = next((x.epoch for x, y in rows if not _is_same(a, one, x, b, other, y)), None)
    if not rows:
        return CellComparison(one.name, one.seed, 0, None, {})
    return CellComparison(one.name, one.seed, rows[-1][0].epoch, first, *_errors(*rows[-1]))


def _errors(x: EpochRow, y: EpochRow) -> tuple[dict[str, tuple[float, float]], tuple[bool, bool]]:
    """Returns the errors of two epochs, and which of the training errors are running ones."""
    train, running = (x.any_train_error_pct, y.any_train_error_pct), (x.is_running, y.is_running)
    if x.is_running != y.is_running:
        train = x.any_running_error_pct, y.any_running_error_pct
        running = not math.isnan(x.running_error_pct), not math.isnan(y.running_error_pct)
    return {"train_error_pct": train, "test_error_pct": (x.test_error_pct, y.test_error_pct)}, running


def _is_same(a: SweepRun, one: Cell, x: EpochRow, b: SweepRun, other: Cell, y: EpochRow) -> bool:
    """Whether everything but the time is the same, of what both sweeps measured; NaN equals NaN."""
    scalars = zip(*measured_by_both(x, y), strict=True)
    layers = [tuple(map(astuple, run.layers(cell.id, x.epoch))) for run, cell in ((a, one), (b, other))]
    junctions = [tuple(map(astuple, run.junctions(cell.id, x.epoch))) for run, cell in ((a, one), (b, other))]
    return all(repr(pair[0]) == repr(pair[1]) for pair in ([*scalars], layers, junctions))


def _shown(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.2f}"
