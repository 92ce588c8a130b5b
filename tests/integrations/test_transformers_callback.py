"""The callback for the Trainer of transformers, in real trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from helpers.trainer_runs import (
    N_BATCHES,
    break_off,
    poison,
    run_on_ranks,
    scalars,
    told_by,
    train_with_transformers,
    wrong,
)

import gradprobe
from gradprobe.integrations.transformers import GradProbeCallback


@pytest.fixture(autouse=True)
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return tmp_path / "board"


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"is_language": True}], ids=["fp32", "bf16", "language"])
def test_training_stays_and_report_to_shows_what_was_measured(
    tmp_path: Path, board: Path, capsys: pytest.CaptureFixture[str], options: dict[str, bool]
) -> None:
    bare = train_with_transformers(tmp_path, **options)
    probed = train_with_transformers(tmp_path, GradProbeCallback(), report_to=["tensorboard"], **options)
    assert wrong(bare, probed, first_step=1) == []
    history = probed.training.history
    for name, of in (("total_norm", "total_norm"), ("loss", "loss")):
        logged = scalars(board, f"train/gradprobe/{name}")
        assert logged == pytest.approx({step: getattr(history[step - 1], of) for step in range(5, 31, 5)})
    assert scalars(board, "train/gradprobe/step") == {step: step for step in range(5, 31, 5)}
    assert "gradprobe/" not in capsys.readouterr().out


@pytest.mark.parametrize("is_language", [False, True])
def test_loss_is_the_one_that_the_trainer_takes(tmp_path: Path, board: Path, is_language: bool) -> None:
    probed = train_with_transformers(
        tmp_path, GradProbeCallback(), report_to=["tensorboard"], logging_steps=1, is_language=is_language
    )
    losses = {snapshot.step: snapshot.loss for snapshot in probed.training.history}
    assert scalars(board, "train/loss") == pytest.approx(losses, abs=1e-4)


def test_resumed_training_goes_on_with_the_steps(tmp_path: Path, board: Path) -> None:
    train_with_transformers(tmp_path, save_strategy="epoch", num_train_epochs=1)
    half = tmp_path / f"checkpoint-{N_BATCHES // 2}"
    bare = train_with_transformers(tmp_path, resume=half)
    probed = train_with_transformers(tmp_path, GradProbeCallback(), report_to=["tensorboard"], resume=half)
    assert wrong(bare, probed, first_step=16) == []
    truths = [truth.total_norm for truth in bare.training.truths]
    expected = {20: truths[4], 25: truths[9], 30: truths[14]}
    assert scalars(board, "train/gradprobe/total_norm") == pytest.approx(expected)


@pytest.mark.soak
def test_rank_0_logs_the_averaged_gradients(tmp_path: Path) -> None:
    ranks = run_on_ranks("transformers", tmp_path)
    assert len(told_by(ranks[0]["poisoned"])) == len(ranks[0]["poisoned"].findings) > 0
    assert told_by(ranks[1]["poisoned"]) == []
    for runs in ranks:
        history = runs["probed"].training.history
        assert {snapshot.provenance.reduction for snapshot in history} == {"averaged"}
        norms = [truth.total_norm for truth in runs["bare"].training.truths]
        assert [snapshot.total_norm for snapshot in history] == pytest.approx(norms)
        bare, probed = runs["bare"].training.bits, runs["probed"].training.bits
        assert not [name for name, bits in bare.items() if not torch.equal(bits, probed[name])]
    history = ranks[0]["probed"].training.history
    expected = {step: history[step - 1].total_norm for step in (5, 10, 15, 16)}  # the last is the summary
    assert scalars(tmp_path, "train/gradprobe/total_norm") == pytest.approx(expected)


def test_findings_are_told_once(tmp_path: Path, board: Path) -> None:
    probed = train_with_transformers(tmp_path, GradProbeCallback(), spoil=poison, report_to=["tensorboard"])
    told = told_by(probed)
    assert len(told) == len(probed.findings) > 0
    assert {finding.title for finding in probed.findings} == {line.split(": ")[1] for line in told}
    counts = scalars(board, "train/gradprobe/findings")
    assert [counts[step] for step in (5, 10)] == [0, 0]
    assert counts[30] == len(told)


class Full(dict[str, float]):
    """Logs that take no more."""

    def update(self, *arguments: object, **options: object) -> None:
        raise OSError("no space left")


def test_numbers_that_cannot_be_logged_do_not_touch_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = train_with_transformers(tmp_path)
    callback = GradProbeCallback()
    on_log = callback.on_log
    monkeypatch.setattr(callback, "on_log", lambda *rest, logs, **options: on_log(*rest, logs=Full(logs), **options))
    with pytest.warns(gradprobe.GradprobeWarning, match="no space left") as warned:
        probed = train_with_transformers(tmp_path, callback)
    assert len([one for one in warned if one.category is gradprobe.GradprobeWarning]) == 1
    assert wrong(bare, probed, first_step=1) == []


def test_a_training_that_broke_off_can_be_started_again(tmp_path: Path) -> None:
    callback = GradProbeCallback()
    with pytest.raises(RuntimeError, match="the data are gone"):
        train_with_transformers(tmp_path, callback, spoil=break_off)
    assert wrong(train_with_transformers(tmp_path), train_with_transformers(tmp_path, callback), first_step=1) == []


@pytest.mark.parametrize("name", ["optimizer", "start_step"])
def test_what_the_trainer_knows_is_refused(name: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=f"{name}: needed none, since it comes from the trainer, got 1"):
        GradProbeCallback(**{name: 1})
