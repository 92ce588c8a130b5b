"""The training curves of a sweep: which errors are drawn, which are cut off, and how their lines are named."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from helpers.report_cases import ODD, Page, Recorded, page_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprobe.report import html
from gradprobe.report.chart_parts import NARROW, WIDE, Size, svg
from gradprobe.report.records import EpochRow
from gradprobe.report.summary import summarise
from gradprobe.report.sweep_charts import curves_chart


def recorded(errors: dict[tuple[str, int, int], list[float]], status: str = "done") -> Recorded:
    """A sweep with these training errors by family, depth and seed; test errors are 1 higher."""
    run = Recorded({"data": "digits", "epochs": max(map(len, errors.values())) - 1})
    for (family, depth, seed), each in errors.items():
        run.add(family, depth, seed=seed, epochs=len(each) - 1, status=status)  # type: ignore[arg-type]
        run.epoch_rows[len(run.rows)] = [EpochRow(e, 0.1, error, error + 1, 1.0) for e, error in enumerate(each)]
    return run


def chart(run: Recorded, size: Size = WIDE) -> Any:
    return curves_chart(summarise(run), size)


def notes(run: Recorded) -> list[str]:
    return [row["note"] for rows in chart(run).datasets.values() for row in rows if "note" in row]


def test_a_line_is_the_mean_of_the_seeds_and_its_band_their_range() -> None:
    run = recorded({("plain", 20, 0): [90.0, 40.0, 20.0], ("plain", 20, 1): [90.0, 50.0, 23.0]})
    assert "plain-20, epoch 1: 45.0 % (40.0 to 50.0, 2 seeds)" in notes(run)
    assert "plain-20, epoch 2: 22.5 % (21.0 to 24.0, 2 seeds)" in notes(run)  # test error
    rows = chart(run).datasets["rows-0"]
    assert [(row["position"], row["low"], row["value"], row["high"]) for row in rows][1] == (1, 40.0, 45.0, 50.0)


def test_a_single_seed_has_no_range() -> None:
    assert "plain-20, epoch 1: 40.0 %" in notes(recorded({("plain", 20, 0): [90.0, 40.0]}))


def test_an_epoch_that_a_seed_lacks_or_broke_in_is_not_drawn() -> None:
    run = recorded({("plain", 20, 0): [90.0, math.nan, 20.0, 10.0], ("plain", 20, 1): [90.0, 50.0, 23.0]})
    epochs = {re.search(r"epoch (\d+)", note)[1] for note in notes(run)}  # type: ignore[index]
    assert epochs == {"0", "2"}
    assert len({row["segment"] for row in chart(run).datasets["rows-0"]}) == 2  # a gap


def test_large_errors_of_the_first_epochs_are_cut_off() -> None:
    falling = recorded({("plain", 20, 0): [90.0, 60.0, *[10.0] * 10]})
    assert chart(falling).to_dict()["hconcat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"] == [0.0, 1.15 * 11]
    assert "epoch 2: 10.0 %" in svg(chart(falling))
    assert "epoch 0: 90.0 %" not in svg(chart(falling))
    flat = recorded({("plain", 20, 0): [90.0, 89.0, *[88.0] * 10]})
    assert chart(flat).to_dict()["hconcat"][0]["layer"][0]["encoding"]["y"]["scale"]["domain"][1] > 90
    assert "epoch 0: 90.0 %" in svg(chart(flat))


@pytest.mark.parametrize("early", [[90.0, 88.0], [90.0]])
def test_what_is_still_above_the_cut_is_named_within_the_chart_and_has_no_dot(early: list[float]) -> None:
    run = recorded({("plain", 20, 0): [90.0, *[10.0] * 30], ("plain", 56, 0): early})
    drawn = chart(run)
    low, top = drawn.hconcat[0].layer[0].encoding.y["scale"]["domain"]
    assert top < 15
    names = [row for rows in drawn.datasets.values() for row in rows if "label" in row]
    assert sorted(row["label"] for row in names) == ["plain-20", "plain-20", "plain-56", "plain-56"]
    assert all(low <= row["value"] <= top for row in names)
    dots = [layer.data.name for panel in drawn.hconcat for layer in panel.layer if layer.mark.type == "point"]
    assert all(row["value"] <= top for name in dots for row in drawn.datasets[name])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.sampled_from([WIDE, NARROW]))
def test_names_stand_in_the_order_of_the_lines_and_apart(errors: list[int], size: Size) -> None:
    run = recorded({("plain", 20 + k, 0): [90.0, float(error)] for k, error in enumerate(errors)})
    drawn = chart(run, size)
    lines = {f"plain-{20 + k}": error for k, error in enumerate(errors)}
    top = (drawn.vconcat if size.stacked else drawn.hconcat)[0].layer[0].encoding.y["scale"]["domain"][1]
    panels = [rows for rows in drawn.datasets.values() if "label" in rows[0]]
    assert len(panels) == 2
    for rows in panels:
        heights = {row["label"]: size.height * (1 - row["value"] / top) for row in rows}
        ordered = sorted(heights, key=lambda name: heights[name])
        assert sorted(heights) == sorted(lines)
        assert all(heights[below] - heights[above] > 12.9 for above, below in pairwise(ordered))
        assert all(lines[above] >= lines[below] for above, below in pairwise(ordered))
        assert all(-0.1 <= height <= size.height for height in heights.values())


def test_names_are_drawn_at_the_ends_of_their_lines() -> None:
    drawn = svg(chart(recorded({("plain", 20, 0): [90.0, 10.0], ("resnet", 20, 0): [90.0, 80.0]})))
    texts = re.findall(r'translate\(([\d.]+),([\d.]+)\)"[^>]*fill="#(?!ffffff)[^>]*>(\w+-20)<', drawn)
    assert [name for _, _, name in texts] == ["plain-20", "resnet-20"] * 2
    assert {float(x) for x, _, _ in texts} == {WIDE.width + 6.0}


@pytest.mark.parametrize("name", ["no-cells", "not-started", "zero-epochs", "all-nan"])
def test_without_two_epochs_the_page_says_so(name: str) -> None:
    assert "No epoch is finished yet." in Page(page_of(ODD[name])).text


def test_a_long_training_has_no_more_than_fifty_points_per_line_to_walk_over() -> None:
    run = recorded({("plain", 20, 0): [80.0 - 0.1 * e for e in range(401)]})
    per_panel = [rows for rows in chart(run).datasets.values() if "note" in rows[0] and len(rows) < 100]
    assert [len(rows) for rows in per_panel] == [51, 51]


def test_running_errors_are_drawn_as_such_where_some_epochs_have_nothing_else() -> None:
    run = recorded({("plain", 20, 0): [90.0, 40.0, 20.0]})
    first, middle, last = run.epoch_rows[1]
    middle = replace(middle, train_error_pct=math.nan, running_error_pct=44.0)
    run.epoch_rows[1] = [first, middle, replace(last, running_error_pct=22.0)]
    assert [row["value"] for row in chart(run).datasets["rows-0"]] == [90.0, 44.0, 22.0]
    text = html.page(summarise(run))
    assert "Running training error, %" in text
    assert "each before its update" in text
