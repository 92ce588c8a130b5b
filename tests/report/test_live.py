"""What `gradprobe watch` shows: curves in one line, a training and a sweep, at any width and with any name."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from helpers.diagnose_cases import course
from helpers.names import NAMES
from helpers.report_cases import ODD, Recorded, degraded, interrupted
from helpers.run_cases import run
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.log.follower import News
from gradprobe.report.live import LiveTraining
from gradprobe.report.live_sweep import LiveSweep
from gradprobe.report.records import Cell
from gradprobe.report.spark import Curve, bars
from gradprobe.snapshot import Snapshot

SESSION = {"started": "2026-01-02T03:04:05+00:00", "model": "Net"}


def shown(view: RenderableType, width: int = 80, height: int | None = None, encoding: str = "utf-8") -> list[str]:
    """Returns the lines on a screen."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, height=height or 25, file=file)
    options = console.options if height is None else console.options.update(height=height)
    lines = console.render_lines(view, options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def training(
    steps: Sequence[Snapshot], name: str = "runs/a", session: dict[str, Any] = SESSION, stored_at: float | None = None
) -> LiveTraining:
    view = LiveTraining(name)
    points = [(one.step, one.loss, one.total_norm) for one in steps]
    news = News(sessions={0: 0}, steps=points, newest=steps[-1])
    view.take(news, [session], time.time() if stored_at is None else stored_at)
    return view


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=3000))
def test_a_curve_keeps_what_its_values_span(values: list[float]) -> None:
    peaks, means = Curve(peaks=True), Curve()
    for step, value in enumerate(values):
        peaks.add(step, value)
        means.add(step, value)
    assert (peaks.low, peaks.high, peaks.last) == (min(values), max(values), values[-1])
    for width in (1, 7, 80):
        assert 1 <= len(peaks.shown(width)) <= width
        assert max(peaks.shown(width)) == max(values)
    if len(values) <= 512:
        assert means.shown(512) == values


def test_a_curve_stays_small_and_shows_one_bad_step_of_many() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(step, math.nan if step == 60_000 else 1.0)
    line = bars(curve.shown(50), log=False).plain
    assert 25 <= len(line) <= 50
    assert [k for k, mark in enumerate(line) if mark == "!"] == [pytest.approx(0.6 * len(line), abs=1)]
    assert len(curve._cells) <= 512


def test_a_step_that_is_trained_again_replaces_the_later_ones() -> None:
    curve = Curve()
    for step, value in ((0, 5.0), (1, 4.0), (2, 9.0), (3, 8.0), (2, 3.0), (0, 1.0), (1, 2.0)):
        curve.add(step, value)
    assert curve.shown(10) == [1.0, 2.0]


@pytest.mark.parametrize("resumed", range(1000, 1008))
def test_nothing_stays_of_a_long_run_that_is_trained_again(resumed: int) -> None:
    curve = Curve(peaks=True)
    for step in range(2000):
        curve.add(step, 100.0 if step >= resumed else 1.0)
    for step in range(resumed, 2000):
        curve.add(step, 2.0)
    assert (curve.low, curve.high) == (1.0, 2.0)
    assert curve.shown(512).count(1.0) == pytest.approx(250, abs=1)


def test_bars_tell_zero_from_small_and_need_no_block_characters() -> None:
    assert bars([0.0, 1e-3, 1.0, math.inf], log=True).plain == "0▁█!"
    assert bars([1.0, 2.0], log=False, ascii_only=True).plain == "+@"  # from zero on, so that noise is not a slope
    assert bars([1.0, 1.01], log=True, decades=2.0).plain == "██"


