"""The labelled runs of benchmarks/diagnosis.py: small networks that are healthy or have a planted fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import gradprobe

Fault = str  # title of a finding: the rule, and the pass in brackets where it needs one


@dataclass(frozen=True)
class Run:
    """A network, how it is trained, and the fault it has.

    Attributes:
        name: Name in the table.
        build: Builds the network.
        fault: The planted fault, None for a healthy run.
        follows: Faults that may follow from the planted one.
        learning_rate: Learning rate of SGD with momentum 0.9.
        disturb: Changes the images of a batch, given the step.
        alter: Changes the network before a step, given the step.
        activations: Whether to observe activations.
        dtype: Dtype of autocast, None for no autocast.
        weights: Dtype of the parameters.
        loss_factor: Factor on the loss; the learning rate is divided by it.
        n_steps: Number of steps.
    """

    name: str
    build: Callable[[], nn.Module]
    fault: Fault | None = None
    follows: tuple[Fault, ...] = ()
    learning_rate: float = 0.02
    disturb: Callable[[torch.Tensor, int], torch.Tensor] = field(default=lambda images, step: images)
    alter: Callable[[nn.Module, int], None] = field(default=lambda model, step: None)
    activations: bool = True
    dtype: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    loss_factor: float = 1.0
    n_steps: int = 40


class Recurrent(nn.Module):
    """Reads an image row by row."""

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
    """Reads pixels as words of a large vocabulary, most of which never appear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 16)
        self.cell = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(64 * 32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        words = ((images.flatten(1) + 0.3) * 16).round().long()  # [B, 64]
        out, _ = self.cell(self.embed(words))
        return self.head(out.flatten(1))


class BranchTimesZero(nn.Module):
    """Two branches, one of which is multiplied by a factor."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__()
        self.factor = factor
        self.used, self.unused, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = images.flatten(1)
        return self.head(torch.relu(self.used(x) + self.factor * self.unused(x)))


class Highway(nn.Module):
    """Layers whose output is mixed with their input by a sigmoid gate; the gates start almost closed."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(depth))
        self.head = nn.Linear(64, 10)
        for gate in self.gates:
            nn.init.constant_(gate[0].bias, -3.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = images.flatten(1)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = torch.lerp(x, layer(x), gate(x))
        return self.head(x)


class ReZero(nn.Module):
    """Residual branches with a factor that starts at zero."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(depth))
        self.factors = nn.Parameter(torch.zeros(depth))
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = images.flatten(1)
        for branch, factor in zip(self.branches, self.factors, strict=True):
            x = x + factor * branch(x)
        return self.head(x)


class WayAround(nn.Module):
    """A stack of sigmoid layers with a shortcut around it: the first and the last layer both get a gradient."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.stack, self.head = nn.Linear(64, 64), mlp(depth, nn.Sigmoid)[:-1], nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.first(images.flatten(1))
        return self.head(x + self.stack(x))


def mlp(
    depth: int,
    activation: type[nn.Module],
    gain: float | None = 1.0,
    norm: bool = False,
    bias: float = 0.0,
    first_gain: float = 1.0,
) -> nn.Module:
    """Builds a stack of equal layers.

    Weights have standard deviation gain / sqrt(fan_in), or torch's initialisation if gain is None; `bias` shifts the
    second layer's biases, `first_gain` scales the first layer's weights.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth):
        linear = nn.Linear(64, 64)
        if gain is not None:
            nn.init.normal_(linear.weight, std=gain / 8 * (first_gain if k == 0 else 1.0))
            nn.init.constant_(linear.bias, bias if k == 1 else 0.0)
        layers += [linear, *([nn.BatchNorm1d(64)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def cnn(depth: int, gain: float, bias: float = 0.0) -> nn.Module:
    """Builds a stack of equal convolutions with ReLU; `bias` shifts the second layer's biases."""
    layers: list[nn.Module] = []
    for k in range(depth):
        conv = nn.Conv2d(16 if k else 1, 16, 3, padding=1)
        nn.init.normal_(conv.weight, std=gain / math.sqrt(9 * conv.in_channels))
        nn.init.constant_(conv.bias, bias if k == 1 else 0.0)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10))


