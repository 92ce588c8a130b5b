"""Styles in which models write additions: which are residual, which are not, and which are only reported."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch as th
from torch import Tensor, add, nn
from torch.utils.checkpoint import checkpoint

import gradprobe

TOKENS = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8).sin()
FOUND: dict[type[Layers], int] = {}
UNSEEN: dict[type[Layers], str] = {}


class Layers(nn.Module):
    """The layers of which the styles are built."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.several = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.table = nn.Embedding(10, 8)
        self.setup()

    def setup(self) -> None:
        """Creates the additional layers of a style."""


def has(n_found: int) -> Callable[[type[Layers]], type[Layers]]:
    """Marks a class with the number of its residual additions, all of which are found."""
    return lambda style: (FOUND.update({style: n_found}), style)[1]


def is_unseen(reason: str) -> Callable[[type[Layers]], type[Layers]]:
    """Marks a class whose residual addition is left alone, for this reason."""
    return lambda style: (UNSEEN.update({style: reason}), style)[1]


def outcome(model: nn.Module) -> list[Tensor]:
    """Returns the output and the gradients of the parameters."""
    torch.manual_seed(1)
    y = model(TOKENS.clone())
    y.square().mean().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def net(style: type[Layers]) -> nn.Module:
    torch.manual_seed(0)
    return style()


# Where in a forward the additions are


@has(1)
class LoopOfPostNorm(Layers):
    """Every round adds to the normalised result of the previous round."""

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
    """The residual stream starts at an embedding inside the model."""

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
    """Splits heads: keys and queries come from one method, but not from one tensor."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.split(self.a(x)), self.split(self.b(x))
        return q.flatten(-2) + self.norm(k.flatten(-2))


# What lies between the operands and their common tensor


@has(0)
class Adapter(Layers):
    """A layer and a low-rank adapter: two branches without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 2 * self.norm(self.b(torch.dropout(x, 0.1, self.training)))


@has(0)
class Experts(Layers):
    """Two branches of different length, both with activations."""

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
    """Adds scores of content and position, as relative attention does."""

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
    """Both operands are weighted elementwise."""

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
    """Keeps state as recurrent cells do: the nearest tensor that both operands share is the gate."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.a(x))
        return (1 - z) * torch.tanh(self.b(x)) + z * x


@has(0)
class MixedInTimeWithState(Layers):
    """One operand contains a much earlier tensor unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for layer in self.several:
            x = torch.relu(layer(x))
        shifted = x.roll(1, 1)
        shifted[:, 0] = state[:, 0]
        return self.a(x * self.scale + shifted * (1 - self.scale))


@has(1)
class SideInput(Layers):
    """The branch also uses the tensor from which the stream was made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        f = self.a(torch.relu(self.several[0](y)))
        return y + self.b(torch.cat([f[..., :4], x[..., :4]], -1))


@has(2)
class GatesOfOneCondition(Layers):
    """One layer computes the scales, shifts and gates of the branches, as in diffusion transformers."""

    def setup(self) -> None:
        self.modulation = nn.Linear(8, 48)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(torch.tanh(x.mean(1, keepdim=True))).chunk(6, -1)
        x = x + gate * self.a(x * (1 + scale) + shift)
        return x + gate_2 * self.b(x * (1 + scale_2) + shift_2)


class ConditionedBlock(Layers):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.a(torch.relu(x)) + self.b(condition)
        return x + self.norm(h)


@has(3)
class HandsOnACondition(Layers):
    """Each block adds a function of the condition, as the previous blocks did."""

    def setup(self) -> None:
        self.blocks = nn.ModuleList(ConditionedBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        condition = self.table((x > 0).long().sum(-1))
        x = self.blocks[0](x, condition)
        x = self.blocks[1](x, condition)
        return self.blocks[2](x, condition)


class Processor:
    """Runs a module but is not a module itself."""

    def __call__(self, block: Layers, x: Tensor) -> Tensor:
        return x + block.a(x)


@has(1)
class ProcessedByAnObject(Layers):
    def setup(self) -> None:
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


@has(1)
class PositionsByConvolution(Layers):
    """Positions as in speech models: computed from the tensor to which they are added."""

    def setup(self) -> None:
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        position_embeddings = self.conv(x.mT).mT
        return self.norm(x + position_embeddings)


# Loops


@has(1)
class BranchOfListedModules(Layers):
    """Some of the modules have no parameters."""

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
    """Adds functions of the input and of a state computed from earlier inputs."""

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x)
        for _ in range(2):
            gate = torch.sigmoid(self.a(x) + self.b(h))
            c = gate * c + (1 - gate) * torch.tanh(self.several[0](x) + self.several[1](h))
            h = torch.tanh(c)
        return h


# What names refer to


@has(1)
class TorchByAnotherName(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return th.add(x, self.a(x))


@has(2)
class ImportedFunctions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = add(x, self.a(x))
        return operator.add(self.b(x), x)


@has(1)
class StaticMethodBefore(Layers):
    """The result of a static method is still the residual stream."""

    @staticmethod
    def flat(x: Tensor) -> Tensor:
        return x.reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return x + self.a(x)


@has(2)
class Properties(Layers):
    @property
    def layer(self) -> nn.Module:
        return self.a

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(x)
        x = x + self.layer(x)
        return x + self.activation(self.layer(x))


@has(1)
class PlainList(Layers):
    """The list holds modules that are registered elsewhere."""

    def setup(self) -> None:
        self.chain = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.chain:
            x = x + layer(x)
        return x


@has(1)
class DictionaryOfModules(Layers):
    def setup(self) -> None:
        self.named = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.named.items():  # noqa: PERF102
            x = x + layer(x)
        return x


@has(2)
class OpaqueCalls(Layers):
    """The calls may contain layers, as a branch does."""

    def setup(self) -> None:
        self.branch = functools.partial(lambda layer, x: layer(x), self.a)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.branch(x))
        name = "".join(["b"])
        return x + getattr(self, name)(x)


class Sublayer(nn.Module):
    """Adds its input and a function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return self.norm(x + sublayer(x))


