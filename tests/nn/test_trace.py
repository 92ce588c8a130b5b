"""Residual additions found by running a forward: what the source does not show, and what the run leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.inline_cases import OverChildren, TimmBlock
from torch import Tensor, nn
from torch.nn.modules import module as torchs_module

import gradprobe
from gradprobe.nn.trace import trace

TOKENS = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8).sin()


def found_in(model: nn.Module, *example: Tensor) -> list[str]:
    """Names the modules of a model that add residually, once for each place."""
    names = {module: name for name, module in model.named_modules()}
    found = trace(model, example, {}).additions
    return sorted(names[module] for module, places in found.items() for _ in places)


class Block(nn.Module):
    """A residual block with everything that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.n_calls = 0
        self.cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        noise = random.random() + np.random.random()  # noqa: NPY002, the global generator
        f = self.dropout(self.norm(self.layer(x)).relu()) * (1 + 0 * noise)
        self.cached = f
        return x + f


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 2))


def test_the_forward_leaves_nothing_behind() -> None:
    model = net()
    model[0].layer.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    attributes = [{name: id(value) for name, value in vars(one).items()} for one in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert found_in(model, TOKENS) == ["0", "1"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert [{name: id(value) for name, value in vars(one).items()} for one in model.modules()] == attributes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torchs_module._global_forward_hooks
    assert not torchs_module._global_forward_pre_hooks
    assert torch.overrides._len_torch_function_stack() == 0


def frozen(model: nn.Sequential) -> None:
    model[:2].requires_grad_(False)


def in_eval(model: nn.Sequential) -> None:
    model.eval()


def without_gradients(model: nn.Sequential) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [frozen, in_eval, without_gradients])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_frozen_layers_and_no_grad_hide_nothing(change: Callable[[nn.Sequential], None], grad: bool) -> None:
    model = net()
    change(model)
    with torch.set_grad_enabled(grad):
        assert gradprobe.instrument(model, TOKENS).junctions == ("0.norm+", "1.norm+")


class Teacher(Block):
    """Calls a frozen module without gradients, beside its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return super().forward(x) + 0 * target.sum()


def test_a_part_without_gradients_hides_nothing_else() -> None:
    report = gradprobe.instrument(nn.Sequential(Teacher(), Block()), TOKENS)
    assert (report.junctions, report.unseen) == (("0.norm+", "1.norm+"), {})


class LowRank(nn.Module):
    """A layer with a trained low-rank part beside it, as in LoRA: no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


def test_low_rank_adapters_are_no_shortcuts() -> None:
    model = net()
    model[0].layer = model[1].layer = LowRank()
    assert found_in(model, TOKENS) == ["0", "1"]


class Positions(nn.Module):
    """Learned positions on a grid that is computed anew, as in XCiT: added to the tokens, but no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(1, 8)
        self.embed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + self.positions(torch.arange(5.0).view(5, 1)).expand(2, 5, 8)


class Merge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_low, self.of_high = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.of_low(low) + self.of_high(high)


class Pyramid(nn.Module):
    """Merges features of two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.merge = nn.Linear(8, 8), nn.Linear(8, 8), Merge()

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x).relu()
        merged: Tensor = self.merge(low, self.high(low).relu())
        return merged


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x.flip(1))) / 2


class Logits(nn.Module):
    """Adds two numbers for each edge, as attention over a graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.of_left, self.of_right = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.of_left(self.layer(x).relu()).flatten()
        return (left + self.of_right(x).flatten()).softmax(0)


class Scan(nn.Module):
    """A state-space scan: the state is decayed and gets the input of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.gate, self.layer = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        decay, new = torch.exp(self.decay * self.gate(x)), self.gate(x) * self.layer(x)
        state = torch.zeros(2, 8)
        for k in range(5):
            state = decay[:, k] * state + new[:, k]
        return state


@pytest.mark.parametrize("kind", [Positions, Pyramid, TwoHeads, Scan, Logits])
def test_other_additions_are_not_residual(kind: type[nn.Module]) -> None:
    report = gradprobe.instrument(kind(), TOKENS)
    assert (report.junctions, report.unseen) == ((), {})


class Queries(nn.Module):
    """The stream starts at learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.ones(1, 3, 8))
        self.layer, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.queries.expand(len(x), 3, 8)
        y = y + self.layer(y).relu()
        return y + self.attention(y, x, x)[0]


def test_a_stream_may_start_at_a_parameter() -> None:
    assert found_in(Queries(), TOKENS) == ["", ""]


class ClassToken(nn.Module):
    """Changes the first token alone, and adds all of them, as XCiT's class block does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.layer(x[:, :1]), x[:, 1:]], dim=1)
        return x + 0.5 * y


def test_a_branch_may_change_a_part_of_the_stream() -> None:
    assert gradprobe.instrument(ClassToken(), TOKENS).junctions == ("layer+",)


class Skipped(nn.Module):
    """Leaves its block out while it trains, as stochastic depth does now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.block(x)


def test_what_training_leaves_out_is_found() -> None:
    assert found_in(Skipped(), TOKENS) == ["block"]


def test_the_traced_model_trains_as_before() -> None:
    def trained(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        for _ in range(3):
            model(TOKENS).square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model = net()
    report = gradprobe.instrument(model, TOKENS)
    with gradprobe.attach(model) as probe:
        gradients = trained(model)
        probe.step()
    assert set(probe.latest().junctions) == set(report.junctions)
    assert all(torch.equal(a, b) for a, b in zip(gradients, trained(net()), strict=True))


def test_a_forward_that_raises_changes_nothing() -> None:
    model = net()
    attributes = [{name: id(value) for name, value in vars(one).items()} for one in model.modules()]
    with pytest.raises(gradprobe.ArgumentError, match=r"^example: needed arguments .*; it raised RuntimeError: "):
        gradprobe.instrument(model, torch.ones(2, 3))
    assert [{name: id(value) for name, value in vars(one).items()} for one in model.modules()] == attributes
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_model_that_runs_its_children_one_by_one_gets_no_new_one() -> None:
    report = gradprobe.instrument(nn.Sequential(OverChildren(8), TimmBlock(8)), TOKENS)
    assert report.unseen == {"0": "iterates over its children in forward, which would run one more child too"}
    assert {name.split(".")[0] for name in report.junctions} == {"1"}


class LooksForParameters(nn.Module):
    """Iterates over parameters and children of its block, as models do that want to know a dtype or put hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        kinds = {one.dtype for one in self.block.parameters()} | {type(one) for one in self.block.children()}
        assert kinds
        y: Tensor = self.block(x)
        return y


def test_a_look_at_parameters_and_children_is_no_obstacle() -> None:
    report = gradprobe.instrument(LooksForParameters(), TOKENS)
    assert (report.junctions, report.unseen) == (("block.norm+",), {})


def test_keyword_arguments_are_passed_on() -> None:
    model = nn.TransformerDecoderLayer(8, 2, batch_first=True)
    assert len(gradprobe.instrument(model, TOKENS, memory=TOKENS.flip(1)).junctions) == 3
