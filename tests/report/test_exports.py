"""An export of a report that fails leaves the older one as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.full_disk import full_disk
from helpers.report_cases import Recorded, degraded

from gradprobe.errors import StoreError
from gradprobe.report import html, remedies_chart, sweep_charts
from gradprobe.report.export import write_csv
from gradprobe.report.records import RemedyCell

CELL = RemedyCell("he", "relu", 20, (1.0, 2.0), 3.0, 1.01, 0.01, 1.0, "healthy", 2.3, 0.1, 2, ())


def chart(suffix: str) -> Callable[[Path], object]:
    return lambda folder: remedies_chart.write_remedies([CELL], 2, ["It works."], folder / f"chart{suffix}")


EXPORTS: dict[str, Callable[[Path], object]] = {
    "html": lambda folder: html.write(Recorded().add("plain", 20), folder / "page.html"),
    "csv": lambda folder: write_csv(degraded(), folder),
    "png": lambda folder: sweep_charts.write_png(Recorded().add("plain", 20), folder),
    "chart-html": chart(".html"),
    "chart-svg": chart(".svg"),
    "chart-png": chart(".png"),
}


@pytest.mark.parametrize("write", EXPORTS.values(), ids=EXPORTS.keys())
def test_a_full_disk_leaves_the_older_export(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names
    for name in names:
        (tmp_path / name).write_text("older")
    with full_disk(3_000), pytest.raises(StoreError, match="cannot write this file: File too large"):
        write(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "older")
