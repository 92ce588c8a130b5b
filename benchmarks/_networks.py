"""The small networks of benchmarks/_runs.py, all for images of 8 x 8 pixels and ten classes."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

HE = math.sqrt(2.0)  # gain for ReLU, He et al. 2015


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


class Encoder(nn.Module):
    """A transformer over the rows of an image, with positions and a mean over the rows.

    Attributes:
        norm: The normalisation before the head; none after layers that normalise their output.
    """

    def __init__(self, depth: int = 4, width: int = 32, norm_first: bool = True) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, width), nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, functional.gelu, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.encoder(self.embed(images.squeeze(1)) + self.positions)
        return self.head(self.norm(x).mean(1))


def gpt2(depth: int = 4, width: int = 32) -> Encoder:
    """Builds a pre-norm transformer with GPT-2's initialisation: 0.02, and less in the ends of its branches."""
    model = Encoder(depth, width)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            ends_branch = name.endswith(("out_proj.weight", "linear2.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if ends_branch else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


class Scaled(nn.Module):
    """Residual branches behind a normalisation, each scaled by factors per channel or ended by weights of zero."""

    def __init__(self, depth: int, scale: float | None) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(depth)
        )
        self.scales = nn.ParameterList(torch.full((32,), scale or 1.0) for _ in range(depth if scale else 0))
        if scale is None:
            for branch in self.branches:
                nn.init.zeros_(branch[-1].weight)
                nn.init.zeros_(branch[-1].bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.embed(images.flatten(1))
        for k, branch in enumerate(self.branches):
            x = x + (self.scales[k] * branch(x) if self.scales else branch(x))
        return self.head(self.norm(x))


def linear() -> nn.Module:
    """Builds a linear classifier."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def frozen(model: nn.Module) -> nn.Module:
    """Freezes all parameters except those of the last module, the head."""
    model.requires_grad_(False)
    list(model.children())[-1].requires_grad_(True)
    return model


class Gan(nn.Module):
    """A generator and a discriminator of images, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )
        self.optimizers = {
            name: torch.optim.Adam(part.parameters(), 1e-3, betas=(0.5, 0.999)) for name, part in self.named_children()
        }

    def generator_loss(self, images: torch.Tensor) -> torch.Tensor:
        """How well the discriminator tells the generated images from real ones."""
        return functional.softplus(-self.discriminator(self.generated(images))).mean()

    def discriminator_loss(self, images: torch.Tensor) -> torch.Tensor:
        """The discriminator's error on real and generated images."""
        real = functional.softplus(-self.discriminator(images.flatten(1)))
        return (real + functional.softplus(self.discriminator(self.generated(images).detach()))).mean()

    def generated(self, images: torch.Tensor) -> torch.Tensor:
        """Generates as many images as given. [B, 64]."""
        return self.generator(torch.randn(len(images), 16))

    def step(self, part: str, loss: torch.Tensor) -> None:
        """Trains one part by one step; the other keeps the gradient that has passed through it."""
        self.optimizers[part].zero_grad()
        loss.backward()
        self.optimizers[part].step()


def generator_turn(model: Gan, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a generator whose discriminator has just been trained."""
    model.step("discriminator", model.discriminator_loss(images))
    return model.generator_loss(images)


def discriminator_turn(model: Gan, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a discriminator whose generator has just been trained."""
    model.step("generator", model.generator_loss(images))
    return model.discriminator_loss(images)