HE = math.sqrt(2.0)  # gain for ReLU, He et al. 2015
STILL = ("updates too small", "not learning")  # follow from steps that hardly move the weights
# Faults that follow from steps that are too large.
THROWN = (
    "non-finite",
    "loss blow-up",
    "updates too large",
    "unstable loss",
    "exploding (forward)",
    "vanishing (backward)",
    "saturation",
    "dying",
    "silent parameter",
    "layer drift",
    "spike",
    "not learning",
)
UNDERFLOW = (
    "dying",
    "silent parameter",
    "layer drift",
    "vanishing (backward)",
    "not learning",
    "spike",
)  # follow from float16 underflow
SMALL = ("poor initialisation", *STILL)  # follow from weights that are too small
CUT = ("vanishing (backward)", "silent parameter", *STILL)  # follow from dead units, which pass no gradient


def nan_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """Sets one pixel of one batch to NaN."""
    images = images.clone()
    if step == 23:
        images[3, 0, 4, 4] = math.nan
    return images


def outlier_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """Makes one batch far brighter than all others."""
    return images * 100 if step == 31 else images


def cut_branch(model: nn.Module, step: int) -> None:
    """Multiplies one of two branches by zero from step 25 on."""
    if step == 25:
        model.factor = 0.0


def kill_layer(model: nn.Module, step: int) -> None:
    """Kills the second layer's units at step 25, as a step that is too large would."""
    if step == 25:
        torch.nn.init.constant_(model[3].bias, -30.0)