def test_a_training_is_shown_with_its_numbers() -> None:
    lines = shown(training(run(20)), 100)
    assert lines[0] == "runs/a  Net"
    text = "\n".join(lines)
    for expected in (
        "step 19",
        "loss              1.90",
        "1.90 to 2.30",
        "total norm",
        "update ratio",
        "layer0.weight",
    ):
        assert expected in text
    (profile,) = [line for line in lines if line.startswith("▁▁▁")]
    assert profile.strip() == "▁▁▁▂▂▂▄▄▄▆▆▆▇▇▇███"  # six layers, 1e-3 to 1
    assert "no finding so far" in text


def test_what_was_not_recorded_is_said() -> None:
    bare = [replace(one, loss=None, parameter_updates=None) for one in run(3)]
    text = "\n".join(shown(training(bare)))
    assert "not given to probe.step" in text
    assert "update ratio" not in text


def test_the_pace_and_the_silence_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_767_323_045.0  # when the session started
    view = training(run(101), stored_at=now + 50)
    assert view.steps_per_s == pytest.approx(101 / 50)
    monkeypatch.setattr(time, "time", lambda: now + 51)
    assert view.state().plain == "running"
    monkeypatch.setattr(time, "time", lambda: now + 95)
    assert view.state().plain == "no new step for 45 s: the training may have ended or been killed"
    monkeypatch.setattr(time, "time", lambda: now + 400)
    slow = training(run(4), stored_at=now + 300)  # 75 s a step
    assert slow.state().plain == "running"
    view.take(News(), [{**SESSION, "ended": "2026-01-02T03:06:17+00:00"}], now + 50)
    assert (view.is_over, view.state().plain) == (True, "ended after 2 min 12 s")
    view.take(News(), [{**SESSION, "ended": "?", "fault": "OSError: \x1b[31mfull"}], now + 50)
    assert view.state().plain == r"log switched off; the training may go on: OSError: \x1b[31mfull"


def test_a_training_that_starts_again_leaves_nothing_of_the_steps_it_repeats() -> None:
    (fault, *_) = diagnose(course([2.3, 2.3, math.nan] + [math.nan] * 20))
    early, late = replace(fault, steps=(3, 3), rule="early"), replace(fault, steps=(30, 30), rule="late")
    view = training(run(40))
    view.take(News(findings=[(0, early), (0, late)]), [SESSION], None)
    assert [one.rule for one in view.findings] == ["early", "late"]
    assert any("late: the loss is huge" in line for line in shown(view))
    again = [(20, 0.5, 1.0), (21, 0.4, 1.0)]
    view.take(News(sessions={0: 1}, steps=again), [SESSION, SESSION], time.time())
    text = "\n".join(shown(view))
    assert [one.rule for one in view.findings] == ["early"]
    assert "session 2 from step 20" in text
    assert "step 21" in text
    view.take(News(is_other=True), [], None)
    assert shown(view) == ["runs/a", "waiting for the first step"]


def named(name: str) -> LiveTraining:
    snapshots = run(30, name=lambda k: name if k == 0 else f"{k}{name}")
    session = {**SESSION, "model": name}
    view = training(snapshots, name, session)
    (fault,) = diagnose(course([math.nan] * 30))
    findings = [(0, replace(fault, rule=rule)) for rule in (fault.rule, name, "x")]
    view.take(News(findings=findings), [session], None)
    return view


def sweep_of(build: Callable[[], Recorded], name: str = "s.sqlite") -> LiveSweep:
    view = LiveSweep(name)
    view.take(build(), time.time())
    return view


def in_a_sweep(name: str) -> LiveSweep:
    recorded = degraded(seeds=1)
    recorded.rows = [replace(cell, family=name) for cell in recorded.rows]
    return sweep_of(lambda: recorded, name)


