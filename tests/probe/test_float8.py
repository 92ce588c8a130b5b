"""Models with tensors of float8: activations between modules, and parameters that an optimizer of one's own steps."""

from __future__ import annotations

import pytest
import torch
from helpers.ops_truth import truth
from helpers.probe_cases import sgd
from torch import nn

import gradprobe
from gradprobe.snapshot import SiteStats

pytestmark = [
    pytest.mark.usefixtures("probe_warnings_are_errors"),
    pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str),
]


class To(nn.Module):
    """Returns its input in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


def assert_are_those_of(stats: SiteStats, tensor: torch.Tensor) -> None:
    expected = truth(tensor)
    assert stats.norm == pytest.approx(expected.norm, rel=1e-6)
    assert stats.abs_mean * tensor.numel() == pytest.approx(expected.sum_abs, rel=1e-6)
    assert (stats.abs_max, stats.nonfinite, stats.numel) == (expected.abs_max, 0, tensor.numel())
    assert stats.zero_fraction == expected.n_zero / tensor.numel()


def test_activations_and_their_gradients_are_measured(dtype: torch.dtype, any_hooks: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), To(dtype), To(torch.float32), nn.Linear(5, 3), nn.ReLU())
    seen: list[torch.Tensor] = []
    with gradprobe.attach(model, activations=True, strict=True) as probe:
        activation = model[1](model[0](torch.randn(7, 6)))
        activation.register_hook(seen.append)
        model[2:](activation).square().sum().backward()
        probe.step()
        assert probe.coverage().unmeasured == ()
    observed = probe.latest().activations["1"]
    (gradient,) = seen
    assert gradient.dtype == dtype
    assert_are_those_of(observed.output, activation)
    assert_are_those_of(observed.gradient, gradient)
    assert probe.latest().signals.events.smallest_normal[2] == torch.finfo(dtype).smallest_normal


class Float8Weight(nn.Module):
    """A linear layer with a weight of float8 and a bias of float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6).to(dtype))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


class Descent(torch.optim.Optimizer):
    """Gradient descent that computes in float32, since torch cannot add float8."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(parameter.float() - 0.5 * parameter.grad.float())


def test_gradients_updates_and_magnitudes_of_parameters_are_measured(dtype: torch.dtype, any_hooks: str) -> None:
    torch.manual_seed(0)
    model = Float8Weight(dtype)
    optimizer = Descent(model)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, magnitudes=True, magnitudes_every=1) as probe:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            before = model.weight.detach().float()
            optimizer.step()
    snapshot = probe.latest()
    assert model.weight.grad.dtype == dtype
    assert_are_those_of(snapshot["weight"], model.weight.grad)
    change = model.weight.detach().float() - before
    assert change.any()
    assert snapshot.updates["weight"].update.norm == pytest.approx(truth(change).norm, rel=1e-6)
    assert snapshot.magnitudes["weight"].abs_max == truth(model.weight.grad).abs_max
    assert probe.coverage().unmeasured == ()


def test_clipping_rounds_the_gradient_once(dtype: torch.dtype, any_hooks: str) -> None:
    torch.manual_seed(0)
    model = Float8Weight(dtype)
    with gradprobe.attach(model, strict=True) as probe:
        model(torch.randn(5, 6)).square().mean().backward()
        before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        total = probe.clip_grad_norm_(0.5)
        probe.step()
    factor = float(0.5 / (total.double() + 1e-6))
    assert total.item() == pytest.approx(sum(truth(one).norm ** 2 for one in before.values()) ** 0.5, rel=1e-6)
    for name, parameter in model.named_parameters():
        expected = (before[name].float() * torch.tensor(factor)).to(parameter.dtype)
        torch.testing.assert_close(parameter.grad.float(), expected.float(), rtol=1e-6, atol=0)


def test_an_optimizer_of_torch_fails_as_without_a_probe(dtype: torch.dtype) -> None:
    model = Float8Weight(dtype)
    optimizer = sgd(model)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, strict=True):
        model(torch.randn(5, 6)).square().mean().backward()
        with pytest.raises(NotImplementedError, match="not implemented for 'Float8"):
            optimizer.step()
