"""Attaching: coverage and its warnings, an unchanged training, invalid input."""

import gc
import math
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers.probe_cases import RejectReads, loss_of, mlp, norms_of, run_through, sgd, true_norms
from torch import nn
from torch.nn.modules import module as module_registries
from torch.optim import optimizer as optimizers

import gradprobe

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")


class TestCoverage:
    def test_a_parameter_that_never_fires_is_named_in_one_warning(self, any_hooks: str) -> None:
        model = mlp()
        model.unused = nn.Linear(2, 2)
        model[0].bias.requires_grad_(False)
        with gradprobe.attach(model) as probe:
            run_through(model)
            with pytest.warns(
                gradprobe.GradprobeWarning, match=r"no gradient for 2 of 7 parameters: unused\.weight, unused\.bias"
            ):
                probe.step()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                run_through(model)
                probe.step()
            model[0].bias.requires_grad_(True)
            coverage = probe.coverage()
        assert probe.coverage() == coverage  # a detached probe does not look at the model
        assert coverage.silent == ("unused.weight", "unused.bias")
        assert coverage.frozen == ("0.bias",)
        assert coverage.unknown == ("0.bias",)
        assert coverage.observed == ("0.weight", "2.weight", "2.bias", "4.weight", "4.bias")
        snapshot = probe.latest()
        assert snapshot is not None
        assert "unused.weight" not in snapshot
        with pytest.raises(KeyError, match="had no gradient in step 1"):
            snapshot["unused.weight"]

    def test_a_step_without_any_gradient_is_loud_and_not_recorded(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            with pytest.warns(gradprobe.GradprobeWarning, match="step 0: no parameter has a gradient") as told:
                probe.step()
            assert told[0].filename == __file__
            loss_of(model).backward()
            probe.step()
        assert [snapshot.step for snapshot in probe.history()] == [1]

    def test_gradients_that_no_hook_saw_are_listed(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            with pytest.warns(
                gradprobe.GradprobeWarning, match=r"no hook fired for 6 of 6 parameters: 0\.weight"
            ) as told:
                optimizer.step()
            assert told[0].filename == __file__  # the line of the user, not of torch or gradprobe
            assert probe.coverage().unhooked == tuple(name for name, _ in model.named_parameters())
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)


class TestAttachChangesNothing:
    @pytest.mark.parametrize("n_steps", [10, pytest.param(50, marks=pytest.mark.soak)])
    @pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
    def test_resnet_20_trains_to_the_same_bits(self, clip: bool, n_steps: int, any_hooks: str) -> None:
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.arange(16) % 10

        def train(probed: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            torch.manual_seed(0)
            model = gradprobe.networks.resnet(20)
            optimizer = sgd(model, momentum=0.9, weight_decay=1e-4)
            probe = gradprobe.attach(model, optimizer=optimizer) if probed else None
            for _ in range(n_steps):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                if probe is not None:
                    probe.step(loss=loss)
            if probe is not None:
                assert len(probe.history()) == n_steps
                probe.detach()
            return model.state_dict(), torch.get_rng_state()

        with_probe, rng_with = train(True)
        without, rng_without = train(False)
        assert torch.equal(rng_with, rng_without)
        for name, value in without.items():
            assert torch.equal(value, with_probe[name]), name

    def test_detach_leaves_no_hook_and_lets_everything_go(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        probe = gradprobe.attach(model, optimizer=optimizer, when="backward")
        loss_of(model).backward()
        optimizer.step()
        probe.detach()
        probe.detach()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        loss_of(model).backward()
        optimizer.step()
        assert len(probe.history()) == 1
        gone = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
        del model, optimizer
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3
        assert len(probe.history()) == 1

    def test_a_probe_that_nobody_keeps_dies_with_its_model(self, any_hooks: str) -> None:
        model = mlp()
        probe = weakref.ref(gradprobe.attach(model))
        loss_of(model).backward()
        gc.collect()
        assert probe() is not None
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None
        assert probe() is None

    @pytest.mark.parametrize("how", ["step", "optimizer", "clip", "scaler"])
    def test_no_value_is_read_on_the_host_during_training(self, how: str, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu") if how == "scaler" else None
        given = optimizer if how in ("optimizer", "clip") else None  # a given one closes the step itself
        with gradprobe.attach(model, optimizer=given, grad_scaler=scaler) as probe:
            loss = loss_of(model)
            with RejectReads():
                (scaler.scale(loss) if scaler else loss).backward()
                if how == "clip":
                    probe.clip_grad_norm_(1.0)
                if scaler is None:
                    optimizer.step()
                probe.step(loss=loss)
            assert probe.latest() is not None


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"optimizer": "sgd"}, "optimizer: needed a torch.optim.Optimizer, a list of them or None, got str"),
            ({"every": 0}, "every: needed an integer of at least 1, got 0"),
            ({"every": True}, "every: needed an integer of at least 1, got True"),
            ({"capacity": 2.5}, "capacity: needed an integer of at least 1, got 2.5"),
            ({"backend": "fpga"}, "backend: needed one of auto, native, triton, reference, got 'fpga'"),
            ({"when": "later"}, "when: needed one of auto, step, backward, hook, got 'later'"),
            ({"grad_scaler": 2}, "grad_scaler: needed a torch.amp.GradScaler, a list of them or None, got int"),
            ({"params": False}, "params: needed True"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, arguments: dict[str, object], message: str) -> None:
        model = mlp()
        with pytest.raises(gradprobe.ArgumentError, match="^" + message.replace("(", r"\(")):
            gradprobe.attach(model, **arguments)  # type: ignore[arg-type]
        gradprobe.attach(model).detach()  # a refused attach leaves nothing behind

    @pytest.mark.parametrize(
        "place",
        [
            "step_recorder.CoverageLog",
            "step_recorder.StepBoundaries",
            "signal_choice.SignalObserver",
            "step_recorder.History.restart",
        ],
    )
    def test_an_attach_that_fails_leaves_nothing_behind(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(nn.Linear(2, 2), gradprobe.networks.resnet(8))

        def fail(*_: object, **__: object) -> None:
            raise MemoryError("planted")

        registries = [module_registries._global_parameter_registration_hooks, optimizers._global_optimizer_pre_hooks]
        before = [dict(registry) for registry in registries]
        with monkeypatch.context() as patch:
            patch.setattr(f"gradprobe.probe.{place}", fail)
            with pytest.raises(MemoryError, match="planted"):
                gradprobe.attach(model, activations=True)
        assert [dict(registry) for registry in registries] == before
        assert not any(module._forward_hooks for module in model.modules())
        residual_adds = [module for module in model.modules() if isinstance(module, gradprobe.nn.ResidualAdd)]
        assert all(module.observer is None for module in residual_adds)
        gradprobe.attach(model, capacity=10**13).detach()  # memory grows with the steps

    @pytest.mark.parametrize("given", ["global", 3, {3: None}, {"0.*": "local"}])
    def test_process_groups(self, given: Any) -> None:
        with pytest.raises(gradprobe.ArgumentError, match=r"process_group: needed None, 'local', a torch\.dist.*got "):
            gradprobe.attach(mlp(), process_group=given)
        with gradprobe.attach(mlp(), process_group="local") as probe:
            assert not probe.findings()

    def test_models(self) -> None:
        with pytest.raises(gradprobe.ArgumentError, match=r"needed a torch\.nn\.Module, got int"):
            gradprobe.attach(3)  # type: ignore[arg-type]
        with pytest.raises(gradprobe.ArgumentError, match="at least one parameter; ReLU has none"):
            gradprobe.attach(nn.ReLU())
        with pytest.raises(gradprobe.ArgumentError, match="all 2 of Linear are frozen"):
            gradprobe.attach(nn.Linear(1, 1).requires_grad_(False))
        with pytest.raises(gradprobe.ArgumentError, match="'weight' has no shape yet"):
            gradprobe.attach(nn.LazyLinear(2))

    def test_attaching_twice(self) -> None:
        model = mlp()
        with (
            gradprobe.attach(model),
            pytest.raises(gradprobe.ArgumentError, match=r"already has a probe; call its detach\(\) first"),
        ):
            gradprobe.attach(model)
        gradprobe.attach(model).detach()

    def test_an_optimizer_of_some_parameters_only(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            assert probe.coverage().unstepped == ("0.weight", "0.bias", "4.weight", "4.bias")
        with gradprobe.attach(model, optimizer=sgd(model)) as probe:
            assert probe.coverage().unstepped == ()

    def test_parts_that_are_given_to_the_optimizer_later(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            optimizer.add_param_group({"params": list(model[2].parameters())})
            assert probe.coverage().unstepped == ("0.weight", "0.bias")
            optimizer.add_param_group({"params": list(model[0].parameters())})
        assert probe.coverage().unstepped == ()

    def test_an_optimizer_of_another_model(self) -> None:
        with pytest.raises(gradprobe.ArgumentError, match="it steps none of them"):
            gradprobe.attach(mlp(), optimizer=sgd(mlp()))

    @pytest.mark.parametrize("loss", [torch.ones(2), "0.5", True, torch.ones(1, dtype=torch.complex64)], ids=repr)
    def test_losses(self, loss: object) -> None:
        with gradprobe.attach(mlp()) as probe, pytest.raises(gradprobe.ArgumentError, match=r"^loss: need"):
            probe.step(loss=loss)  # type: ignore[arg-type]

    @pytest.mark.parametrize("loss", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor([0.5])], ids=repr)
    def test_a_loss_may_come_from_metrics_code(self, loss: Any) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            probe.step(loss)
            assert probe.history()[0].loss == 0.5

    @pytest.mark.parametrize("max_norm", [-5.0, 0, math.nan, "1", True, None], ids=repr)
    def test_clipping_takes_a_number_above_zero(self, max_norm: Any) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            before = true_norms(model)
            with pytest.raises(gradprobe.ArgumentError, match="max_norm: needed a number above 0, got"):
                probe.clip_grad_norm_(max_norm)
            assert true_norms(model) == before

    def test_use_after_detach(self) -> None:
        probe = gradprobe.attach(mlp())
        probe.detach()
        with pytest.raises(gradprobe.GradprobeError, match="detached"):
            probe.step()
        with pytest.raises(gradprobe.GradprobeError, match="detached"):
            probe.clip_grad_norm_(1.0)
