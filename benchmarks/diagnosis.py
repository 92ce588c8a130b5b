"""How far the diagnosis can be trusted: precision and recall on short runs that are healthy or have a fault planted.

Every run trains a small net on scikit-learn's digits with a probe attached, and the rules see nothing but its history.
Exploding ones take rates so small that they stay so: at larger ones the first steps flatten the gradient over depth.
A run counts for each fault as found or not; faults that follow from the planted one (a loss that blows up and becomes
NaN) are named with it and count neither way. Thresholds are those of the sources where there is one; seeds below 400
were looked at while the rules were written, the table is of others.

    python benchmarks/diagnosis.py [--seeds 400 401 402 403]
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from _machine import processor
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import gradprobe
from gradprobe.findings import Rule

HELD_OUT = (400, 401, 402, 403)  # seeds that chose no threshold and no run
N_STEPS = 40
BATCH_SIZE = 64
IMAGES, LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES = (IMAGES.float() / 16 - 0.3).view(-1, 1, 8, 8)  # [N, 1, 8, 8]


@dataclass(frozen=True)
class Run:
    """A net, how it is trained, and what is wrong with it.

    Attributes:
        name: What it is.
        build: Makes the net.
        fault: What was planted, None for a healthy run.
        follows: Faults that may follow from it.
        learning_rate: Of SGD with momentum 0.9.
        disturb: Changes a batch, given its images and the step.
    """

    name: str
    build: Callable[[], nn.Module]
    fault: Rule | None = None
    follows: tuple[Rule, ...] = ()
    learning_rate: float = 0.02
    disturb: Callable[[torch.Tensor, int], torch.Tensor] = field(default=lambda images, step: images)


class Recurrent(nn.Module):
    """Reads an image row by row, or pixel by pixel."""

    def __init__(self, cell: type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cell = cell(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        out, _ = self.cell(images.squeeze(1))  # [B, 8, 32]
        return self.head(out[:, -1])


class Transformer(nn.Module):
    """An encoder over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        return self.head(self.encoder(self.embed(images.squeeze(1))).mean(1))


class Text(nn.Module):
    """Reads pixels as words of a large vocabulary, most of which never occur."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 16)
        self.cell = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        words = ((images.flatten(1) + 0.3) * 16).round().long()  # [B, 64]
        out, _ = self.cell(self.embed(words))
        return self.head(out.mean(1))


class HalfDetached(nn.Module):
    """Two branches, one of which is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = images.flatten(1)
        return self.head(torch.relu(self.used(x) + 0.0 * self.unused(x)))


