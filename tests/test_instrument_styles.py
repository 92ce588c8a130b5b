"""Ways in which models write additions: which are junctions, which are none, and which are reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradprobe

TOKENS = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8).sin()
FOUND: dict[type[Layers], int] = {}
UNSEEN: dict[type[Layers], str] = {}


class Layers(nn.Module):
    """What the styles are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.several = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.table = nn.Embedding(10, 8)
        self.setup()

    def setup(self) -> None:
        """Makes what one style needs besides."""


def has(junctions: int) -> Callable[[type[Layers]], type[Layers]]:
    """Says that a class has some additions that are residual, and none that is not seen."""
    return lambda style: (FOUND.update({style: junctions}), style)[1]


def is_unseen(reason: str) -> Callable[[type[Layers]], type[Layers]]:
    """Says that a class has a residual addition that is left alone, and why."""
    return lambda style: (UNSEEN.update({style: reason}), style)[1]


def outcome(model: nn.Module) -> list[Tensor]:
    """The output, and the gradients of the parameters."""
    torch.manual_seed(1)
    y = model(TOKENS.clone())
    y.square().mean().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def net(style: type[Layers]) -> nn.Module:
    torch.manual_seed(0)
    return style()


# What is found where in a forward


@has(1)
class LoopOfPostNorm(Layers):
    """Every round adds to what the round before has normalised."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = self.norm(x + layer(x))
        return x


@has(2)
class StackOfPostNorm(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for k in range(3):
            x = self.norm(x + self.several[k](x))
            x = x + self.b(x)
            x = self.norm(x)
        return x


@has(1)
class StreamFromLookup(Layers):
    """The stream begins at an embedding of the model itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.table((x > 0).long().sum(-1))
        return x + self.a(x)


@has(1)
class TwoNamesOfOneValue(Layers):
    def forward(self, x: Tensor) -> Tensor:
        residual = x = self.b(x)
        x = self.a(x)
        return x + residual


@has(0)
class OneMethodOnTwoValues(Layers):
    """As heads are split: keys and queries come out of one method, but not of one tensor."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.split(self.a(x)), self.split(self.b(x))
        return q.flatten(-2) + self.norm(k.flatten(-2))


# What lies between the operands and what they have in common


@has(0)
class Adapter(Layers):
    """A layer, and beside it one of low rank: two branches, none of them bent."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 2 * self.norm(self.b(torch.dropout(x, 0.1, self.training)))


@has(0)
class Experts(Layers):
    """Two branches of different length, both bent."""

    def setup(self) -> None:
        self.routed = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.shared = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


@has(1)
class Projection(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.several[0](x).relu()) + self.a(x)


@has(0)
class ScoresOfTwoKinds(Layers):
    """Of content and of position, as in relative attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x), self.b(x)
        return torch.softmax(q @ k.mT + torch.einsum("bld,dm->blm", q, self.table.weight[:5].T), -1) @ x


@has(0)
class PositionsBesideAttention(Layers):
    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x)
        return nn.functional.scaled_dot_product_attention(x, x, v) + self.b(v)


@has(0)
class MixedInTime(Layers):
    """Weighted elementwise, on both sides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x * self.scale + x.roll(1, 1) * (1 - self.scale))


@has(1)
class ScaledShortcut(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.a(x)


@has(1)
class BranchOfItsOwnParameters(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(x, self.a.weight * 0.1)


@has(1)
class BranchWithoutParameters(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.fft.fft(x).real)


@has(0)
class GatedMixture(Layers):
    """As recurrent cells keep their state: what both operands are made of first is the gate."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.a(x))
        return (1 - z) * torch.tanh(self.b(x)) + z * x


@has(0)
class MixedInTimeWithState(Layers):
    """What came before, long since, is one of the two as it was."""

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for layer in self.several:
            x = torch.relu(layer(x))
        shifted = x.roll(1, 1)
        shifted[:, 0] = state[:, 0]
        return self.a(x * self.scale + shifted * (1 - self.scale))


@has(1)
class SideInput(Layers):
    """The branch takes what the stream was made of, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.b(self.a(torch.relu(self.several[0](y))) + x.mean(1, keepdim=True))


# Loops


@has(1)
class BranchOfListedModules(Layers):
    """Some of which have no parameters."""

    def setup(self) -> None:
        self.chain = nn.ModuleList([nn.Linear(8, 8), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.chain[:2]:
            y = layer(y)
        return x + y


@has(1)
class ShortcutOfNoModules(Layers):
    def setup(self) -> None:
        self.projections = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        for projection in self.projections:
            x = projection(x)
        return x + self.b(y)


@has(0)
class Cell(Layers):
    """Adds what it makes of the input and of its state, which it has made of the input before."""

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x)
        for _ in range(2):
            gate = torch.sigmoid(self.a(x) + self.b(h))
            c = gate * c + (1 - gate) * torch.tanh(self.several[0](x) + self.several[1](h))
            h = torch.tanh(c)
        return h


@pytest.mark.parametrize("style", FOUND, ids=lambda style: style.__name__)
def test_residual_additions_are_found_and_no_others(style: type[Layers]) -> None:
    expected = outcome(net(style))
    model = net(style)
    report = gradprobe.instrument(model)
    assert (len(report.junctions), report.unseen) == (FOUND[style], {})
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True))


@pytest.mark.parametrize("style", UNSEEN, ids=lambda style: style.__name__)
def test_what_is_not_seen_is_reported(style: type[Layers]) -> None:
    expected = outcome(net(style))
    model = net(style)
    report = gradprobe.instrument(model)
    assert (report.junctions, report.unseen) == ((), {"": UNSEEN[style]})
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True))
