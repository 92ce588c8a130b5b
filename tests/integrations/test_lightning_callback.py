"""The callback for Lightning's Trainer, in real trainings."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from helpers.trainer_runs import N_BATCHES, N_PARTS, differences, run_on_ranks, train_with_lightning
from lightning.pytorch.loggers import CSVLogger

from gradprobe.integrations.lightning import GradProbeCallback


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
    assert differences(bare.training, probed.training) == []
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
    assert not [name for name, bits in bare.training.bits.items() if not torch.equal(bits, probed.training.bits[name])]
    logged = {step: row for step, row in rows(tmp_path).items() if "gradprobe/total_norm" in row}
    assert list(logged) == [19, 24, 29]
    truths = [truth.total_norm for truth in bare.training.truths]
    assert [row["gradprobe/total_norm"] for row in logged.values()] == pytest.approx([truths[k] for k in (4, 9, 14)])


def test_rank_0_logs_the_averaged_gradients(tmp_path: Path) -> None:
    ranks = run_on_ranks("lightning", tmp_path)
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
