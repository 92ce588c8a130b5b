"""Modules have no probe hook on steps that are not measured, and other hooks are not affected."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo  # as torch's optimizers do: hooks are removed only then
from helpers.signal_cases import net
from torch import nn

import gradprobe

INPUTS = torch.ones(2, 3)


def step(model: nn.Module, probe: gradprobe.Probe) -> None:
    model(INPUTS).sum().backward()
    probe.step()


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def test_hooks_are_present_only_on_measured_steps() -> None:
    model = net(nn.ReLU())
    with gradprobe.attach(model, activations=True, every=3) as probe:
        seen = []
        for _ in range(7):
            seen.append(hooked(model))
            step(model, probe)
    leaves = ["0", "1.branch", "2"]
    assert seen == [leaves, [], [], leaves, [], [], leaves]
    assert [list(snapshot.activations) for snapshot in probe.history()] == 3 * [leaves]


def test_a_pause_removes_the_hooks_and_its_end_restores_them() -> None:
    model = net()
    with gradprobe.attach(model, activations=True) as probe:
        with probe.paused():
            assert hooked(model) == []
        assert hooked(model) == ["0", "1.branch"]


@pytest.mark.parametrize("before", [False, True], ids=["registered after attach", "registered before attach"])
def test_hooks_run_in_order_of_registration(before: bool) -> None:
    def norm(every: int) -> float:
        model = net()
        add = lambda: model[0].register_forward_hook(lambda module, inputs, output: 3 * output)  # noqa: E731
        if before:
            add()
        with gradprobe.attach(model, activations=["0"], every=every) as probe:
            step(model, probe)
            if not before:
                add()
            for _ in range(2):
                step(model, probe)
        assert probe.latest().step == 2
        return probe.latest().activations["0"].output.norm

    assert norm(every=2) == norm(every=1)


def test_a_users_hook_may_come_and_go() -> None:
    model = net()
    with gradprobe.attach(model, activations=True, every=2) as probe:
        step(model, probe)
        calls: list[int] = []
        handle = model[0].register_forward_hook(lambda *_: calls.append(probe._recorder.number))
        for _ in range(3):
            step(model, probe)
        handle.remove()
        step(model, probe)
        assert hooked(model) == []
    assert calls == [1, 2, 3]
    assert all("0" in snapshot.activations for snapshot in probe.history())
    assert len(probe.history()) == 3


def test_no_hook_is_left_after_detach_or_in_a_copy() -> None:
    model = net()
    probe = gradprobe.attach(model, activations=True, every=2)
    step(model, probe)
    clone = copy.deepcopy(model)
    probe.detach()
    for _ in range(3):
        model(INPUTS), clone(INPUTS)
    for module in (*model.modules(), *clone.modules()):
        assert not module._forward_hooks
    assert not any(module._forward_hooks_with_kwargs for module in model.modules())


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiled:
    """Dynamo compiles a module together with its hook, on any step."""

    @pytest.mark.parametrize("first", [0, 1], ids=["on a measured step", "on another"])
    @pytest.mark.parametrize("resets", [False, True], ids=["", "reset"])
    def test_compiles_once_with_its_hooks(self, first: int, resets: bool) -> None:
        model = net()
        with gradprobe.attach(model, activations=True, every=3) as probe:
            for _ in range(first):
                step(model, probe)
            if resets:
                torch._dynamo.reset()
            if resets and first == 1:
                step(model, probe)
            compiled = torch.compile(model, backend="aot_eager")
            for _ in range(6):
                step(compiled, probe)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert len(probe.history()) >= 2
        for snapshot in probe.history():
            assert list(snapshot.activations) == ["0", "1.branch"]
            assert all(activation.gradient is not None for activation in snapshot.activations.values())

    @pytest.mark.soak
    def test_dynamo_is_imported_only_when_a_model_is_compiled(self) -> None:
        script = """
            import sys, torch, gradprobe
            from torch import nn
            model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            def step(module):
                module(torch.ones(2, 3)).sum().backward()
                probe.step()
            probe = gradprobe.attach(model, activations=True, every=2)
            step(model)
            assert "torch._dynamo" not in sys.modules
            compiled = torch.compile(model, backend="aot_eager")
            for _ in range(4):
                step(compiled)  # the first of them is not measured
            for snapshot in probe.history():
                assert list(snapshot.activations) == ["0", "1"], snapshot.step
                assert all(activation.gradient is not None for activation in snapshot.activations.values())
            assert len(probe.history()) == 3
            assert all(module._forward_hooks for module in model)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
