"""Activations and residual adds in unusual training: nothing breaks, nothing changes, no number is wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.signal_cases import Block, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe.nn import ResidualAdd
from gradprobe.observers import event_rows
from gradprobe.observers.signal_buffer import SignalBuffer

pytestmark = pytest.mark.usefixtures("any_rows")


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_residual_add(use_reentrant: bool) -> None:
    def weights(probed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True) if probed else None
        for seed in range(3):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            hidden = checkpoint(model[1:3], model[0](x), use_reentrant=use_reentrant)
            model[3](hidden).square().sum().backward()
            optimizer.step()
        if probe is not None:
            junction = probe.latest().junctions["2.join"]
            assert junction.x.numel == junction.gradient.numel == junction.branch.numel == 20
            assert probe.latest().activations["1.branch"].output.numel == 20
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_module_that_is_used_again(use_reentrant: bool) -> None:
    layer = nn.Linear(3, 3)
    probe = gradprobe.attach(layer, activations=True)
    for _ in range(2):  # micro-batches
        x = torch.randn(4, 3, requires_grad=True)
        checkpoint(lambda x: layer(layer(x)), x, use_reentrant=use_reentrant).sum().backward()
    probe.step()
    activation = probe.latest().activations["Linear"]
    assert (activation.output.numel, activation.gradient.numel) == (48, 48)


def test_a_missing_gradient_stays_missing() -> None:
    class Cut(torch.autograd.Function):
        """The identity, without a gradient."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return None

    model = net()
    with gradprobe.attach(model):
        out = model(torch.randn(2, 3))
        (Cut.apply(out).sum() + model[0].weight.sum()).backward()
    assert model[1].branch.weight.grad is None


@pytest.mark.parametrize("by", ["parameter", "accumulated", "output"])
def test_detach_from_within_a_backward(by: str) -> None:
    model = net(nn.Linear(4, 1))
    probes: list[gradprobe.Probe] = []

    def detach(*_: object) -> None:
        probes[0].detach()

    if by == "parameter":
        model[0].weight.register_hook(detach)
        model[2].weight.register_hook(detach)
    elif by == "accumulated":
        model[2].weight.register_post_accumulate_grad_hook(detach)
    probes.append(gradprobe.attach(model, activations=True))
    out = model(torch.randn(2, 3))
    if by == "output":
        out.register_hook(detach)
    out.sum().backward()
    model(torch.randn(2, 3)).sum().backward()
    assert not any(module._forward_hooks for module in model.modules())
    assert model[1].join.observer is None
    assert probes[0].history() == []


def test_outputs_that_outlive_a_step() -> None:
    class Prompt(nn.Module):
        """Returns a parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.ones(2, 3))

        def forward(self) -> torch.Tensor:
            return self.tokens

    class Model(nn.Module):
        """A soft prompt that is also the shortcut of a residual add."""

        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.layer, self.join = Prompt(), nn.Linear(3, 3), ResidualAdd()

        def forward(self) -> torch.Tensor:
            prompt = self.prompt()
            return self.join(prompt, self.layer(prompt))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    for _ in range(4):
        optimizer.zero_grad()
        model().sum().backward()
        optimizer.step()
    gradients = [snapshot.activations["prompt"].gradient for snapshot in probe.history()]
    assert [gradient.numel for gradient in gradients] == [6] * 4
    assert len({gradient.norm for gradient in gradients}) == 1
    probe.detach()
    assert not model.prompt.tokens._backward_hooks


def test_a_backward_of_an_earlier_steps_graph() -> None:
    model = net()
    probe = gradprobe.attach(model, activations=True)
    out = model(torch.randn(2, 3)).sum()
    out.backward(retain_graph=True)
    probe.step()
    (out * math.nan).backward()
    probe.step()
    first = probe.first_nonfinite()
    assert (first.step, first.phase, first.module) == (1, "backward", "1.join")
    assert str(first) == "step 1, backward: 8 of 8 values are not finite in the gradient at the output of 1.join"


def test_a_part_in_inference_mode() -> None:
    class Frozen(nn.Module):
        """An encoder in inference mode."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                hidden = self.layer(x)
            return hidden.clone()

    model = nn.Sequential(Frozen(), nn.Linear(3, 1))
    probe = gradprobe.attach(model, activations=["*"])
    model(torch.randn(2, 3)).sum().backward()
    probe.step()
    assert probe.latest().activations["1"].output.numel == 2


def test_a_discarded_step_leaves_no_events() -> None:
    layer = nn.Linear(3, 3)
    probe = gradprobe.attach(layer, activations=True)

    def run(n_calls: int) -> None:
        for _ in range(n_calls):
            layer(torch.ones(2, 3)).sum().backward()

    run(3)
    probe.step()
    expected = probe.latest().activations["Linear"].output.norm
    run(100)  # more events than the signal buffer has rows at first
    with probe.paused():
        probe.step()
    run(3)
    probe.step()
    assert probe.latest().activations["Linear"].output.norm == expected


