"""C++ hooks on activations and residual adds: plain training runs through them alone."""

from __future__ import annotations

import pytest
import torch
from helpers.modes import SeesOperators
from helpers.signal_cases import Block
from torch import nn

import gradprobe
from gradprobe.observers.signal_buffer import SignalBuffer
from gradprobe.ops.libraries import native_hooks
from gradprobe.snapshot.signals import Activation, Junction

pytestmark = pytest.mark.skipif(native_hooks()[0] is None, reason=f"C++ hooks: {native_hooks()[1]}")


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Block(), Block())


def backward(model: nn.Module, outside: bool = True) -> None:
    loss = model(torch.arange(12.0).view(3, 4)).square().sum()
    if outside:
        loss.backward()
    else:
        with SeesOperators():
            loss.backward()


def numbers(probe: gradprobe.Probe) -> tuple[list[Activation], list[Junction]]:
    probe.step()
    snapshot = probe.latest()
    assert snapshot is not None
    return list(snapshot.activations.values()), list(snapshot.junctions.values())


def test_plain_training_writes_no_row_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_blocks()
    with gradprobe.attach(model, activations=True) as probe:
        for name in ("write", "write_uncached", "put", "put_untracked"):
            monkeypatch.setattr(SignalBuffer, name, lambda *arguments: pytest.fail("a row was written from Python"))
        backward(model)
        activations, junctions = numbers(probe)
    assert len(activations) == 3
    assert all(one.branch is not None for one in junctions)


def test_the_same_numbers_when_a_mode_wraps_the_backward() -> None:
    seen = []
    for outside in (True, False):
        model = two_blocks()
        with gradprobe.attach(model, activations=True) as probe:
            backward(model, outside)
            seen.append(numbers(probe))
    assert seen[0] == seen[1]
    assert seen[0][1][-1].gradient is not None


@pytest.mark.parametrize("observed", [False, True], ids=["bare", "observed"])
def test_compiled_autograd_through_residual_adds(observed: bool) -> None:
    expected, model = two_blocks(), two_blocks()
    backward(expected)
    if observed:
        gradprobe.attach(model, activations=True)
    loss = model(torch.arange(12.0).view(3, 4)).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_a_second_backward_through_a_residual_add_needs_the_graph() -> None:
    loss = two_blocks()(torch.ones(3, 4)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_graph_may_outlive_the_probe() -> None:
    model = two_blocks()
    probe = gradprobe.attach(model, activations=True)
    loss = model(torch.ones(3, 4)).sum()
    probe.detach()
    del probe
    loss.backward()
    expected = two_blocks()
    expected(torch.ones(3, 4)).sum().backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_a_profile_names_the_operators() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(two_blocks())
    names = [event.key for event in profile.key_averages()]
    assert "gradprobe::residual_add" in names
    assert any("ResidualAddBackward" in name for name in names)
