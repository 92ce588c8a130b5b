"""The magnitudes of activations in a training: against float64, in which steps, and that nothing else changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from helpers.magnitude_cases import EDGES, attach, counts_of, kurtosis_of, newest
from helpers.ops_truth import DTYPES, of_bits
from helpers.probe_cases import RejectReads, count_calls, loss_of, mlp, sgd
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gradprobe
from gradprobe.observers.magnitudes import MagnitudeObserver
from gradprobe.snapshot import Magnitudes, SiteStats

Tensors = dict[str, list[torch.Tensor]]


def record(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Lists, from now on, copies of what each layer returns, and of the gradients there."""
    outputs: Tensors = {}
    gradients: Tensors = {}

    def keep(name: str, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        outputs.setdefault(name, []).append(output.detach().clone())
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.setdefault(name, []).append(gradient.clone()))

    for name, module in model.named_modules():
        if name and not any(module.children()):
            module.register_forward_hook(partial(keep, name))
    return outputs, gradients


def assert_are_of(found: Magnitudes | None, tensors: Sequence[torch.Tensor], stats: SiteStats | None) -> None:
    """Checks magnitudes against all values of some tensors."""
    assert found is not None
    assert stats is not None
    values = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    assert found.counts.tolist() == counts_of(values)
    assert (found.numel, found.nonfinite) == (stats.numel, stats.nonfinite)
    assert found.zeros == int((values == 0).sum())
    assert found.abs_max == max(values[values.isfinite()].abs().tolist(), default=0.0)
    assert found.kurtosis == pytest.approx(kurtosis_of(values), rel=1e-11, nan_ok=True)


class Strided(nn.Module):
    """Returns every second value of a parameter: not contiguous."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.weight.clone()[::2]


@given(dtype=st.sampled_from(DTYPES), bits=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30))
def test_any_values_of_any_dtype(dtype: torch.dtype, bits: list[int]) -> None:
    values = of_bits(bits, dtype)
    model = Strided(values)
    gradient = values.flip(0)[::2]
    with attach(model, activations=True) as probe:
        model().backward(gradient)
        probe.step()
    snapshot = newest(probe)
    (found,), (activation,) = snapshot.activation_magnitudes.values(), snapshot.activations.values()
    assert_are_of(found.output, [values[::2]], activation.output)
    assert_are_of(found.gradient, [gradient], activation.gradient)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training(dtype: torch.dtype, backend: str, any_hooks: str) -> None:
    model = mlp(dtype=dtype)
    model.insert(1, nn.ReLU(inplace=True))
    outputs, gradients = record(model)
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, backend=backend, activations=True) as probe:
        for step in range(3):
            outputs.clear()
            gradients.clear()
            optimizer.zero_grad()
            for seed in range(2):  # of both micro-batches together
                loss_of(model, 2 * step + seed, dtype).backward()
            optimizer.step()
            snapshot = newest(probe)
            assert list(snapshot.activation_magnitudes) == list(snapshot.activations) == list(outputs)
            for name, found in snapshot.activation_magnitudes.items():
                assert found.output.name == name
                assert_are_of(found.output, outputs[name], snapshot.activations[name].output)
                assert_are_of(found.gradient, gradients[name], snapshot.activations[name].gradient)


def test_only_in_the_steps_that_are_due(any_hooks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n_counted = count_calls(monkeypatch, MagnitudeObserver, "count_event")
    model = mlp()
    optimizer = sgd(model)
    options = {"activations": True, "activations_every": 2, "magnitudes_every": 3, "capacity": 20}
    with attach(model, optimizer=optimizer, **options) as probe:
        for seed in range(8):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
        history = probe.history()
    assert [snapshot.step for snapshot in history if snapshot.activation_magnitudes] == [0, 6]
    assert [snapshot.step for snapshot in history if snapshot.magnitudes] == [0, 3, 6]
    assert n_counted() == 2 * 2 * 5


def test_without_the_option_or_without_activations_nothing_is_counted() -> None:
    for options in ({"activations": True}, {"magnitudes": True}):
        model = mlp()
        with gradprobe.attach(model, **options) as probe:  # type: ignore[arg-type]
            loss_of(model).backward()
            probe.step()
        assert newest(probe).activation_magnitudes == {}


def trained(make: Callable[[], nn.Module], observe: Callable[[nn.Module], object]) -> list[torch.Tensor]:
    """Trains a network on random images, and returns its weights and the state of the random numbers."""
    torch.manual_seed(0)
    model = make()
    observe(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return [*model.parameters(), *model.buffers(), torch.get_rng_state()]


class Checkpointed(nn.Module):
    """Recomputes its convolutions in the backward pass, and keeps the result of each other operator."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def policy(_: object, operator: Any, *__: object, **___: object) -> CheckpointPolicy:
            is_kept = operator != torch.ops.aten.convolution.default
            return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

        context = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(self.convolutions, x, use_reentrant=False, context_fn=context)  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(144, 3))


@pytest.mark.parametrize("make", [convolutional, Checkpointed])
@pytest.mark.parametrize("magnitudes_every", [1, 2])
def test_a_training_is_the_same_bit_for_bit(
    magnitudes_every: int, make: Callable[[], nn.Module], any_hooks: str
) -> None:
    bare = trained(make, lambda _: None)
    watched = trained(make, lambda model: attach(model, activations=True, magnitudes_every=magnitudes_every))
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))


