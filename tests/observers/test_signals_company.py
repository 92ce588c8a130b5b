"""Activations and residual adds beside other hooks, modes, threads and unusual gradients: no number is wrong."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from helpers.modes import SeesOperators
from helpers.signal_cases import net
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe.nn import ResidualAdd

pytestmark = pytest.mark.usefixtures("any_rows")


@pytest.mark.parametrize("earlier", [False, True], ids=["", "after another"])
def test_a_hook_registered_later_changes_no_number(earlier: bool) -> None:
    def numbers(factor: float) -> tuple[float, float]:
        stem, block = net()
        with gradprobe.attach(nn.Sequential(stem, block), activations=["0"]) as probe:
            h = stem(torch.ones(2, 3))
            if earlier:
                h.register_hook(lambda gradient: None)
            y = block(h)
            h.register_hook(lambda gradient: factor * gradient)
            y.sum().backward()
            probe.step()
            snapshot = probe.latest()
        return snapshot.activations["0"].gradient.norm, snapshot.junctions["1.join"].branch.norm

    assert numbers(100.0) == numbers(1.0)


def test_a_checkpointed_forward_under_a_dispatch_mode() -> None:
    model = net()
    with gradprobe.attach(model, activations=["1.branch"]) as probe:
        with SeesOperators():
            loss = checkpoint(model, torch.ones(2, 3), use_reentrant=False).sum()
        loss.backward()
        probe.step()
    assert probe.latest().activations["1.branch"].output.numel == 8
    assert probe.latest().junctions["1.join"].y.numel == 8


class ReturnsInput(nn.Module):
    """Returns its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
def test_a_returned_input_has_its_gradient_counted_once(is_checkpointed: bool) -> None:
    stem, same = nn.Linear(3, 4), ReturnsInput()
    with gradprobe.attach(nn.Sequential(stem, same), activations=["1"]) as probe:
        h = stem(torch.ones(3, 3))
        for _ in range(3):
            y = checkpoint(lambda h: same(h) * 1, h, use_reentrant=False) if is_checkpointed else same(h)
            y.sum().backward(retain_graph=True)
            probe.step()
    for snapshot in probe.history():
        assert snapshot.activations["1"].gradient.numel == 12
        assert snapshot.activations["1"].gradient.norm == pytest.approx(math.sqrt(12))


def test_an_input_modified_in_place_has_both_gradients_counted() -> None:
    class Double(nn.Module):
        """Modifies its input in place."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    stem, double = nn.Linear(3, 4), Double()
    with gradprobe.attach(nn.Sequential(stem, double), activations=["1"]) as probe:
        double(double(stem(torch.ones(3, 3)))).sum().backward()
        probe.step()
    gradient = probe.latest().activations["1"].gradient
    assert (gradient.numel, gradient.norm) == (24, pytest.approx(math.sqrt(12 + 48)))


def test_batched_gradients_are_not_observed() -> None:
    model = net()
    with gradprobe.attach(model, activations=True):
        y = model(torch.ones(2, 3))
        expected = torch.autograd.grad(y, model[0].weight, torch.ones_like(y), retain_graph=True)[0]
        batched = torch.autograd.grad(y, model[0].weight, torch.ones(5, *y.shape), is_grads_batched=True)[0]
    assert torch.equal(batched, expected.expand(5, *expected.shape))


def test_a_gradient_that_is_a_negative_view() -> None:
    class Negated(torch.autograd.Function):
        """The identity, with a gradient that has torch's negative bit set."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return torch._neg_view(-gradient)

    model = net()
    with gradprobe.attach(model) as probe:
        Negated.apply(model(torch.ones(2, 3))).sum().backward()  # type: ignore[no-untyped-call]
        probe.step()
    assert probe.latest().junctions["1.join"].gradient.norm == pytest.approx(math.sqrt(8))
    assert probe.latest().junctions["1.join"].branch is not None


def test_one_graph_in_several_threads() -> None:
    class Chain(nn.Module):
        """Many small residual adds."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.joins = nn.ModuleList(ResidualAdd() for _ in range(40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * self.weight
            for join in self.joins:
                x = join(x, x.neg() / 2)
            return x

    model = Chain()
    gradprobe.attach(model)
    loss = model(torch.ones(2)).sum()
    expected = torch.autograd.grad(loss, model.weight, retain_graph=True)[0]
    gradients = []

    def work() -> None:
        gradients.extend(torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for _ in range(200))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gradients) == 600
    assert all(torch.equal(gradient, expected) for gradient in gradients)