@has(2)
class HandsOnFunctions(Layers):
    def setup(self) -> None:
        self.joints = nn.ModuleList([Sublayer(), Sublayer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.joints[0](x, lambda y: self.a(y))
        return self.joints[1](x, self.b)


@has(1)
class InnerFunction(Layers):
    """Checkpoints a block the way mmcv does."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x
            out = self.a(x)
            out += identity
            return out

        x = x * 1.0
        return checkpoint(inner, x, use_reentrant=False) if x.requires_grad else inner(x)


@has(2)
class InnerBranches(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def branch(y: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(y)))

        x = x + branch(x)
        return (lambda y: y + self.a(y))(x)


@has(1)
class Generator(Layers):
    def layers(self) -> Iterator[nn.Module]:
        yield self.a
        yield self.b

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = x + layer(x)
        return x


@has(1)
class KeepsItsInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return self.a(x) + self.kept


class OtherMethod(Layers):
    def join(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@has(1)
class CallsAnotherMethodOfAChild(Layers):
    def setup(self) -> None:
        self.block = OtherMethod()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.join(x)


@has(2)
class StarredArguments(Layers):
    def branch(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return self.a(inputs[0]) + self.b(options["x"])

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] + self.branch(*inputs, x=inputs[0])
        return x + apply_chunked(self.b, 1, x)


def apply_chunked(function: Callable[..., Tensor], size: int, *inputs: Tensor) -> Tensor:
    return function(*inputs)


@has(1)
class ModuleOnTheWay(Layers):
    def forward(self, x: Tensor) -> Tensor:
        branch = nn.Sequential(self.a, self.b)
        return x + branch(x)


# Additions that are not sums of tensors, or do not run


@has(0)
class Outputs(Layers):
    """Adds tuples of outputs."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)

    def forward(self, x: Tensor, as_tuples: bool = True) -> Any:
        first = self.table((x > 0).long().sum(-1))
        outputs = (x, first) if as_tuples else (x,)
        more = self.both(self.b(first))
        outputs = outputs + more[1:]
        rest = self.several[0](more[0]), *self.both(more[1])
        attentions = more[1:]
        attentions = attentions + rest[1:]
        return sum(attentions, outputs[-1] * 0) + outputs[-1] * 0


@has(0)
class ClassesOfOutputs(Layers):
    def setup(self) -> None:
        self.encoder, self.decoder = Encoder(), Encoder()

    def forward(self, x: Tensor, as_tuples: bool = False) -> Any:
        encoded = self.encoder(x)
        decoded = self.decoder(encoded.last)
        if as_tuples:
            return decoded + encoded
        return decoded.last


class Encoded(NamedTuple):
    last: Tensor


class Encoder(Layers):
    def forward(self, x: Tensor) -> Encoded:
        return Encoded(self.a(x))


@has(0)
class DecidedByTheConfiguration(Layers):
    def setup(self) -> None:
        self.config = SimpleNamespace(is_parallel=False, kind="post", n_adapters=0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(torch.relu(y))
        if self.config.is_parallel or self.config.kind in ("pre", "both") or self.config.n_adapters > 0:
            z += y
        if hasattr(self, "adapter"):
            z = z + self.adapter(z)
        return z


@has(1)
class DecidedByItself(Layers):
    """An attribute that the method sets does not decide its conditions."""

    state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = self.b(x)
        y = self.norm(x)
        if self.state is not None:
            y = y + self.a(y)
        return y


@has(1)
class DecidedByAProperty(Layers):
    """The property must not run before the model does."""

    @property
    def residual(self) -> bool:
        assert torch.is_grad_enabled(), "only a forward may ask"
        return True

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + y if hasattr(self, "residual") and self.residual else y


@has(0)
class Losses(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        loss = self.b(y).square().mean()
        return loss + 0.1 * y.square().mean()


# Additions that are only reported


@is_unseen("adds by add in a form that cannot be replaced")
class Factor(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x), alpha=2)


@is_unseen("adds by add_ in a form that cannot be replaced")
class FactorInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).add_(x, alpha=2)


@is_unseen("adds by add in a form that cannot be replaced")
class Keyword(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(other=self.a(x))


@is_unseen("adds by sum in a form that cannot be replaced")
class Sum(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.a(x)])  # type: ignore[return-value]


@is_unseen("adds by addcmul in a form that cannot be replaced")
class ScaledBranch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.scale, self.a(x))


@is_unseen("adds in place to a slice or an attribute")
class Part(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:] += self.a(x[:, 1:].clone())
        return x


@is_unseen("adds in place to a slice or an attribute")
class Attribute(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.b(x)
        self.kept += x
        return self.kept


class Added(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


@has(1)
class AddsInItsParent(Added):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@has(1)
class AddsInAnotherClass(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * Added.forward(self, x)  # type: ignore[arg-type]


def traced_by_nothing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(self: nn.Module, *args: Tensor) -> Tensor:
        return function(self, *args)

    return wrapper


@has(1)
class BehindADecorator(Layers):
    @traced_by_nothing
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


@has(1)
class FunctionOfAPackage(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return functions.dropout_add(self.a(x), x)


class functions:
    """Stands in for a package."""

    @staticmethod
    def dropout_add(out: Tensor, residual: Tensor) -> Tensor:
        return residual + out


def twice_added(out: Tensor, residual: Tensor) -> Tensor:
    """Adds twice, once in a function of its own."""
    y = functions.dropout_add(out, residual)
    return y + out.tanh().matmul(torch.eye(8))


@has(4)
class FunctionThatIsCalledTwice(Layers):
    """Each call has residual adds of its own, in a chain of functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = twice_added(self.a(x), x)
        return twice_added(self.b(x), x)


@is_unseen("adds in functions.dropout_add, a function outside the module")
class FunctionCalledByTorch(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(functions.dropout_add, self.a(x), x, use_reentrant=False)  # type: ignore[no-any-return]


def hidden(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    held = [function]

    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Tensor) -> Tensor:
        return held[0](self, *args)

    return wrapper


@has(1)
class MethodOutOfReach(Layers):
    @hidden
    def join(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x)


@has(0)
class InputsBesideTheStream(Layers):
    """Positions under another name, and a number from the options."""

    def forward(self, x: Tensor, point_embedding: Tensor | float = 0.0, **options: Any) -> Tensor:
        return self.a(x + point_embedding) + options.get("scale", 0.0)


@pytest.mark.parametrize("style", FOUND, ids=lambda style: style.__name__)
def test_residual_additions_are_found_and_no_others(style: type[Layers]) -> None:
    expected = outcome(net(style))
    model = net(style)
    with torch.no_grad():
        report = gradprobe.instrument(model, TOKENS)
    assert (len(report.junctions), report.unseen) == (FOUND[style], {})
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True))


@pytest.mark.parametrize("style", UNSEEN, ids=lambda style: style.__name__)
def test_an_unseen_residual_addition_is_reported(style: type[Layers]) -> None:
    expected = outcome(net(style))
    model = net(style)
    report = gradprobe.instrument(model, TOKENS)
    assert (report.junctions, report.unseen) == ((), {"": UNSEEN[style]})
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True))
