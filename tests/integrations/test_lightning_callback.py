"""The callback for Lightning's Trainer, in real trainings."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from helpers.trainer_runs import (
    N_BATCHES,
    N_PARTS,
    break_off,
    poison,
    run_on_ranks,
    told_by,
    train_with_lightning,
    wrong,
)
from lightning.pytorch.loggers import CSVLogger

import gradprobe
from gradprobe.integrations.lightning import GradProbeCallback
from gradprobe.log import read_run


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """Reads back what Lightning's CSV logger wrote, by its step."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                numbers = {name: float(value) for name, value in row.items() if value}
                found.setdefault(int(row["step"]), {}).update(numbers)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_stays_and_the_log_says_what_was_measured(tmp_path: Path, precision: str) -> None:
    bare = train_with_lightning(tmp_path, precision=precision)
    logger = CSVLogger(tmp_path, name="csv")
    probed = train_with_lightning(tmp_path, GradProbeCallback(), precision=precision, logger=logger)
    assert wrong(bare, probed) == []
    history = probed.training.history
    assert [snapshot.loss for snapshot in history] == pytest.approx(bare.step_losses(), rel=1e-6)
    logged = {step: row for step, row in rows(tmp_path).items() if "gradprobe/total_norm" in row}
    assert list(logged) == [4, 9, 14, 19, 24, 29]
    for step, row in logged.items():
        expected = {name: value for name, value in history[step].metrics().items() if not math.isnan(value)}
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["loss"] == pytest.approx(probed.losses[(step + 1) * N_PARTS - 1])  # at the step of self.log


def test_resumed_training_goes_on_with_the_steps(tmp_path: Path) -> None:
    train_with_lightning(tmp_path / "a", keep=tmp_path / "half.ckpt", epochs=1)
    bare = train_with_lightning(tmp_path / "b", resume=tmp_path / "half.ckpt")
    logger = CSVLogger(tmp_path / "c", name="csv")
    probed = train_with_lightning(tmp_path / "c", GradProbeCallback(), logger=logger, resume=tmp_path / "half.ckpt")
    assert wrong(bare, probed, first_step=15) == []
    logged = {step: row for step, row in rows(tmp_path).items() if "gradprobe/total_norm" in row}
    assert list(logged) == [19, 24, 29]
    truths = [truth.total_norm for truth in bare.training.truths]
    assert [row["gradprobe/total_norm"] for row in logged.values()] == pytest.approx([truths[k] for k in (4, 9, 14)])


@pytest.mark.soak
def test_rank_0_logs_the_averaged_gradients(tmp_path: Path) -> None:
    ranks = run_on_ranks("lightning", tmp_path)
    assert len(told_by(ranks[0]["poisoned"])) == len(ranks[0]["poisoned"].findings) > 0
    assert told_by(ranks[1]["poisoned"]) == []
    for runs in ranks:
        history = runs["probed"].training.history
        assert {snapshot.provenance.reduction for snapshot in history} == {"averaged"}
        norms = [truth.total_norm for truth in runs["bare"].training.truths]
        assert len(norms) == 16  # an epoch ends with a step of one micro-batch
        assert [snapshot.total_norm for snapshot in history] == pytest.approx(norms)
        assert [snapshot.loss for snapshot in history] == pytest.approx(
            runs["bare"].step_losses(N_BATCHES // 2), rel=1e-6
        )
        bare, probed = runs["bare"].training.bits, runs["probed"].training.bits
        assert not [name for name, bits in bare.items() if not torch.equal(bits, probed[name])]
    logged = rows(tmp_path)
    written = {step: row["gradprobe/total_norm"] for step, row in logged.items() if "gradprobe/total_norm" in row}
    history = ranks[0]["probed"].training.history
    assert written == pytest.approx({step: history[step].total_norm for step in (4, 9, 14)})


def test_findings_are_told_once_and_stay_told_after_a_resume(tmp_path: Path) -> None:
    keep, logger = tmp_path / "half.ckpt", CSVLogger(tmp_path / "a", name="csv")
    first = train_with_lightning(tmp_path, GradProbeCallback(), spoil=poison, keep=keep, epochs=1, logger=logger)
    told = told_by(first)
    assert len(told) == len(first.findings) > 0
    assert {finding.title for finding in first.findings} == {line.split(": ")[1] for line in told}
    marks = {name: step for step, row in rows(tmp_path / "a").items() for name in row if "/finding/" in name}
    assert set(marks) == {f"gradprobe/finding/{finding.title}" for finding in first.findings}
    assert min(marks.values()) == 14  # the first log after the fault

    second = train_with_lightning(tmp_path, GradProbeCallback(), resume=keep)
    repeated = {finding.title for finding in second.findings} & {finding.title for finding in first.findings}
    assert repeated
    assert not [line for line in second.console for title in repeated if line.startswith(f"gradprobe: {title}: ")]


class Full(CSVLogger):
    """A logger whose disk is full."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "gradprobe/total_norm" in metrics:
            raise OSError("no space left")


def test_a_logger_that_fails_does_not_touch_the_training(tmp_path: Path) -> None:
    bare = train_with_lightning(tmp_path)
    with pytest.warns(gradprobe.GradprobeWarning, match="no space left") as warned:
        probed = train_with_lightning(tmp_path, GradProbeCallback(), logger=Full(tmp_path))
    assert len([one for one in warned if one.category is gradprobe.GradprobeWarning]) == 1
    assert wrong(bare, probed) == []


def test_a_training_that_broke_off_can_be_started_again(tmp_path: Path) -> None:
    callback = GradProbeCallback()
    with pytest.raises(RuntimeError, match="the data are gone"):
        train_with_lightning(tmp_path, callback, spoil=break_off)
    assert "detached" in repr(callback.probe)
    assert wrong(train_with_lightning(tmp_path), train_with_lightning(tmp_path, callback)) == []


def test_options_reach_the_probe_and_the_log_has_the_steps_of_the_trainer(tmp_path: Path) -> None:
    keep, options = tmp_path / "half.ckpt", {"log_dir": tmp_path / "log", "every": 5}
    train_with_lightning(tmp_path, GradProbeCallback(**options), keep=keep, epochs=1)
    train_with_lightning(tmp_path, GradProbeCallback(**options), resume=keep)
    assert [snapshot.step for snapshot in read_run(tmp_path / "log").snapshots()] == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("name", ["optimizer", "start_step"])
def test_what_the_trainer_knows_is_refused(name: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=f"{name}: needed none, since it comes from the trainer, got 1"):
        GradProbeCallback(**{name: 1})
