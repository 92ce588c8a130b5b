"""Taps in C++: they are the ones that run, and they leave alone what is not plain."""

from __future__ import annotations

import pytest
import torch
from signal_cases import Unchanged
from torch import nn

import gradprobe
from gradprobe import hooks
from gradprobe.board import Board
from gradprobe.nn import ResidualAdd
from gradprobe.signals import Activation, Junction

pytestmark = pytest.mark.skipif(hooks.native_hooks()[0] is None, reason=f"C++ hooks: {hooks.native_hooks()[1]}")


class Block(nn.Module):
    """y = max(x + F(x), 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)
        self.join = ResidualAdd(relu=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, self.branch(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Block(), Block())


def backward(model: nn.Module, outside: bool = True) -> None:
    loss = model(torch.arange(12.0).view(3, 4)).square().sum()
    if outside:
        loss.backward()
    else:
        with Unchanged():
            loss.backward()


def numbers(probe: gradprobe.Probe) -> tuple[list[Activation], list[Junction]]:
    probe.step()
    snapshot = probe.latest()
    assert snapshot is not None
    return list(snapshot.activations.values()), list(snapshot.junctions.values())


def test_nothing_of_plain_training_passes_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    with gradprobe.attach(model, activations=True) as probe:
        for name in ("write", "write_anew", "put", "put_apart"):
            monkeypatch.setattr(Board, name, lambda *arguments: pytest.fail("Python took a tensor that passed by"))
        backward(model)
        activations, junctions = numbers(probe)
    assert len(activations) == 3
    assert all(one.branch is not None for one in junctions)


def test_the_same_numbers_where_a_mode_watches_the_backward() -> None:
    seen = []
    for outside in (True, False):
        model = net()
        with gradprobe.attach(model, activations=True) as probe:
            backward(model, outside)
            seen.append(numbers(probe))
    assert seen[0] == seen[1]
    assert seen[0][1][-1].gradient is not None


@pytest.mark.parametrize("observed", [False, True], ids=["bare", "observed"])
def test_compiled_autograd_goes_through_junctions(observed: bool) -> None:
    expected, model = net(), net()
    backward(expected)
    if observed:
        gradprobe.attach(model, activations=True)
    loss = model(torch.arange(12.0).view(3, 4)).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_a_second_backward_through_a_junction_needs_the_graph() -> None:
    loss = net()(torch.ones(3, 4)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_graph_may_outlive_the_probe() -> None:
    model = net()
    probe = gradprobe.attach(model, activations=True)
    loss = model(torch.ones(3, 4)).sum()
    probe.detach()
    del probe
    loss.backward()
    expected = net()
    expected(torch.ones(3, 4)).sum().backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_profiled_by_name() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(net())
    names = [event.key for event in profile.key_averages()]
    assert "gradprobe::residual_add" in names
    assert any("ResidualAddBackward" in name for name in names)