def mlp(depth: int, activation: type[nn.Module], gain: float = 1.0, norm: bool = False, bias: float = 0.0) -> nn.Module:
    """A stack of equal layers; weights drawn with standard deviation gain / sqrt(fan_in)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth):
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight, std=gain / 8)
        nn.init.constant_(linear.bias, bias if k == 1 else 0.0)
        layers += [linear, *([nn.BatchNorm1d(64)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


HE = math.sqrt(2.0)  # gain for ReLU, He et al. 2015
CUT: tuple[Rule, ...] = ("vanishing", "silent site", "not learning")  # dead units let nothing through
ANY: tuple[Rule, ...] = get_args(Rule)


def nan_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """One pixel of one batch is no number."""
    images = images.clone()
    if step == 23:
        images[3, 0, 4, 4] = math.nan
    return images


def outlier_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """One batch is far brighter than all others."""
    return images * 100 if step == 31 else images


RUNS = (
    Run("MLP, ReLU, He", lambda: mlp(4, nn.ReLU, HE)),
    Run("MLP, tanh", lambda: mlp(4, nn.Tanh)),
    Run("MLP of 10, ReLU, BN", lambda: mlp(10, nn.ReLU, HE, norm=True)),
    Run("ResNet-8", lambda: gradprobe.networks.resnet(8, in_channels=1)),
    Run("plain-8", lambda: gradprobe.networks.plain(8, in_channels=1)),
    Run("RNN", lambda: Recurrent(nn.RNN), learning_rate=0.05),
    Run("LSTM", lambda: Recurrent(nn.LSTM), learning_rate=0.2),
    Run("GRU", lambda: Recurrent(nn.GRU), learning_rate=0.2),
    Run("transformer", Transformer),
    Run("embedding and GRU", Text, learning_rate=0.2),
    Run("MLP of 20, sigmoid", lambda: mlp(20, nn.Sigmoid), "vanishing", ("not learning",)),
    Run("MLP of 20, tanh, small weights", lambda: mlp(20, nn.Tanh, 0.4), "vanishing", ("not learning",)),
    Run("deep_cnn(24)", lambda: gradprobe.networks.deep_cnn(24, in_channels=1), "vanishing", ("not learning", "dying")),
    Run("MLP of 50, ReLU, BN", lambda: mlp(50, nn.ReLU, HE, norm=True), "exploding", ANY, 1e-4),
    Run("MLP of 40, tanh, large weights", lambda: mlp(40, nn.Tanh, 3.0), "exploding", ANY, 1e-6),
    Run("MLP, rate of 50", lambda: mlp(4, nn.ReLU, HE), "loss blow-up", ANY, 50.0),
    Run("MLP of 30, ReLU, large weights", lambda: mlp(30, nn.ReLU, 2 * HE), "loss blow-up", ANY, 1e-3),
    Run("MLP, NaN in a batch", lambda: mlp(4, nn.ReLU, HE), "non-finite", ("loss blow-up",), disturb=nan_at),
    Run("transformer, NaN in a batch", Transformer, "non-finite", ("loss blow-up",), disturb=nan_at),
    Run("MLP, dead units", lambda: mlp(4, nn.ReLU, HE, bias=-30.0), "dying", CUT),
    Run("MLP, most units dead", lambda: mlp(4, nn.ReLU, HE, bias=-2.0), "dying", CUT),
    Run("branch times zero", HalfDetached, "silent site", ("dying",), 0.05),
    Run("MLP, no rate", lambda: mlp(4, nn.ReLU, HE), "not learning", learning_rate=0.0),
    Run("ResNet-8, no rate", lambda: gradprobe.networks.resnet(8, in_channels=1), "not learning", learning_rate=0.0),
    Run("MLP, outlier", lambda: mlp(4, nn.ReLU, HE), "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
    Run("transformer, outlier", Transformer, "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
)


def found_in(run: Run, seed: int) -> set[Rule]:
    """Trains and diagnoses.

    Args:
        run: What to train.
        seed: Of the weights and of the order of the images.

    Returns:
        The rules that fired.
    """
    torch.manual_seed(seed)
    model = run.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate, momentum=0.9)
    with gradprobe.attach(model, junctions=False) as probe:
        for step, chosen in enumerate(batches()):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(run.disturb(IMAGES[chosen], step)), LABELS[chosen])
            loss.backward()
            probe.step(loss=loss)
            optimizer.step()
        return {finding.rule for finding in probe.findings()}


def batches() -> Iterator[torch.Tensor]:
    """Yields the positions of the images of each batch."""
    order = torch.cat([torch.randperm(len(IMAGES)) for _ in range(2)])
    yield from order[: N_STEPS * BATCH_SIZE].view(N_STEPS, BATCH_SIZE)


@dataclass
class Score:
    """Counts for one fault; `wrong` names the runs that were judged wrongly."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        """Share of the alarms that were right."""
        return self.hits / (self.hits + self.false_alarms) if self.hits + self.false_alarms else math.nan

    @property
    def recall(self) -> float:
        """Share of the faults that were found."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else math.nan


def scores(seeds: Sequence[int]) -> dict[Rule, Score]:
    """Makes all runs and counts.

    Args:
        seeds: Each run is made once with each.

    Returns:
        The counts of each fault.
    """
    table: dict[Rule, Score] = {rule: Score() for rule in get_args(Rule)}
    for run in RUNS:
        for seed in seeds:
            found = found_in(run, seed)
            for rule, score in table.items():
                if rule == run.fault and rule in found:
                    score.hits += 1
                elif rule == run.fault:
                    score.misses += 1
                    score.wrong.append(f"missed: {run.name}, seed {seed}")
                elif rule in found and rule not in run.follows:
                    score.false_alarms += 1
                    score.wrong.append(f"false alarm: {run.name}, seed {seed}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(HELD_OUT))
    seeds = parser.parse_args().seeds
    start = time.perf_counter()
    table = scores(seeds)
    n_healthy = sum(run.fault is None for run in RUNS) * len(seeds)
    print(f"{processor()}; torch {torch.__version__}, python {platform.python_version()}")
    print(f"{len(RUNS) * len(seeds)} runs of {N_STEPS} steps, {n_healthy} of them healthy; seeds {seeds}")
    print(f"{'fault':14}{'planted':>9}{'found':>8}{'missed':>8}{'false alarms':>14}{'precision':>11}{'recall':>8}")
    for rule, score in table.items():
        planted = score.hits + score.misses
        numbers = f"{planted:9}{score.hits:8}{score.misses:8}{score.false_alarms:14}"
        print(f"{rule:14}{numbers}{score.precision:11.3f}{score.recall:8.3f}")
    for rule, score in table.items():
        for line in score.wrong:
            print(f"{rule}: {line}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
