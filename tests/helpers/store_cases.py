"""A small file of a sweep, and its rows."""

from dataclasses import replace

from gradprobe.experiments.sweep.store import start_run
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow

CONFIG = {"data": "digits", "epochs": 3, "learning_rate": 0.1}
CELLS = [("plain", 8, 0, 75_002), ("resnet", 8, 0, 75_002)]
STATE = bytes(range(256)) * 4096


def names_beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def epoch_row(epoch, **changes):
    return replace(EpochRow(epoch, 2.3, 90.0, 89.5, 1.25), **changes)


def layer_row(epoch, position=0, **changes):
    return replace(LayerRow(epoch, position, f"layer{position}.weight", 0.5, 0.01, 0.2, 0.0, 0, 144), **changes)


def junction_row(position=0, epoch=0, **changes):
    return replace(JunctionRow(epoch, position, f"stages.{position}.join", 0.5, 0.25, -0.1, 2 / 3), **changes)


def write(path, config=CONFIG, cells=CELLS):
    """Writes a run whose first cell has two of its epochs."""
    with start_run(path, config, {"torch_version": "2.13.0"}) as run:
        run.add_cells(cells)
        layers = [layer_row(0), layer_row(1), layer_row(1, 1)]
        run.save(1, [epoch_row(0), epoch_row(1)], layers, [junction_row(), junction_row(1)], STATE)