RUNS = (
    Run("MLP, ReLU, He", lambda: mlp(4, nn.ReLU, HE)),
    Run("MLP of 3, ReLU, torch's weights", lambda: mlp(3, nn.ReLU, None), learning_rate=0.1),
    Run("MLP, tanh", lambda: mlp(4, nn.Tanh)),
    Run("MLP, sigmoid", lambda: mlp(2, nn.Sigmoid, 4.0), learning_rate=0.1),
    Run("MLP of 10, ReLU, BN", lambda: mlp(10, nn.ReLU, HE, norm=True)),
    Run("CNN", lambda: cnn(4, HE), learning_rate=0.01),
    Run("ResNet-8", lambda: gradprobe.networks.resnet(8, in_channels=1)),
    Run("plain-8", lambda: gradprobe.networks.plain(8, in_channels=1)),
    Run(
        "ResNet-20 without BN",
        lambda: gradprobe.networks.resnet(20, in_channels=1, width=8, norm="none"),
        learning_rate=1e-3,
    ),
    Run("highway net of 6", lambda: Highway(6), learning_rate=0.05),
    Run("12 branches that start at zero", lambda: ReZero(12)),
    Run("RNN", lambda: Recurrent(nn.RNN), learning_rate=0.05),
    Run("LSTM", lambda: Recurrent(nn.LSTM), learning_rate=0.2),
    Run("GRU", lambda: Recurrent(nn.GRU), learning_rate=0.2),
    Run("transformer", Transformer),
    Run("embedding and GRU", Text, learning_rate=0.05),
    Run("transformer, float16", Transformer, dtype=torch.float16),
    Run("MLP, bfloat16, loss times 1e-5", lambda: mlp(4, nn.ReLU, HE), dtype=torch.bfloat16, loss_factor=1e-5),
    Run("MLP, tanh, 150 steps", lambda: mlp(4, nn.Tanh), learning_rate=0.2, n_steps=150),
    Run("LSTM, 150 steps", lambda: Recurrent(nn.LSTM), learning_rate=0.2, n_steps=150),
    Run("MLP of 20, sigmoid", lambda: mlp(20, nn.Sigmoid), "vanishing (backward)", STILL),
    Run("MLP of 20, tanh, small weights", lambda: mlp(20, nn.Tanh, 0.4), "vanishing (backward)", SMALL),
    Run("20 sigmoid layers and a way around", lambda: WayAround(20), "vanishing (backward)", STILL, 1e-4),
    Run(
        "deep_cnn(24)",
        lambda: gradprobe.networks.deep_cnn(24, in_channels=1, width=16),
        "vanishing (backward)",
        ("dying", *SMALL),
    ),
    Run(
        "MLP of 50, ReLU, BN", lambda: mlp(50, nn.ReLU, HE, norm=True), "exploding (backward)", ("not learning",), 1e-4
    ),
    Run(
        "MLP of 50, ReLU, BN, huge first weights",
        lambda: mlp(50, nn.ReLU, HE, norm=True, first_gain=1e4),
        "exploding (backward)",
        STILL,
        1e-4,
    ),
    Run("MLP of 40, tanh, large weights", lambda: mlp(40, nn.Tanh, 3.0), "exploding (backward)", STILL, 1e-6),
    Run("MLP of 30, ReLU, large weights", lambda: mlp(30, nn.ReLU, 2 * HE), "exploding (forward)", THROWN, 1e-3),
    Run(
        "ResNet-80 without BN",
        lambda: gradprobe.networks.resnet(80, in_channels=1, width=4, norm="none"),
        "exploding (forward)",
        STILL,
        1e-12,
    ),
    Run("MLP, leaky ReLU, rate of 50", lambda: mlp(4, nn.LeakyReLU, HE), "loss blow-up", THROWN, 50.0),
    Run(
        "MLP of 30, ReLU, large weights, outputs not observed",
        lambda: mlp(30, nn.ReLU, 2 * HE),
        "loss blow-up",
        THROWN,
        1e-3,
        activations=False,
    ),
    Run("MLP, NaN in a batch", lambda: mlp(4, nn.ReLU, HE), "non-finite", ("loss blow-up",), disturb=nan_at),
    Run("transformer, NaN in a batch", Transformer, "non-finite", ("loss blow-up",), disturb=nan_at),
    Run(
        "MLP of 12, ReLU, small weights",
        lambda: mlp(12, nn.ReLU, 0.3),
        "poor initialisation",
        (*STILL, "vanishing (backward)", "dying", "dead ReLU", "layer drift"),
    ),
    Run(
        "CNN of 8, small weights",
        lambda: cnn(8, 0.2),
        "poor initialisation",
        (*STILL, "vanishing (backward)", "dying", "dead ReLU", "silent parameter", "layer drift"),
    ),
    Run(
        "MLP of 6, tanh, huge weights",
        lambda: mlp(6, nn.Tanh, 30.0),
        "saturation",
        ("not learning", "exploding (backward)"),
        1e-3,
    ),
    Run(
        "MLP of 4, sigmoid, huge weights",
        lambda: mlp(4, nn.Sigmoid, 100.0),
        "saturation",
        ("not learning", "exploding (backward)"),
    ),
    Run("MLP, dead units", lambda: mlp(4, nn.ReLU, HE, bias=-30.0), "dead ReLU", ("dying", *CUT)),
    Run("CNN, dead units", lambda: cnn(4, HE, bias=-30.0), "dead ReLU", ("dying", *CUT)),
    Run("MLP, most units dead", lambda: mlp(4, nn.ReLU, HE, bias=-2.0), "dying", ("dead ReLU", "layer drift", *CUT)),
    Run("branch times zero", BranchTimesZero, "silent parameter", ("dying",), 0.05),
    Run(
        "branch cut at step 25",
        lambda: BranchTimesZero(0.5),
        "layer drift",
        ("silent parameter",),
        0.05,
        alter=cut_branch,
    ),
    Run(
        "MLP, a layer dies at step 25",
        lambda: mlp(4, nn.ReLU, HE),
        "layer drift",
        ("dead ReLU", *CUT),
        alter=kill_layer,
    ),
    Run(
        "MLP, float16, loss times 1e-5",
        lambda: mlp(4, nn.ReLU, HE),
        "precision loss",
        UNDERFLOW,
        dtype=torch.float16,
        loss_factor=1e-5,
    ),
    Run(
        "transformer, float16, loss times 1e-4",
        Transformer,
        "precision loss",
        UNDERFLOW,
        dtype=torch.float16,
        loss_factor=1e-4,
    ),
    Run("MLP, tanh, rate of 100", lambda: mlp(4, nn.Tanh), "updates too large", THROWN, 100.0),
    Run("transformer, rate of 10", Transformer, "updates too large", THROWN, 10.0),
    Run(
        "MLP, bfloat16 weights, rate of 1e-4",
        lambda: mlp(4, nn.ReLU, HE),
        "updates too small",
        ("not learning",),
        1e-4,
        weights=torch.bfloat16,
    ),
    Run("transformer, rate of 1e-9", Transformer, "updates too small", ("not learning",), 1e-9),
    Run(
        "RNN, rate of 0.3",
        lambda: Recurrent(nn.RNN),
        "unstable loss",
        ("layer drift", "silent parameter", "spike", "not learning"),
        0.3,
        n_steps=150,
    ),
    Run("MLP, tanh, rate of 1", lambda: mlp(4, nn.Tanh), "unstable loss", THROWN, 1.0, n_steps=150),
    Run("MLP, no rate", lambda: mlp(4, nn.ReLU, HE), "not learning", ("updates too small",), 0.0),
    Run(
        "ResNet-8, no rate",
        lambda: gradprobe.networks.resnet(8, in_channels=1),
        "not learning",
        ("updates too small",),
        0.0,
    ),
    Run("MLP, outlier", lambda: mlp(4, nn.ReLU, HE), "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
    Run("transformer, outlier", Transformer, "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
)
