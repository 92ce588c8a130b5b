"""Running training errors are labelled wherever they are shown, and are compared only with their like."""

import math
from dataclasses import replace
from typing import Any

import pytest
from helpers.report_cases import Recorded
from rich.console import Console

from gradprobe.report import export, html, terminal
from gradprobe.report.comparison.sweeps import SweepComparison, compare_sweeps
from gradprobe.report.records import EpochRow
from gradprobe.report.summary import summarise


def course(running: list[float], test: float = 5.0, whole: float | None = None) -> list[EpochRow]:
    """The rows of a run with these running errors; the last also has the error over the whole set, if given."""
    rows = [EpochRow(0, 2.3, 90.0, 90.0, 1.0)]
    rows += [
        EpochRow(epoch, math.nan, math.nan, test, 1.0, running_loss=0.5, running_error_pct=error)
        for epoch, error in enumerate(running, start=1)
    ]
    if whole is not None:
        rows[-1] = replace(rows[-1], train_loss=0.1, train_error_pct=whole)
    return rows


def shown(run: Recorded) -> str:
    console = Console(width=200, record=True, file=None)
    with console.capture() as capture:
        console.print(terminal.render(run))
    return capture.get()


@pytest.fixture
def run() -> Recorded:
    run = Recorded(config={"data": "digits", "epochs": 4, "train_images": 6400, "batch_size": 64, "test_images": 450})
    run.add("plain", 20, (3.0, 5.0), epochs=4).add("plain", 56, (60.0, 65.0), epochs=4)
    return run


def test_an_unfinished_run_shows_running_errors_as_such(run: Recorded) -> None:
    run.epoch_rows = {1: course([40.0, 20.0, 10.0]), 2: course([80.0, 70.0, 66.6])}
    assert [net.has_running_error for net in summarise(run).nets] == [True, True]
    text = shown(run)
    assert "66.6*" in text
    assert "* running training error" in text
    assert "the running training error is 66.6 % for plain-56 and 10.0 % for plain-20" in text.replace("\n", " ")
    page = html.page(summarise(run))
    assert "66.6*" in page
    assert "* running training error" in page
    assert [net["train_error_is_running"] for net in export.as_dict(run)["nets"]] == [True, True]


def test_a_finished_run_shows_the_error_over_the_whole_set(run: Recorded) -> None:
    run.epoch_rows = {1: course([40.0, 20.0, 10.0, 4.0], whole=3.0), 2: course([80.0, 70.0, 66.6, 63.0], whole=60.0)}
    assert [net.train_error_pct.values for net in summarise(run).nets] == [(3.0,), (60.0,)]
    text = shown(run)
    assert "running" not in text
    assert "the training error is 60.0 % for plain-56 and 3.0 % for plain-20" in text.replace("\n", " ")


def test_a_fall_is_measured_between_running_errors(run: Recorded) -> None:
    """The running errors do not fall; the error over the whole set is lower than they are, which is no fall."""
    run.epoch_rows = {1: course([40.0, 9.0, 9.0, 9.0], whole=3.0), 2: course([80.0, 70.0, 70.0, 70.0], whole=60.0)}
    comparison = summarise(run).nets[1].comparison
    assert comparison is not None
    assert (comparison.course.fall_pct, comparison.other_course.fall_pct) == (0.0, 0.0)
    assert comparison.errors.train.values == (60.0,)


def compared(one: list[EpochRow], other: list[EpochRow]) -> tuple[SweepComparison, str]:
    """Compares two sweeps of plain-20 with these rows, and returns what the screen shows of it."""
    sweeps = [Recorded().add("plain", 20, epochs=len(rows) - 1) for rows in (one, other)]
    for sweep, rows in zip(sweeps, (one, other), strict=True):
        sweep.epoch_rows[1] = rows
    found = compare_sweeps(sweeps[0], sweeps[1], ("a.sqlite", "b.sqlite"))
    console = Console(width=200)
    with console.capture() as capture:
        console.print(found)
    assert "nan" not in capture.get().lower()
    return found, capture.get()


def measured(rows: list[EpochRow], error: float) -> list[EpochRow]:
    """These rows with a whole-set error in every epoch, as with `--whole-train-error`."""
    return [replace(row, train_loss=0.2, train_error_pct=error) if row.epoch else row for row in rows]


@pytest.mark.parametrize("change", [{"running_loss": 0.4}, {"running_error_pct": 41.0}, {"running_loss": math.nan}])
def test_sweeps_with_other_running_errors_differ(change: dict[str, Any]) -> None:
    rows = course([40.0, 20.0])
    assert compared(rows, rows)[0].equal
    found, text = compared(rows, [rows[0], replace(rows[1], **change), rows[2]])
    assert [cell.first_epoch for cell in found.cells] == [1]
    assert text.count("20.00*") == 2
    assert "* running training error" in text


def test_a_sweep_with_whole_training_errors_equals_the_same_without() -> None:
    rows = course([40.0, 20.0])
    found, text = compared(rows, measured(rows, 15.0))
    assert found.equal
    assert text.count("20.00*") == 2
    assert "15.00" not in text
    assert found.as_dict()["networks"][0]["train_error_is_running"] == [True, True]  # type: ignore[index]


def test_a_whole_training_error_beside_a_running_one_is_not_marked() -> None:
    rows = course([40.0, 20.0])
    older = [replace(row, running_loss=math.nan, running_error_pct=math.nan) for row in measured(rows, 15.0)]
    found, text = compared(older, rows)
    assert found.equal
    assert "15.00 " in text
    assert text.count("20.00*") == 1


def test_whole_training_errors_of_both_sweeps_are_compared() -> None:
    rows = course([40.0, 20.0])
    found, text = compared(measured(rows, 15.0), measured(rows, 16.0))
    assert [cell.first_epoch for cell in found.cells] == [1]
    assert "15.00 " in text
    assert "*" not in text


def test_an_error_that_was_not_measured_is_a_dash() -> None:
    _, text = compared([EpochRow(0, math.nan, math.nan, math.nan, 1.0)], course([]))
    assert text.count("–") == 2