@pytest.mark.parametrize("width", [16, 40, 61, 120])
@pytest.mark.parametrize("build", [named, in_a_sweep], ids=["training", "sweep"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_any_name_fits_any_terminal(name: str, build: Callable[[str], RenderableType], width: int) -> None:
    view = build(name)
    for height in (None, 8, 24):
        lines = shown(view, width, height)
        assert all(cell_len(line) <= width for line in lines)
        assert all(character.isprintable() for line in lines for character in line)
        assert height is None or len(lines) <= max(height, 12)
    assert isinstance(view, LiveTraining | LiveSweep)
    assert "\n" not in view.line()
    assert view.line().isprintable()


@pytest.mark.parametrize("width", [40, 80])
def test_each_line_of_a_training_stays_one_line(width: int) -> None:
    lines, wide = shown(named("layer"), width), shown(named("layer"), 200)
    assert len(lines) == len(wide)
    cut = [line for line, whole in zip(lines, wide, strict=True) if whole.startswith("step ") and len(whole) > width]
    assert all(line.endswith("…") for line in cut)
    assert len(cut) == (3 if width == 40 else 0)


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    assert "\n".join(shown(training(run(30)), encoding="ascii")).replace("…", "").isascii()


def test_a_low_screen_shows_the_newest_findings() -> None:
    view = named("net")
    n = len(view.findings)
    assert n > 1
    lines = shown(view, 80, len(shown(view)) - 1)
    assert f"{n} findings, the newest {n - 1}" in lines[-n]


@pytest.mark.parametrize("build", ODD.values(), ids=ODD.keys())
def test_any_sweep_is_shown(build: Callable[[], Recorded]) -> None:
    assert "training runs done" in " ".join(shown(sweep_of(build)))


def test_a_sweep_is_shown_with_its_progress() -> None:
    view = sweep_of(interrupted)
    lines = shown(view)
    assert lines[:2] == [
        "s.sqlite",
        "1 of 3 training runs done, more than 20 s left",
    ]  # 13 epochs of 1.5 s
    rows = [line.split() for line in lines if line.startswith((" plain", "plain"))]
    assert [[row[0], row[2], row[-1]] for row in rows] == [
        ["plain-20", "20/20", "done"],
        ["plain-56", "7/20", "running"],
        ["plain-110", "0/20", "waiting"],
    ]
    assert view.line().endswith("; plain-56 seed 0: epoch 7/20, training error 1.0 %")
    assert not view.is_over
    assert sweep_of(degraded).is_over


def test_the_time_left_is_shared_by_what_runs() -> None:
    recorded = Recorded({"data": "digits", "epochs": 10})
    for seed in range(4):
        recorded.add("plain", 20, seed=seed, epochs=6, status="pending")
    assert "about 6.0 s left" in sweep_of(lambda: recorded).line()  # four at once, 1.5 s an epoch
    for cell in recorded.rows[2:]:
        recorded.epoch_rows[cell.id] = []
    assert "about 21 s left" in sweep_of(lambda: recorded).line()  # (2 x 4 + 2 x 10) epochs, two at once


def test_a_training_run_that_failed_is_no_longer_waited_for() -> None:
    recorded = interrupted()
    recorded.rows[1:] = [replace(cell, failure="ValueError: no such layer") for cell in recorded.rows[1:]]
    view = sweep_of(lambda: recorded)
    assert (view.is_over, view.line()) == (True, "1 of 3 training runs done, 2 failed")
    assert sum(line.rstrip().endswith("failed") for line in shown(view)[2:]) == 2


def test_a_sweep_that_is_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    view = LiveSweep("s.sqlite")
    view.take(interrupted(), time.time() - 90)
    assert "no progress for 1 min 30 s: the sweep may have been stopped" in view.line()


def test_a_large_sweep_on_a_low_screen_shows_what_runs() -> None:
    recorded = Recorded()
    for seed in range(50):
        recorded.add("plain", 20, seed=seed, status="pending" if seed > 40 else "done")
    recorded.rows.append(Cell(99, "plain", 110, 0, 1000, "pending"))
    lines = shown(sweep_of(lambda: recorded), 80, 20)
    assert len(lines) <= 20
    assert sum("running" in line for line in lines) == 9
    assert lines[-1].startswith("and ")
