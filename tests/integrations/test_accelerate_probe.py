"""The probe in a loop that accelerate prepared, in real trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

import accelerate
from helpers.trainer_runs import N_BATCHES, poison, run_on_ranks, scalars, told_by, train_with_accelerate, wrong

import gradprobe
from gradprobe.integrations.accelerate import attach


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_stays_and_the_tracker_shows_what_was_measured(tmp_path: Path, precision: str) -> None:
    bare = train_with_accelerate(tmp_path, precision=precision)
    probed = train_with_accelerate(tmp_path, True, precision=precision, trackers=["tensorboard"], start_step=100)
    assert wrong(bare, probed, first_step=100) == []
    history = probed.training.history
    assert [snapshot.loss for snapshot in history] == pytest.approx(bare.step_losses())
    for name in ("total_norm", "loss"):
        expected = {100 + step: getattr(history[step], name) for step in range(4, 30, 5)}
        assert scalars(tmp_path, f"gradprobe/{name}") == pytest.approx(expected)


@pytest.mark.soak
def test_rank_0_logs_the_averaged_gradients(tmp_path: Path) -> None:
    ranks = run_on_ranks("accelerate", tmp_path)
    assert len(told_by(ranks[0]["poisoned"])) == len(ranks[0]["poisoned"].findings) > 0
    assert told_by(ranks[1]["poisoned"]) == []
    for runs in ranks:
        history = runs["probed"].training.history
        assert {snapshot.provenance.reduction for snapshot in history} == {"averaged"}
        norms = [truth.total_norm for truth in runs["bare"].training.truths]
        assert [snapshot.total_norm for snapshot in history] == pytest.approx(norms)
        assert [snapshot.loss for snapshot in history] == pytest.approx(runs["bare"].step_losses(N_BATCHES // 2))
        bare, probed = runs["bare"].training.bits, runs["probed"].training.bits
        assert not [name for name, bits in bare.items() if not torch.equal(bits, probed[name])]
    history = ranks[0]["probed"].training.history
    expected = {step: history[step].total_norm for step in (4, 9, 14)}
    assert scalars(tmp_path, "gradprobe/total_norm") == pytest.approx(expected)


def test_findings_are_told_once(tmp_path: Path) -> None:
    probed = train_with_accelerate(tmp_path, True, trackers=["tensorboard"], spoil=poison)
    told = told_by(probed)
    assert len(told) == len(probed.findings) > 0
    for finding in probed.findings:
        assert len(scalars(tmp_path, f"gradprobe/finding/{finding.title}")) == 1


def test_a_tracker_that_fails_does_not_touch_the_training(tmp_path: Path) -> None:
    class Full(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "full", False, None

        def __init__(self) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, object]) -> None: ...

        def log(self, values: dict[str, object], step: int | None = None, **options: object) -> None:
            raise OSError("no space left")

    bare = train_with_accelerate(tmp_path)
    with pytest.warns(gradprobe.GradprobeWarning, match="no space left") as warned:
        probed = train_with_accelerate(tmp_path, True, trackers=[Full()])
    assert len([one for one in warned if one.category is gradprobe.GradprobeWarning]) == 1
    assert wrong(bare, probed) == []


def test_arguments_are_checked() -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(gradprobe.ArgumentError, match=r"accelerator: needed an accelerate.Accelerator, got Linear"):
        attach(model, model, None)
    with pytest.raises(gradprobe.ArgumentError, match="log_every: needed an integer of at least 1, got 0"):
        attach(accelerate.Accelerator(cpu=True), model, None, log_every=0)