def test_a_step_has_the_same_statistics_with_and_without(any_hooks: str) -> None:
    seen = []
    for magnitudes in (True, False):
        model = mlp()
        with gradprobe.attach(model, activations=True, magnitudes=magnitudes) as probe:
            loss_of(model).backward()
            probe.step()
        seen.append(list(newest(probe).all_stats()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_a_loss_scale_is_undone_at_gradients_only(scale: float, any_hooks: str) -> None:
    model = mlp()
    outputs, gradients = record(model)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with attach(model, optimizer=optimizer, grad_scaler=scaler, activations=True) as probe:
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    snapshot = newest(probe)
    for name, found in snapshot.activation_magnitudes.items():
        assert found.output.counts.tolist() == counts_of(outputs[name][0])
        assert found.output.edges.tolist() == EDGES.tolist()
        assert found.gradient is not None
        assert found.gradient.counts.tolist() == counts_of(gradients[name][0])
        assert found.gradient.edges[1:-1] == pytest.approx(EDGES[1:-1] / scale, rel=1e-12)
        assert found.gradient.abs_max == pytest.approx(snapshot.activations[name].gradient.abs_max, rel=1e-12)


def test_a_returned_input_and_a_complex_output_are_counted(any_hooks: str) -> None:
    class Returns(nn.Module):
        """Returns what it was given, and a complex tensor."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, torch.complex(x, 2 * x)

    model = nn.Sequential(nn.Linear(2, 3), Returns())
    with attach(model, activations=True) as probe:
        real, wide = model(torch.ones(4, 2))
        (real.sum() + wide.abs().sum()).backward()
        probe.step()
    found = newest(probe).activation_magnitudes
    assert found["0"].output.counts.tolist() == counts_of(real)
    assert found["1"].output.counts.tolist() == counts_of(torch.cat((real, wide.abs())))
    assert found["1"].gradient is not None
    assert found["1"].gradient.numel == 24


def test_a_gradient_of_which_a_part_was_not_counted_has_no_magnitudes(any_hooks: str) -> None:
    model = mlp()
    with attach(model, activations=True, magnitudes_every=2) as probe:
        loss_of(model).backward()
        probe.step()
        late = loss_of(model)  # its backward pass comes in the next step
        loss_of(model).backward()
        probe.step()
        late.backward()
        loss_of(model).backward()
        probe.step()
    snapshot = newest(probe)
    assert snapshot.step == 2
    for name, found in snapshot.activation_magnitudes.items():
        whole = snapshot.activations[name].gradient
        assert whole is not None
        assert found.output.numel == snapshot.activations[name].output.numel
        assert found.gradient is None or found.gradient.numel == whole.numel


def test_a_paused_part_is_not_counted(any_hooks: str) -> None:
    model = mlp()
    outputs, _ = record(model)
    with attach(model, activations=True) as probe:
        loss_of(model, 1).backward()
        with probe.paused():
            loss_of(model, 2).backward()
        loss_of(model, 3).backward()
        probe.step()
    for name, found in newest(probe).activation_magnitudes.items():
        assert found.output.counts.tolist() == counts_of(torch.cat((outputs[name][0], outputs[name][2])))


def test_a_compiled_model(any_hooks: str, fresh_dynamo: None) -> None:
    model = mlp()
    with attach(model, activations=True, magnitudes_every=2) as probe:
        compiled = torch.compile(model, backend="aot_eager")
        for step in range(3):
            compiled(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            probe.step()
        history = probe.history()
    twin = mlp()
    outputs, gradients = record(twin)
    loss_of(twin, 0).backward()
    for name, found in history[0].activation_magnitudes.items():
        assert_are_of(found.output, outputs[name], history[0].activations[name].output)
        assert_are_of(found.gradient, gradients[name], history[0].activations[name].gradient)
    assert [len(snapshot.activation_magnitudes) for snapshot in history] == [5, 0, 5]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_value_is_read_on_the_host(backend: str, any_hooks: str) -> None:
    model = mlp()
    with attach(model, activations=True, backend=backend) as probe:
        with RejectReads():
            loss_of(model).backward()
        probe.step()
    assert len(newest(probe).activation_magnitudes) == 5


def test_a_failure_ends_the_counting_alone(any_hooks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(MagnitudeObserver, "count_event", fail)
    bare, model = mlp(), mlp()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with gradprobe.attach(model, activations=True, magnitudes=True, magnitudes_every=1) as probe:
            for seed in range(3):
                for each in (bare, model):
                    each.zero_grad()
                    loss_of(each, seed).backward()
                probe.step()
    failures = [str(one.message) for one in told if "planted" in str(one.message)]
    assert len(failures) == 1
    assert "measuring the magnitudes of activations failed" in failures[0]
    for snapshot in probe.history():
        assert (len(snapshot.activations), snapshot.activation_magnitudes, len(snapshot.magnitudes)) == (5, {}, 6)
        assert not any(math.isnan(one.output.norm) for one in snapshot.activations.values())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
