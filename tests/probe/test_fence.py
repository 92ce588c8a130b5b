"""Whatever fails inside measuring is reported once, switches off the smallest part, and leaves the training alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, sgd, true_norms
from torch import nn

import gradprobe
from gradprobe.nn.residual import watchers
from gradprobe.probe.step_recorder import StepRecorder

PLACES = {
    "measuring": "gradprobe.observers.gradients.GradientMeter.measure",
    "the native pass": "gradprobe.observers.gradient_observer.GradientObserver.measure",
    "comparing": "gradprobe.observers.gradients.GradientMeter.compare",
    "looking at the model": "gradprobe.observers.gradient_observer.GradientObserver.look",
    "committing": "gradprobe.observers.ring_buffer.RingBuffer.commit",
    "judging": "gradprobe.diagnosis.running.RunningDiagnosis.take",
    "counting magnitudes": "gradprobe.observers.magnitudes.MagnitudeObserver.count",
    "counting activations": "gradprobe.observers.magnitudes.MagnitudeObserver.count_event",
    "keeping magnitudes": "gradprobe.observers.magnitudes.StepMagnitudes.publish",
    "noting": "gradprobe.probe.coverage.CoverageLog.note",
    "copying parameters": "gradprobe.observers.updates.UpdateObserver.begin",
    "measuring updates": "gradprobe.observers.updates.UpdateObserver.end",
    "closing signals": "gradprobe.observers.signals.SignalObserver.close",
    "reading the scale": "gradprobe.probe.grad_scaler.Scalers.read",
    "walking the stack": "gradprobe.probe.step_boundaries.StepBoundaries._callers",
    "settling": "gradprobe.probe.step_recorder.StepRecorder.settle",
}


class Broken(RuntimeError):
    """What the tests plant."""


def train(model: nn.Module, n_steps: int = 4, probe: Callable[[], object] = lambda: None) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        probe()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.fixture(autouse=True)
def no_other_probe() -> None:
    """Takes off the probes of earlier tests, in which what is planted here would fail too."""
    for recorder in [*watchers]:
        assert isinstance(recorder, StepRecorder)
        recorder.release()


@pytest.mark.parametrize("place", PLACES)
def test_an_error_anywhere_leaves_the_training_as_it_is(
    place: str, any_hooks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = train(mlp())
    model = mlp()

    def fail(*_: object, **__: object) -> None:
        raise Broken("planted")

    # steps are judged when they are about to leave the history, at the latest
    capacity = 1 if place == "judging" else 1024
    probe = gradprobe.attach(model, updates=True, activations=True, magnitudes=True, capacity=capacity)
    monkeypatch.setattr(PLACES[place], fail)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched = train(model)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    failures = [str(each.message) for each in told if "planted" in str(each.message)]
    # gradients and updates, or gradients and activations, fail on their own
    is_of_two = place == "keeping magnitudes" or (place == "measuring" and any_hooks == "python")
    assert len(failures) == 1 + is_of_two
    assert all("Broken: planted" in failure for failure in failures)
    monkeypatch.undo()
    probe.detach()
    gradprobe.attach(model).detach()


@pytest.mark.parametrize("place", ["the native pass", "committing", "copying parameters", "settling"])
def test_a_strict_probe_lets_the_error_through(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    probe = gradprobe.attach(model, updates=True, strict=True)

    def fail(*_: object, **__: object) -> None:
        raise Broken("planted")

    monkeypatch.setattr(PLACES[place], fail)
    with pytest.raises(Broken, match="planted"):
        train(model)
    monkeypatch.undo()
    probe.detach()


@pytest.mark.parametrize("activations", [False, True])
def test_only_the_updates_go(activations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with gradprobe.attach(model, updates=True, activations=activations) as probe:

        def fail(*_: object, **__: object) -> None:
            raise Broken("planted")

        monkeypatch.setattr(PLACES["copying parameters"], fail)
        with pytest.warns(gradprobe.GradprobeWarning, match="measuring updates failed and is switched off"):
            train(model)
        history = probe.history()
    assert [snapshot.updates for snapshot in history] == [{}] * 4
    assert all(snapshot.total_norm > 0 for snapshot in history)
    assert all(bool(snapshot.activations) == activations for snapshot in history)


def test_only_the_gradients_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    with gradprobe.attach(model, activations=True) as probe:

        def fail(*_: object, **__: object) -> None:
            raise Broken("planted")

        monkeypatch.setattr(PLACES["the native pass"], fail)
        with pytest.warns(gradprobe.GradprobeWarning, match="measuring gradients failed and is switched off"):
            train(model, probe=lambda: probe.step(1.5))
        history = probe.history()
        model.zero_grad()
        loss_of(model).backward()
        truth = sum(norm**2 for norm in true_norms(model).values()) ** 0.5
        assert probe.clip_grad_norm_(1e-3).item() == pytest.approx(truth, rel=1e-6)  # as torch does it
        assert sum(norm**2 for norm in true_norms(model).values()) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
    assert [len(snapshot) for snapshot in history] == [0] * 4
    assert [snapshot.loss for snapshot in history] == [1.5] * 4
    assert all(snapshot.activations for snapshot in history)


def test_one_parameter_of_an_unknown_dtype(any_hooks: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)
            self.scales = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fnuz))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Model()
    with gradprobe.attach(model, updates=True) as probe:
        optimizer = sgd(model.layer)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model).backward()
            total = sum(norm**2 for norm in true_norms(model).values()) ** 0.5
            assert probe.clip_grad_norm_(1e9).item() == pytest.approx(total, rel=1e-6)
            optimizer.step()
        assert set(probe.latest()) == {"layer.weight", "layer.bias"}
        assert probe.coverage().unmeasured == ("scales",)


def test_one_gradient_that_no_kernel_takes(any_hooks: str) -> None:
    class Unknown(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "gradprobe" in str(func):
                raise Broken("not implemented")
            with torch._C._DisableTorchDispatch():
                return func(*args, **(kwargs or {}))

    model = mlp()
    with warnings.catch_warnings(), gradprobe.attach(model, when="step") as probe:
        warnings.filterwarnings("ignore", message="gradprobe: step")
        loss_of(model).backward()
        model[2].weight.grad = torch.Tensor._make_subclass(Unknown, torch.ones(3, 5))
        truth = true_norms(model)
        with pytest.warns(gradprobe.GradprobeWarning, match=r"measuring the gradient of 2\.weight failed"):
            probe.step()
        model[2].weight.grad = torch.Tensor._make_subclass(Unknown, torch.ones(3, 5))
        probe.step()  # it is not told again
        assert probe.coverage().unmeasured == ("2.weight",)
    expected = {name: norm for name, norm in truth.items() if name != "2.weight"}
    assert norms_of(probe.history()[0]) == pytest.approx(expected, rel=1e-6)
    assert norms_of(probe.history()[1]) == pytest.approx(expected, rel=1e-6)


def test_a_complex_parameter_without_a_gradient_adds_nothing_to_the_norm(any_hooks: str) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(1, dtype=torch.complex64)) for name in "ab"})
    with gradprobe.attach(model, capacity=1) as probe:
        (model["a"].real * 3 + model["b"].real * 4000).sum().backward()
        probe.clip_grad_norm_(1e9)
        probe.step()
        model.zero_grad()
        (model["a"].real * 3).sum().backward()
        assert probe.clip_grad_norm_(1.0).item() == pytest.approx(3.0, rel=1e-6)
        assert abs(model["a"].grad.item()) == pytest.approx(1.0, rel=1e-5)


def test_a_warning_that_is_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    bare = train(mlp())
    model = mlp()
    model[1].unused = nn.Linear(2, 2)
    with warnings.catch_warnings(), gradprobe.attach(model), caplog.at_level(logging.WARNING, "gradprobe"):
        warnings.simplefilter("error")
        watched = train(model)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched[:2] + watched[4:], strict=True))
    assert "no gradient for 2 of 8 parameters: 1.unused.weight, 1.unused.bias" in caplog.text


def test_errors_of_the_users_own_calls_are_raised() -> None:
    model = mlp()
    probe = gradprobe.attach(model)
    with pytest.raises(gradprobe.ArgumentError, match="max_norm: needed a number"):
        probe.clip_grad_norm_("1")  # type: ignore[arg-type]
    with pytest.raises(gradprobe.ArgumentError, match="loss: needed a number"):
        probe.step("1")  # type: ignore[arg-type]
    probe.detach()
    for call in (lambda: probe.clip_grad_norm_(1.0), probe.step):
        with pytest.raises(gradprobe.GradprobeError, match="the probe is detached"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_attached_in_inference_mode_or_under_another_default(dtype: torch.dtype, any_hooks: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        with torch.inference_mode():
            probe = gradprobe.attach(model, updates=True, strict=True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    with probe:
        loss_of(model).backward()
        truth = true_norms(model)
        probe.clip_grad_norm_(1e9)
        optimizer.step()
        probe.step(torch.tensor(1.0))
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)


def test_gradients_made_in_inference_mode(any_hooks: str) -> None:
    model = mlp()
    with gradprobe.attach(model, strict=True) as probe:
        loss_of(model).backward()
        truth = true_norms(model)
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.grad = parameter.grad * 2
        probe.step()
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
        assert probe.latest().clip_factor == 2.0
        assert probe.clip_grad_norm_(1e9).item() == pytest.approx(2 * probe.latest().total_norm, rel=1e-6)


class TestRing:
    def test_no_step_that_is_kept_is_overwritten(self, any_hooks: str) -> None:
        model = nn.Linear(1, 1, bias=False)
        optimizer = sgd(model)

        def backward(value: float) -> None:
            model.zero_grad()
            (model(torch.ones(1, 1)) * value).sum().backward()

        with gradprobe.attach(model, optimizer=optimizer, capacity=3, strict=True) as probe:
            for value in (1.0, 2.0, 3.0):
                backward(value)
                optimizer.step()
            kept = [(snapshot.step, snapshot.total_norm) for snapshot in probe.history()]
            assert kept == [(0, 1.0), (1, 2.0), (2, 3.0)]
            backward(100.0)
            probe.clip_grad_norm_(1e9)
            assert [(snapshot.step, snapshot.total_norm) for snapshot in probe.history()] == kept
            optimizer.step()
            assert [(s.step, s.total_norm) for s in probe.history()] == [(1, 2.0), (2, 3.0), (3, 100.0)]

    def test_the_only_step_that_is_kept_is_not_overwritten(self, any_hooks: str) -> None:
        model = nn.Linear(1, 1, bias=False)
        with gradprobe.attach(model, capacity=1, strict=True) as probe:
            for value in (1.0, 7.0, 5.0):
                model.zero_grad()
                (model(torch.ones(1, 1)) * value).sum().backward()
                if value != 5.0:
                    probe.step()
            assert [(snapshot.step, snapshot.total_norm) for snapshot in probe.history()] == [(1, 7.0)]
