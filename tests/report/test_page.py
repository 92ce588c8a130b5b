"""The page and the charts of a sweep show every recorded value, ordinary or odd."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.report_cases import (
    EXPLODING,
    HEALTHY,
    ODD,
    Page,
    Recorded,
    all_nan,
    degraded,
    interrupted,
    no_layers,
    not_started,
    page_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprobe.report import export, html, label_places, sweep_charts
from gradprobe.report.summary import summarise


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(degraded, ["error.png", "curves.png", "gradient.png", "shortcut.png"], id="degraded"),
        pytest.param(all_nan, [], id="all-nan"),
        pytest.param(no_layers, ["error.png", "curves.png"], id="no-layers"),
    ],
)
def test_a_chart_is_written_if_it_has_data(build: Callable[[], Recorded], expected: list[str], tmp_path: Path) -> None:
    paths = sweep_charts.write_png(build(), tmp_path / "new")
    assert [path.name for path in paths] == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-cells", "The run has no networks yet"),
        ("not-started", "Not started."),
        ("not-started", "No gradient is recorded yet."),
        ("all-nan", "No finite error is recorded yet."),
        ("all-nan", "Gradients contain NaN or infinite values at the first step (norm NaN in the first weight layer"),
        ("zero-norms", "Every recorded norm is zero, NaN or infinite."),
        ("gap", "no place for zero, NaN and infinite norms: plain-20 at epoch 4: 1 layer."),
        ("no-layers", "No gradient is recorded."),
        ("diverged", "The training loss of its only seed became NaN or infinite"),
    ],
)
def test_page_reports_odd_runs(name: str, words: str) -> None:
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
    shown = page.text.replace("\xa0", " ")
    assert shown.index("plain-56 trains worse than plain-20 (") < shown.index("Deeper is worse for plain")
    assert page.row("plain-56 − plain-20")[1:3] == ["4", "66.6"]


# The pages that other tests read, too; the others take seconds to render and run with the long tests.
ALWAYS = {"no-cells", "not-started", "all-nan", "zero-norms", "gap", "no-layers", "diverged", "interrupted"}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(degraded, id="degraded"),
        *(pytest.param(ODD[name], id=name, marks=() if name in ALWAYS else pytest.mark.soak) for name in ODD),
    ],
)
def test_page_loads_nothing_and_has_every_network(build: Callable[[], Recorded]) -> None:
    text = page_of(build)
    page = Page(text)
    assert page.loads == []
    assert all(page.row(net.name) for net in summarise(build()).nets)
    assert not re.search(
        r"https?:|url\(\s*[\"']?(?!#)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest|//[a-z0-9.-]+\.[a-z]", text
    )


def test_page_escapes_names() -> None:
    run = Recorded({"data": "<script>alert(1)</script>", "epochs": 4}).add("<b>x", 20)
    text = html.page(summarise(run))
    assert "<script>alert" not in text
    assert "<b>x" not in text
    Page(text)


def test_no_report_tells_the_authors_folders() -> None:
    source = "cifar10:/home/someone/my data/cifar-10-batches-bin"
    run = Recorded(meta={"data_spec": source, "spec": f'data = "{source}"\ndepths = [20]'})
    run.add("/home/someone/nets.py:net", 20).add("/home/someone/nets.py:other", 20)
    run.rows[1] = replace(run.rows[1], failure="OSError: no file '/home/someone/table.csv'", status="pending")
    for text in (html.page(summarise(run)), str(export.as_dict(run))):
        assert "someone" not in text
        assert text.count("cifar10:…/cifar-10-batches-bin") == 2
        assert "…/nets.py:net-20" in text
        assert "Seed 0 failed: OSError: no file" in text


def test_the_page_shows_the_spec_in_lines() -> None:
    run = Recorded(meta={"spec": 'data = "digits"\ndepths = [20]', "other": "a\nb"}).add("plain", 20)
    page = html.page(summarise(run))
    assert "<dd>data = &quot;digits&quot;<br>depths = [20]</dd>" in page
    assert r"<dd>a\nb</dd>" in page


def test_page_stays_small_for_a_large_sweep() -> None:
    run = Recorded()
    for depth in (20, 32, 44, 56, 110):
        for family in ("plain", "resnet"):
            for seed in range(3):
                run.add(family, depth, seed=seed, first=(1.0 + seed,) * depth, end=(1.0 + seed,) * depth)
    assert len(html.page(summarise(run)).encode()) < 2_000_000


def test_page_shows_published_cifar10_errors_only_for_cifar10() -> None:
    config = {"data": "cifar10", "epochs": 4, "train_images": 50_000, "augmented": True, "batch_size": 128}
    page = Page(html.page(summarise(Recorded(config).add("plain", 20).add("resnet", 20, (1.0, 9.25)))))
    assert page.row_below("resnet-20", "He et al., error %") == ["resnet-20", "9.2", "8.75"]
    assert page.row_below("resnet-110", "He et al., error %") == ["resnet-110", "–", "6.43"]
    words = " ".join(page.text.split())
    assert "CIFAR-10 (Table 6). Their conditions: 64,000 iterations of batch 128 on augmented images" in words
    assert (
        "Here: test error on cifar10, 50,000 training images, epochs 4, batch size 128, a single view at test." in words
    )
    assert "ImageNet" not in words
    assert "8.75" not in page_of(degraded)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_page_shows_published_imagenet_errors_with_their_conditions(data: str) -> None:
    run = Recorded({"data": data, "epochs": 4, "train_images": 1347, "augmented": False}).add("plain", 34, (1.0, 30.0))
    page = Page(html.page(summarise(run.add("resnet", 34, (1.0, 20.0)))))
    assert page.row_below("plain-34", "He et al., error %") == ["plain-34", "30.0", "28.54"]
    assert page.row_below("resnet-34", "He et al., error %") == ["resnet-34", "20.0", "24.52"]
    assert page.row_below("resnet-152", "He et al., error %") == ["resnet-152", "–", "21.43"]
    words = " ".join(page.text.split())
    assert "top-1 error on the validation images of ImageNet (Tables 2 and 3). Their conditions: 1,000 classes" in words
    assert "the mean over 10 crops" in words
    assert "not the numbers" in words
    assert f"Here: test error on {data}, 1,347 training images, not augmented, epochs 4" in words
    assert "CIFAR-10" not in words


def rows_of(chart: sweep_charts.Chart | None) -> list[dict[str, object]]:
    """Returns all data rows of a chart."""
    assert chart is not None
    return [row for data in chart.to_dict()["datasets"].values() for row in data]


def test_charts_hold_the_recorded_data() -> None:
    summary = summarise(degraded())
    errors = rows_of(sweep_charts.error_chart(summary))
    means = {(row["family"], row["depth"], row["error"]) for row in errors if "low" in row}
    assert ("plain", 56, 67.0) in means
    assert ("plain", 56, 71.0) in means
    assert {row["error"] for row in errors if row.get("note") == "plain-56, seed 1: 67.00 %"} == {67.0}
    norms = rows_of(sweep_charts.gradient_chart(summary))
    drawn = [(row["position"], row["norm"]) for row in norms if row.get("net") == "plain-56"]
    assert drawn == [*enumerate(EXPLODING, start=1), *enumerate(HEALTHY, start=1)]


def test_layers_that_a_log_scale_cannot_show_are_gaps_not_zeros() -> None:
    rows = rows_of(sweep_charts.gradient_chart(summarise(ODD["gap"]())))
    drawn = [(row["position"], row["norm"], row["segment"]) for row in rows if row.get("depth") == 20]
    assert (2, 0.0) not in [row[:2] for row in drawn]
    assert {segment for position, _, segment in drawn if position == 4} != {drawn[-4][2]}


def test_gradient_line_is_the_median_over_seeds() -> None:
    run = Recorded()
    for seed, norm in enumerate((1.0, 100.0, 3.0)):
        run.add("plain", 20, seed=seed, end=(norm, 1.0))
    row = next(row for row in rows_of(sweep_charts.gradient_chart(summarise(run))) if row.get("high") == 2.0)
    assert (row["low"], row["norm"]) == (0.0, 3.0)  # low is log10 of the norm


def test_a_printed_table_has_heads_without_buttons() -> None:
    page = page_of(degraded)
    assert 'data-title="training error %"><button type="button">training<br>error&nbsp;%</button>' in page
    printed = page[page.index("@media print") : page.index("</style>")]
    assert "th button { display: none; }" in printed
    assert "th[data-title]::before { content: attr(data-title); }" in printed


def test_each_network_has_its_own_colour() -> None:
    run = Recorded()
    for family in ("plain", "resnet", "fixup"):
        for depth in (20, 56):
            run.add(family, depth)
    nets = {(r["net"], r["colour"]) for r in rows_of(sweep_charts.gradient_chart(summarise(run))) if "net" in r}
    assert len({colour for _, colour in nets}) == len(nets) == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 250), min_size=1, max_size=8), st.lists(st.floats(1, 300), max_size=20))
def test_labels_keep_apart_and_inside(ends: list[float], line: list[float]) -> None:
    labels = [label_places.Label(str(i), "#000000", 1.0, 0.0, y) for i, y in enumerate(ends)]
    placed = label_places.label_heights(labels, 250.0, [(x, 60.0) for x in line])
    assert all(0 <= y < 250 for y in placed)
    ordered = sorted(placed)
    assert all(below - above > label_places._LABEL_PX - 1e-6 for above, below in pairwise(ordered))


def test_write_creates_folders_and_overwrites_an_older_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    html.write(not_started(), path)
    assert html.write(interrupted(), path) == path
    assert path.read_text(encoding="utf-8") == page_of(interrupted)
