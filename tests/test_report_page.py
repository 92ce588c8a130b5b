"""The page and the charts of a sweep: they show what was recorded, whatever was recorded."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_cases import (
    EXPLODING,
    ODD,
    SOUND,
    Page,
    Recorded,
    all_nan,
    degraded,
    interrupted,
    no_layers,
    not_started,
    page_of,
)

from gradprobe.report import charts, drawing, html
from gradprobe.report.summary import summarise


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(degraded, ["error.png", "gradient.png", "shortcut.png"], id="degraded"),
        pytest.param(all_nan, [], id="all-nan"),
        pytest.param(no_layers, ["error.png"], id="no-layers"),
    ],
)
def test_pictures_are_written_where_there_is_something_to_draw(
    build: Callable[[], Recorded], expected: list[str], tmp_path: Path
) -> None:
    paths = charts.write_png(build(), tmp_path / "new")
    assert [path.name for path in paths] == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-cells", "The run holds no networks yet"),
        ("not-started", "Not started."),
        ("not-started", "No gradient is recorded yet."),
        ("all-nan", "No finite error is recorded yet."),
        ("all-nan", "Gradients hold NaN or infinite values at the first step (norm NaN in the first weight layer"),
        ("zero-norms", "Every recorded norm is zero, NaN or infinite."),
        ("gap", "zero, NaN and infinite norms have no place on it: plain-20 at epoch 4: 1 layer."),
        ("no-layers", "No gradient is recorded."),
        ("diverged", "The training loss of its one seed became NaN or infinite"),
    ],
)
def test_page_says_what_is_odd(name: str, words: str) -> None:
    assert words in Page(page_of(ODD[name])).text.replace("\xa0", " ")


def test_page_has_the_recorded_numbers() -> None:
    page = Page(page_of(degraded))
    assert page.row("plain-56") == [
        "plain-56",
        "degraded optimisationepoch 4",
        "3",
        "853,018",
        "67.0 ± 2.0",
        "71.0 ± 1.0",
        *("500", "0.500", "1000"),
        *("1.20", "0.500", "2.40"),
    ]
    assert "plain-56, layer 2 of 3, layers.1.weight: norm 20.0" in page.labels
    assert "plain-56: 67.00 % ± 2.00 (3 seeds)" in page.labels
    assert "plain-56, seed 2: 69.00 %" in page.labels
    assert "torch version" in page.text


@pytest.mark.parametrize("build", [degraded, *ODD.values()], ids=["degraded", *ODD.keys()])
def test_page_loads_nothing(build: Callable[[], Recorded]) -> None:
    text = page_of(build)
    assert Page(text).loads == []
    assert not re.search(
        r"https?:|url\(\s*[\"']?(?!#)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest|//[a-z0-9.-]+\.[a-z]", text
    )


def test_page_escapes_what_it_is_given() -> None:
    run = Recorded({"data": "<script>alert(1)</script>", "epochs": 4}).add("<b>x", 20)
    text = html.page(summarise(run))
    assert "<script>alert" not in text
    assert "<b>x" not in text
    Page(text)


def test_page_stays_small_for_a_large_sweep() -> None:
    run = Recorded()
    for depth in (20, 32, 44, 56, 110):
        for family in ("plain", "resnet"):
            for seed in range(3):
                run.add(family, depth, seed=seed, first=(1.0 + seed,) * depth, end=(1.0 + seed,) * depth)
    assert len(html.page(summarise(run)).encode()) < 2_000_000


def test_page_prints_the_papers_figures_only_beside_cifar10() -> None:
    cifar = html.page(summarise(Recorded({"data": "cifar10", "epochs": 4}).add("resnet", 20)))
    assert "8.75" in cifar
    assert "64,000 iterations" in cifar
    assert "8.75" not in page_of(degraded)


def rows_of(chart: charts.Chart | None) -> list[dict[str, object]]:
    """All rows of data inside a chart."""
    assert chart is not None
    return [row for data in chart.to_dict()["datasets"].values() for row in data]


def test_charts_hold_the_recorded_data() -> None:
    summary = summarise(degraded())
    errors = rows_of(charts.error_chart(summary))
    means = {(row["family"], row["depth"], row["error"]) for row in errors if "low" in row}
    assert ("plain", 56, 67.0) in means
    assert ("plain", 56, 71.0) in means
    assert {row["error"] for row in errors if row.get("note") == "plain-56, seed 1: 67.00 %"} == {67.0}
    norms = rows_of(charts.gradient_chart(summary))
    drawn = [(row["position"], row["norm"]) for row in norms if row.get("net") == "plain-56"]
    assert drawn == [*enumerate(EXPLODING, start=1), *enumerate(SOUND, start=1)]


def test_layers_that_a_log_scale_cannot_show_are_gaps_not_zeros() -> None:
    rows = rows_of(charts.gradient_chart(summarise(ODD["gap"]())))
    drawn = [(row["position"], row["norm"], row["segment"]) for row in rows if row.get("depth") == 20]
    assert (2, 0.0) not in [row[:2] for row in drawn]
    assert {segment for position, _, segment in drawn if position == 4} != {drawn[-4][2]}


def test_gradient_line_is_the_median_over_seeds() -> None:
    run = Recorded()
    for seed, norm in enumerate((1.0, 100.0, 3.0)):
        run.add("plain", 20, seed=seed, end=(norm, 1.0))
    row = next(row for row in rows_of(charts.gradient_chart(summarise(run))) if row.get("high") == 2.0)
    assert (row["low"], row["norm"]) == (0.0, 3.0)  # a power of ten, and the norm itself


def test_each_net_has_its_own_colour() -> None:
    run = Recorded()
    for family in ("plain", "resnet", "fixup"):
        for depth in (20, 56):
            run.add(family, depth)
    nets = {(r["net"], r["colour"]) for r in rows_of(charts.gradient_chart(summarise(run))) if "net" in r}
    assert len({colour for _, colour in nets}) == len(nets) == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 250), min_size=1, max_size=8), st.lists(st.floats(1, 300), max_size=20))
def test_labels_keep_apart_and_inside(ends: list[float], line: list[float]) -> None:
    labels = [drawing.Label(str(i), "#000000", 1.0, 0.0, y) for i, y in enumerate(ends)]
    placed = drawing._apart(labels, 250.0, [(x, 60.0) for x in line])
    assert all(0 <= y < 250 for y in placed)
    ordered = sorted(placed)
    assert all(below - above >= drawing._LABEL_PX for above, below in pairwise(ordered))


def test_write_makes_folders_and_replaces_an_older_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    html.write(not_started(), path)
    assert html.write(interrupted(), path) == path
    assert path.read_text(encoding="utf-8") == page_of(interrupted)
