"""Page and charts of one run. Loads the libraries that draw only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gradprobe.errors import ArgumentError

if TYPE_CHECKING:
    from gradprobe.diagnosis.diagnosis import Diagnosis
    from gradprobe.report.chart_parts import Chart
    from gradprobe.snapshot.snapshot import Snapshot


def write_page(snapshots: Sequence[Snapshot], diagnosis: Diagnosis, path: str | PathLike[str]) -> Path:
    """Writes the page of a run.

    Args:
        snapshots: Steps in order, of one probe.
        diagnosis: The findings of the run.
        path: The HTML file; missing folders are created, an existing file is replaced.

    Returns:
        The path written.

    Raises:
        ArgumentError: A library that draws is not installed.
        StoreError: The file cannot be written.
    """
    written: Path = _drawing("report", "gradprobe.report.run_page").write(snapshots, diagnosis, path)
    return written


def plot(snapshots: Sequence[Snapshot], diagnosis: Diagnosis, kind: str) -> Chart:
    """Draws one chart of a run.

    Args:
        snapshots: Steps in order, of one probe.
        diagnosis: The findings of the run.
        kind: One of "loss", "heatmap", "update_ratio", "magnitude", "shortcut_share" and "dead_units".

    Returns:
        An Altair chart.

    Raises:
        ArgumentError: The kind is unknown, the run did not record what the chart shows, or a library that draws is not
            installed.
    """
    chart: Chart = _drawing("plot", "gradprobe.report.run_charts").plot(snapshots, diagnosis, kind)
    return chart


def _drawing(caller: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        needed = f"{caller}: needed {error.name}, which is not installed"
        raise ArgumentError(f"{needed}; pip install 'gradprobe[report]'") from error
