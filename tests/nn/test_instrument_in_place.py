"""Additions that a model writes in place stay in place and are measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import helpers.inline_in_place_cases as cases
import pytest
import torch
from helpers.inline_cases import OneLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe.nn.residual import InlineAdd

pytestmark = pytest.mark.usefixtures("any_hooks")

TOKENS = torch.linspace(-2, 2, 4 * 5 * 8).reshape(4, 5, 8).sin()
ALIASES = [case for name, case in inspect.getmembers(cases, inspect.isclass) if name.startswith("InPlace")]


def outcome(model: nn.Module) -> list[torch.Tensor]:
    """Returns the output and the gradients of the parameters."""
    y = model(TOKENS.clone())
    y.square().mean().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


def net(block: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), block(8), nn.Linear(8, 1))


@pytest.mark.parametrize("case", ALIASES)
def test_other_references_to_the_target_see_the_sum(case: type[OneLayer]) -> None:
    expected = outcome(net(case))
    model = net(case)
    assert gradprobe.instrument(model, TOKENS).junctions == ("1.layer+",)
    probe = gradprobe.attach(model)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True))
    probe.step()
    assert probe.latest().junctions["1.layer+"].y.numel == TOKENS.numel()


class Joined(nn.Module):
    """y = x + F(x), written in place on either side."""

    def __init__(self, written: str, shortcut_first: bool) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
        self.join = InlineAdd(shortcut_first, written)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        return self.join(x=stem, f=self.branch(stem * 1)).relu_()


@pytest.mark.parametrize("shortcut_first", [False, True], ids=["branch-first", "shortcut-first"])
@pytest.mark.parametrize("of_views", [False, True], ids=["", "views"])  # as linear layers return for 3 dimensions
@pytest.mark.parametrize(
    ("how", "written"),
    [
        ("eager", "+="),
        ("eager", "add_"),
        ("checkpointed", "+="),
        ("checkpointed", "add_"),
        ("compiled", "+="),
        pytest.param("compiled", "add_", marks=pytest.mark.soak),
    ],
)
def test_it_is_measured_like_an_addition_that_creates_a_new_tensor(
    how: str, of_views: bool, written: str, shortcut_first: bool
) -> None:
    batch = TOKENS if of_views else TOKENS.view(20, 8)

    def junction(written: str) -> gradprobe.snapshot.signals.Junction:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Joined(written, shortcut_first)
        probe = gradprobe.attach(model)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
        y = checkpoint(forward, batch, use_reentrant=False) if how == "checkpointed" else forward(batch)
        y.square().sum().backward()
        probe.step()
        return probe.latest().junctions["join"]

    seen, expected = junction(written), junction("+")
    for part in ("x", "f", "y", "gradient", "shortcut", "branch"):
        of_seen, of_expected = getattr(seen, part), getattr(expected, part)
        assert (of_seen.numel, of_expected.numel) == (TOKENS.numel(), TOKENS.numel())
        assert of_seen.norm == pytest.approx(of_expected.norm, rel=1e-6), part
    assert seen.cosine == pytest.approx(expected.cosine, rel=1e-6)


def test_a_compiled_model_keeps_its_numbers() -> None:
    torch._dynamo.reset()
    expected = outcome(net(cases.InPlaceRead))
    model = net(cases.InPlaceRead)
    gradprobe.instrument(model, TOKENS)
    gradprobe.attach(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outcome(compiled), expected, strict=True))


def test_torchs_own_errors_stay() -> None:
    joint = InlineAdd(shortcut_first=True, written="+=")
    gradprobe.attach(nn.Sequential(nn.Linear(1, 1), joint))
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        joint(x=leaf, f=torch.ones(2))
    squashed = leaf.sigmoid()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        joint(x=squashed, f=torch.ones(2)).sum().backward()


@pytest.mark.parametrize("shortcut_first", [False, True], ids=["branch-first", "shortcut-first"])
def test_the_result_keeps_the_dtype_of_the_target(shortcut_first: bool) -> None:
    joint = InlineAdd(shortcut_first, "+=")
    model = nn.Sequential(nn.Linear(1, 1), joint)
    probe = gradprobe.attach(model)
    wide, narrow = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).bfloat16().requires_grad_()
    expected = (narrow + wide).bfloat16()
    target, addend = narrow * 1, wide * 1
    x, f = (target, addend) if shortcut_first else (addend, target)
    assert joint(x=x, f=f) is target
    assert torch.equal(target, expected)
    (target.sum() + model[0].weight.sum()).backward()
    probe.step()
    assert probe.latest().junctions["1"].gradient.norm == pytest.approx(12**0.5)
