"""The names of findings at the edges of the heatmap of a run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from helpers.run_cases import N, run

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.finding import Finding
from gradprobe.ops.rows import N_ZERO
from gradprobe.report import run_charts
from gradprobe.report.chart_parts import svg
from gradprobe.report.run_view import RunView


def finding(rule: str, first: int, sites: tuple[str, ...] = (), follows: str = "") -> Finding:
    return Finding(rule, "", sites, (first, 99), {}, "", "", "", "", ("",), follows=follows)


def marks(*findings: Finding, n_weights: int = 20, wide: bool = True) -> list[dict[str, Any]]:
    """The rows of the marks in a heatmap of 100 steps with these findings."""
    draw, *sizes = run_charts.KINDS["heatmap"]
    diagnosis = Diagnosis(findings, 100, (), {}, healthy=not findings)
    chart = draw(RunView(run(100, n_weights)), diagnosis, sizes[0 if wide else 1])
    assert chart is not None
    rows = [row for each in chart.datasets.values() for row in each if "label" in row]
    return [row for row in rows if "weight" not in row["label"]]


def weights(*numbers: int) -> tuple[str, ...]:
    return tuple(f"layer{k}.weight" for k in numbers)


def test_a_finding_is_named_above_the_step_at_which_it_begins() -> None:
    (mark,) = marks(finding("spike", 40))
    assert (mark["label"], mark["first"], mark["top"]) == ("spike", 40, 0)
    assert marks(finding("not learning", 0)) == []


def test_causes_come_first_where_there_is_room_for_one() -> None:
    found = marks(finding("layer drift", 41, follows="dead ReLU"), finding("dead ReLU", 44))
    assert [mark["label"] for mark in found] == ["dead ReLU"]


def test_a_finding_on_some_rows_is_named_beside_them() -> None:
    line, text = marks(finding("vanishing", 0, weights(0, 1, 2, 3)))
    assert (line["label"], round(line["top"]), round(line["bottom"])) == ("vanishing", 0, 4)
    assert (text["label"], text["top"]) == ("vanishing", 2.0)


def test_the_longest_run_of_rows_is_marked_and_all_rows_are_not() -> None:
    line, _ = marks(finding("dying", 0, weights(2, 9, 10, 11)))
    assert (round(line["top"]), round(line["bottom"])) == (9, 12)
    assert marks(finding("dying", 0, weights(*range(20)))) == []


def test_names_beside_rows_do_not_touch() -> None:
    many = [finding(f"rule{k}", 0, weights(k)) for k in range(20)]
    tops = sorted(mark["top"] for mark in marks(*many, n_weights=110) if "bottom" not in mark)
    row_px = run_charts.WIDE_HEAT.height / 110
    assert len(tops) == 4
    assert min(lower - upper for upper, lower in pairwise(tops)) * row_px >= 13  # pixels, the height of a name


def test_a_phone_has_no_room_beside_the_rows() -> None:
    found = marks(finding("vanishing", 0, weights(0, 1)), finding("spike", 40), wide=False)
    assert [mark["label"] for mark in found] == ["spike"]


@pytest.mark.parametrize("step", [1, 50, 97, 99])
def test_names_above_stay_within_the_width(step: int) -> None:
    (mark,) = marks(finding("unstable loss", step), wide=False)
    assert mark["first"] == step
    drawn = svg(run_charts.KINDS["heatmap"][0](RunView(run(100, 20)), diagnosis_of(step), run_charts.NARROW_HEAT))
    assert ('text-anchor="end"' in drawn.split("unstable loss")[0].rpartition("<text")[2]) == (step > 90)


def diagnosis_of(step: int) -> Diagnosis:
    return Diagnosis((finding("unstable loss", step),), 100, (), {}, healthy=False)


def test_a_run_with_a_layer_that_dies_names_it_where_it_dies() -> None:
    snapshots = run(60, n_weights=8)
    for one in snapshots[30:]:
        one.rows[5] = 0.0
        one.rows[5, N_ZERO] = N
    snapshots = [replace(one, signals=None) for one in snapshots]
    chart = run_charts.plot(snapshots, diagnose(snapshots), "heatmap")
    rows = [row for each in chart.datasets.values() for row in each if "weight" not in row.get("label", "weight")]
    assert [row["first"] for row in rows if row["top"] == 0] == [30]
    assert [round(row["top"]) for row in rows if "bottom" in row] == [5]
