"""A training whose steps go to every sink at once gives the same parameters to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.sinks import CSV, JSONL, Feed, MLflow, Sink, TensorBoard, Trackio, WandB
from gradprobe.sinks.feed import close_all

N_STEPS = 30


class Faulty:
    """A sink that raises from the third step on."""

    n_written = 0

    def open(self, about: object) -> None: ...

    def write(self, step: int, snapshot: gradprobe.Snapshot) -> None:
        self.n_written += 1
        if self.n_written > 2:
            raise ConnectionError("the tracker is down")

    def tell(self, step: int, finding: gradprobe.Finding) -> None: ...

    def close(self) -> None:
        raise ConnectionError("the tracker is still down")


def train(sinks: Sequence[Sink]) -> list[torch.Tensor]:
    random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True) if sinks else None
    feeds = [Feed(sink, {"model": "three layers"}) for sink in sinks]
    for _ in range(N_STEPS):
        x = torch.randn(16, 8) * random.random()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, 0].gt(0).long())
        loss.backward()
        optimizer.step()
        if probe is not None:
            probe.step(loss)
            for snapshot in probe.drain():
                for feed in feeds:
                    feed.put(snapshot.step, snapshot)
    if probe is not None:
        probe.detach()
        for feed in feeds:
            feed.tell(
                N_STEPS, gradprobe.Finding("a rule", "", (), (0, 1), {}, "a fault", "", "", "a cause", ("a remedy",))
            )
        close_all(feeds, timeout_s=60)
    return [*model.parameters(), torch.rand(4), torch.tensor(random.random())]


def test_every_sink_leaves_the_training_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    trackers = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio, "tensorboard": lambda: TensorBoard("board")}
    sinks = [JSONL("steps.jsonl"), CSV("steps.csv"), Faulty()]
    sinks += [make() for library, make in trackers.items() if find_spec(library) is not None]
    bare = train([])
    with pytest.warns(gradprobe.GradprobeWarning, match="the sink Faulty is switched off") as told:
        observed = train(sinks)
    assert all(torch.equal(a, b) for a, b in zip(bare, observed, strict=True))
    assert len(told) == 1
    assert len(Path("steps.jsonl").read_text().splitlines()) == N_STEPS + 1
