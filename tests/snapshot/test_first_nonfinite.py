"""The first tensor and step with NaN or infinity."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.signal_cases import build, train
from torch import nn

import gradprobe

pytestmark = pytest.mark.usefixtures("any_hooks")


class TestFirstNonfinite:
    """The first tensor and step with NaN or infinity."""

    @staticmethod
    def net() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())))
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    @staticmethod
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
        for _ in range(n_steps):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()

    @pytest.mark.parametrize(("layer", "at_step"), [(1, 0), (4, 2), (7, 3)])
    @pytest.mark.parametrize("capacity", [1, 64])
    def test_planted_in_a_backward(self, layer: int, at_step: int, capacity: int) -> None:
        class Poison(torch.autograd.Function):
            """The identity, with one NaN in its gradient at a chosen step."""

            @staticmethod
            def forward(ctx, x, step):  # type: ignore[no-untyped-def]
                ctx.step = step
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):  # type: ignore[no-untyped-def]
                poisoned = gradient.clone()
                if ctx.step == at_step:
                    poisoned[0, 0] = math.nan
                return poisoned, None

        model, optimizer = self.net()
        counter = iter(range(100))
        model[layer].register_forward_pre_hook(lambda module, args: (Poison.apply(args[0], next(counter)),))
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True, capacity=capacity)
        self.run(model, optimizer, 6)
        first = probe.first_nonfinite()
        assert (first.step, first.phase, first.module) == (at_step, "backward", str(layer))
        assert (first.site, first.kind, first.nonfinite) == (str(layer - 1), "activation_grad", 1)

    def test_planted_in_a_forward(self) -> None:
        model, optimizer = self.net()
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        self.run(model, optimizer, 2)
        assert probe.first_nonfinite() is None
        with torch.no_grad():
            model[4].bias[3] = math.inf
        self.run(model, optimizer, 2)
        first = probe.first_nonfinite()
        assert (first.step, first.phase, first.module, first.nonfinite) == (2, "forward", "4", 2)
        assert str(first) == "step 2, forward: 2 of 12 values are not finite in the output of '4'"

    def test_parameters_alone(self) -> None:
        model, optimizer = self.net()
        probe = gradprobe.attach(model, optimizer=optimizer)
        model[2].weight.register_hook(lambda gradient: gradient * math.nan)
        self.run(model, optimizer, 1)
        first = probe.first_nonfinite()
        assert (first.step, first.site, first.module, first.kind) == (0, "2.weight", "2", "parameter")

    def test_no_synchronisation(self) -> None:
        class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
            """Rejects operators that make the host wait for a device."""

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                assert function is not torch.ops.aten._local_scalar_dense.default
                return function(*args, **(kwargs or {}))

        model, optimizer = build("resnet")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(model, optimizer, 1)
        with Refuse():
            train(model, optimizer, 2)
        assert probe.latest().step == 2
