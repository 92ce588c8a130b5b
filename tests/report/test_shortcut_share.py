"""The report's sentences and charts on residual adds match the recorded rows."""

from __future__ import annotations

import json
import math

import pytest
from helpers.report_cases import Page, Recorded, degraded, page_of

from gradprobe.report import html, sweep_charts
from gradprobe.report.export import as_dict
from gradprobe.report.records import Cell
from gradprobe.report.sentences import shortcut_sentences
from gradprobe.report.summary import summarise


def panels(run: Recorded) -> dict[str, list[dict[str, object]]]:
    """Returns the rows of each panel's lines by the panel's title."""
    chart = sweep_charts.shortcut_chart(summarise(run))
    assert chart is not None
    spec = chart.to_dict()
    return {panel["title"]: spec["datasets"][panel["layer"][0]["data"]["name"]] for panel in spec["hconcat"]}


def test_the_chart_holds_the_shares_at_the_start_in_the_middle_and_at_the_end() -> None:
    run = Recorded().add("plain", 20).add("resnet", 20).add("resnet", 56, shares=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    run.junction_rows[3, 2] = run.junction_rows[3, 0]
    drawn = {
        title: [(row["net"], row["position"], row["value"]) for row in rows] for title, rows in panels(run).items()
    }
    first = [("resnet-56", 1, 0.1), ("resnet-56", 2, 0.2), ("resnet-56", 3, 0.3)]
    last = [("resnet-56", 1, 0.4), ("resnet-56", 2, 0.5), ("resnet-56", 3, 0.6)]
    assert drawn == {
        "at the first step": [("resnet-20", 1, 0.4), ("resnet-20", 3, 0.5), *first],
        "after epoch 2": [("resnet-20", 1, 0.7), ("resnet-20", 3, 0.9), *first],
        "after epoch 3": [("resnet-20", 1, 0.7), ("resnet-20", 3, 0.9), *last],
    }


def test_a_residual_add_without_two_parts_is_a_gap_and_is_reported() -> None:
    run = Recorded().add("resnet", 20)
    (first, second) = panels(run)["at the first step"]
    assert first["segment"] != second["segment"]
    assert "a shortcut that changes the shape: resnet-20: 1 of 3." in Page(html.page(summarise(run))).text


def test_several_seeds_are_a_median_with_their_range() -> None:
    run = Recorded()
    for seed, share in enumerate((0.2, 0.6, 0.3)):
        run.add("resnet", 20, seed=seed, shares=((share,), (share,)))
    (row,) = panels(run)["at the first step"]
    assert (row["low"], row["value"], row["high"]) == (0.2, 0.3, 0.6)
    assert "residual add 1 of 1, stages.0.join: 30 % by the shortcut" in str(row["note"])


def test_networks_at_different_epochs_share_the_panel_of_the_end() -> None:
    run = Recorded().add("resnet", 20).add("resnet", 56, epochs=3, status="pending")
    assert {title: len(rows) for title, rows in panels(run).items()} == {
        "at the first step": 4,
        "in the middle": 4,
        "at the end": 4,
    }


@pytest.mark.parametrize(
    ("first", "later", "said"),
    [
        (
            (0.6, 0.7, 0.8),
            (0.9, 0.9, 0.9),
            "is 70 % at the first step, 90 % after epoch 2 and 90 % after epoch 3, more",
        ),
        (
            (0.6, 0.7, 0.8),
            (0.9, 0.9, 0.9),
            "after epoch 3, more than the branch's (median over 3 residual adds; the lowest is",
        ),
        ((0.6, 0.7, 0.8), (0.9, 0.9, 0.9), "the lowest is 60 %, at stages.0.join at the first step)."),
        ((0.4, 0.4, 0.4), (0.4, 0.5, 0.6), "after epoch 3, no more than the branch's (median"),
        ((0.4, 0.4, 0.4), (0.8, 0.8, 0.1), "more than the branch's only after epoch 2 and after epoch 3 (median"),
        ((0.4, 0.4, 0.4), (0.8, 0.8, 0.1), "the lowest is 10 %, at stages.2.join after epoch 2)."),
        ((math.nan, 0.4), (math.nan, 0.8), "(median over 1 residual add; the lowest is 40 %, at stages.1.join"),
        ((math.nan, math.nan), (0.8, 0.9), "is 85 % after epoch 2 and 85 % after epoch 3, more"),
    ],
)
def test_the_sentence_follows_from_the_shares(first: tuple[float, ...], later: tuple[float, ...], said: str) -> None:
    (sentence,) = shortcut_sentences(summarise(Recorded().add("resnet", 20, shares=(first, later))))
    assert sentence.startswith("In resnet-20 the shortcut's share of the gradient is ")
    assert said in sentence


@pytest.mark.parametrize(
    ("deep", "said"),
    [
        (0.9, "After epoch 3 the share grows with depth: 70 % in resnet-20 and 90 % in resnet-56."),
        (0.6, "After epoch 3 the share does not always grow with depth: 70 % in resnet-20 and 60 % in resnet-56."),
        (0.704, "After epoch 3 the share does not change with depth: 70 % in resnet-20 and 70 % in resnet-56."),
    ],
)
def test_depth_is_compared(deep: float, said: str) -> None:
    run = Recorded().add("resnet", 20, shares=((0.5,), (0.7,))).add("resnet", 56, shares=((0.5,), (deep,)))
    assert shortcut_sentences(summarise(run))[-1] == said


def test_depth_is_not_compared_across_epochs() -> None:
    run = Recorded().add("resnet", 20).add("resnet", 56, epochs=3, status="pending")
    assert len(shortcut_sentences(summarise(run))) == 2


def test_a_residual_network_of_an_older_file_is_named_and_a_plain_one_is_not() -> None:
    run = Recorded().add("plain", 20).add("resnet", 20).add("resnet", 56)
    run.rows.append(Cell(4, "resnet", 110, 0, 1_727_962, "pending"))
    for epoch in range(4):
        del run.junction_rows[3, epoch]
    said = "No residual adds are recorded for resnet-56; files of older versions have none."
    assert shortcut_sentences(summarise(run))[-1] == said
    run.junction_rows.clear()
    assert shortcut_sentences(summarise(run)) == [said.replace("resnet-56", "resnet-20 and resnet-56")]
    page = Page(html.page(summarise(run))).text
    assert "No residual adds are recorded for resnet-20 and resnet-56" in page
    assert "Nothing to draw." in page


def test_a_sweep_of_plain_networks_does_not_mention_shortcuts() -> None:
    run = Recorded().add("plain", 20).add("plain", 56)
    assert shortcut_sentences(summarise(run)) == []
    assert "arrives by the shortcut" not in Page(html.page(summarise(run))).text


def test_the_page_has_the_chart_and_the_sentences() -> None:
    page = Page(page_of(degraded))
    assert "resnet-56, residual add 3 of 3, stages.2.join: 90 % by the shortcut" in page.labels
    words = page.text.replace("\xa0", " ")
    assert "In resnet-56 the shortcut's share of the gradient is 45 % at the first step, 80 % after epoch 2" in words


def test_json_has_every_residual_add() -> None:
    report = json.loads(json.dumps(as_dict(degraded()), allow_nan=False))
    assert report["shortcuts"] == shortcut_sentences(summarise(degraded()))
    nets = {net["net"]: net["junctions"] for net in report["nets"]}
    assert nets["plain-20"] == []
    assert [moment["epoch"] for moment in nets["resnet-20"]] == [0, 2, 3]
    assert nets["resnet-20"][0]["junctions"][1]["shortcut_share"] == ["nan"] * 3
    assert nets["resnet-20"][2]["junctions"][2] == {
        "position": 2,
        "site": "stages.2.join",
        "shortcut_norm_l2": [1.8] * 3,
        "branch_norm_l2": [pytest.approx(0.2)] * 3,
        "cosine": [0.25] * 3,
        "shortcut_share": [0.9] * 3,
    }