def test_no_row_is_lost_while_another_thread_adds_rows() -> None:
    buffer = SignalBuffer(1, torch.device("cpu"), "auto")
    ones = torch.ones(1)
    threads = [threading.Thread(target=lambda: [buffer.write_uncached(0, ones) for _ in range(400)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = torch.empty(1, 6, dtype=torch.float64)
    events = buffer.close(out)
    assert events.measured.numels.tolist() == [1600]
    assert out[0, 2] == 1600


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_scale_of_a_step_that_the_user_closed_first(with_optimizer: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    probe = gradprobe.attach(
        model, optimizer=optimizer if with_optimizer else None, grad_scaler=scaler, activations=True
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).sum()
        scaler.scale(loss).backward()
        probe.step(loss)
        scaler.step(optimizer)
        scaler.update()
    assert [snapshot.activations["0"].gradient.norm for snapshot in probe.history()] == [2.0, 2.0, 2.0]


def test_two_probes_and_one_residual_add() -> None:
    shared = Block()
    first, second = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared)
    one, two = gradprobe.attach(first), gradprobe.attach(second)
    assert two.coverage().unmeasured == ("1.join",)
    first(torch.randn(2, 4)).sum().backward()
    one.step()
    assert list(one.latest().junctions) == ["1.join"]
    two.detach()
    first(torch.randn(2, 4)).sum().backward()
    one.step()
    assert list(one.latest().junctions) == ["1.join"]


def test_autocast() -> None:
    model = net(nn.Linear(4, 1))
    probe = gradprobe.attach(model, activations=True)
    stream = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model[2](model[1](stream)).sum().backward()  # the stream in float32, the branch in bfloat16
    model[0].weight.grad = torch.zeros(4, 3)
    model[0].bias.grad = torch.zeros(4)
    with pytest.warns(gradprobe.GradprobeWarning):
        probe.step()
    junction = probe.latest().junctions["1.join"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = model[1].branch(stream).float()
    assert junction.y.norm == pytest.approx(torch.relu(stream + f).norm().item(), rel=1e-6)
    assert 0 < junction.shortcut_share < 1


def test_only_residual_adds_of_this_backward_have_a_branch() -> None:
    model = net()
    probe = gradprobe.attach(model)
    out = model(torch.randn(3, 3)).sum()
    torch.autograd.grad(out, model[1].branch.weight, retain_graph=True)  # reaches the residual add, not its input
    model[0].weight.sum().backward()
    probe.step()
    assert probe.latest().junctions["1.join"].branch is None


def test_a_default_device() -> None:
    model = net()
    with default_device("meta"):
        probe = gradprobe.attach(model, activations=True)
    model(torch.randn(2, 3)).sum().backward()
    probe.step()
    assert probe.latest().junctions


def test_forward_mode_passes() -> None:
    model = net()
    x, tangent = torch.randn(2, 3), torch.randn(2, 3)
    _, expected = torch.func.jvp(model, (x,), (tangent,))
    with gradprobe.attach(model, activations=True), torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, tangent))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("make", ["mkldnn", "nested", "itself"])
def test_outputs_that_cannot_be_measured(make: str) -> None:
    class Odd(nn.Module):
        """Returns an unusual object beside its result."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
            if make == "itself":
                extra: list[object] = []
                extra.append(extra)
                return x * 2, extra
            return x * 2, x.detach().to_mkldnn() if make == "mkldnn" else torch.nested.nested_tensor([torch.ones(2)])

    class Model(nn.Module):
        """Uses only the result."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.odd = nn.Linear(3, 3), Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(self.layer(x))[0]

    model = Model()
    probe = gradprobe.attach(model, activations=True)
    model(torch.randn(2, 3)).sum().backward()
    probe.step()
    assert probe.latest().activations["odd"].output.numel == 6
    assert probe.coverage().unmeasured == (() if make == "itself" else ("odd",))


def test_a_probe_detached_while_paused_stays_off() -> None:
    model = gradprobe.networks.resnet(8)
    probe = gradprobe.attach(model)
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    with probe.paused():
        probe.detach()
    loss.backward()  # through a graph built before detach
    assert probe._recorder._signals.observer is not None
    assert not probe._recorder._signals.observer._buffer.enabled


def test_a_step_that_is_never_closed_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_rows, "MOST_EVENTS", 20)
    model = net()
    probe = gradprobe.attach(model, activations=True)
    batches = torch.randn(12, 3)
    for batch in batches.split(6):
        model(batch).sum().backward()
    with pytest.warns(gradprobe.GradprobeWarning, match="20 tensors were observed since the last step was closed"):
        model(batches)
    model(batches).sum().backward()  # no second warning
    probe.step()
    model(torch.randn(2, 3)).sum().backward()
    probe.step()
    unclosed, closed = probe.history()
    assert closed.activations["0"].output.numel == closed.junctions["1.join"].branch.numel == 8
    assert unclosed.activations["0"].output.numel == 48


def test_dropped_rows_are_not_remembered(any_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_rows, "MOST_EVENTS", 2)
    rows = event_rows.make_rows(torch.device("cpu"), "auto", n_sites=1)
    tensors = torch.ones(3, 1).unbind()
    for tensor in tensors:
        rows.remember(tensor, rows.next(0, tensor.numel(), 0.0))
    assert [rows.known(tensor) is not None for tensor in tensors] == [True, False, False]
