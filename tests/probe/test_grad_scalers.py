"""Gradient scalers, given to the probe or not: unscaled numbers, skipped steps in any order of calls, copies."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, sgd, true_norms
from torch import nn

import gradprobe
from gradprobe.probe import grad_scaler, step_gradients

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")


@pytest.fixture(autouse=True)
def searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches for gradient scalers as outside of tests."""
    monkeypatch.setattr(step_gradients, "any_in_use", grad_scaler.any_in_use)


class TestScalers:
    @pytest.mark.parametrize("unscale_first", [False, True])
    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    def test_two_optimizers_on_one_scaler(self, given: bool, unscale_first: bool, any_hooks: str) -> None:
        model = mlp()
        first, second = sgd(model[0]), sgd(model[2:])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with gradprobe.attach(model, grad_scaler=scaler if given else None, strict=True) as probe:
            truths = []
            for seed in range(2):
                model.zero_grad()
                scaler.scale(loss_of(model, seed)).backward()
                truths.append({name: norm / 1024 for name, norm in true_norms(model).items()})
                if unscale_first:
                    scaler.unscale_(first)
                scaler.step(first)
                scaler.step(second)
                scaler.update()
        assert [norms_of(snapshot) for snapshot in probe.history()] == [
            pytest.approx(truth, rel=1e-6) for truth in truths
        ]
        assert [(s.provenance.scale, s.provenance.state) for s in probe.history()] == [("unscaled", "raw")] * 2

    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    def test_unscaling_and_clipping_are_told_apart(self, given: bool, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with gradprobe.attach(model, grad_scaler=scaler if given else None, strict=True) as probe:
            for max_norm in (1e9, 0.01):
                optimizer.zero_grad()
                scaler.scale(loss_of(model)).backward()
                scaler.unscale_(optimizer)
                total = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
                scaler.step(optimizer)
                scaler.update()
        kept, clipped = probe.history()
        assert (kept.provenance.state, kept.clip_factor) == ("raw", 1.0)
        assert clipped.provenance.state == "clipped"
        assert clipped.clip_factor == pytest.approx(0.01 / total, rel=1e-4)
        assert clipped.total_norm == pytest.approx(total, rel=1e-6)

    @pytest.mark.parametrize("given", [True, False])
    def test_the_probes_own_clipping_after_unscaling(self, given: bool, any_hooks: str) -> None:
        model, twin = mlp(), mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with gradprobe.attach(model, grad_scaler=scaler if given else None, strict=True) as probe:
            scaler.scale(loss_of(model)).backward()
            scaler.unscale_(optimizer)
            total = probe.clip_grad_norm_(0.01)
            loss_of(twin).backward()
            assert total.item() == pytest.approx(nn.utils.clip_grad_norm_(twin.parameters(), 0.01).item(), rel=1e-6)
            assert true_norms(model) == pytest.approx(true_norms(twin), rel=1e-5)
            scaler.step(optimizer)
            scaler.update()
        snapshot = probe.latest()
        assert snapshot.total_norm == pytest.approx(total.item(), rel=1e-6)
        assert snapshot.clip_factor == pytest.approx(0.01 / total.item(), rel=1e-4)

    @pytest.mark.parametrize("is_made_first", [True, False])
    def test_clipping_with_a_scaler_that_comes_into_use_later(self, is_made_first: bool, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if is_made_first else None
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            probe.clip_grad_norm_(1e9)
            optimizer.step()
            optimizer.zero_grad()
            scaler = scaler or torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(loss_of(model)).backward()
            scaler.unscale_(optimizer)
            expected = math.hypot(*true_norms(model).values())
            assert probe.clip_grad_norm_(1e-3).item() == pytest.approx(expected, rel=1e-5)
            assert math.hypot(*true_norms(model).values()) == pytest.approx(1e-3, rel=1e-3)

    @pytest.mark.parametrize("given", [True, False])
    @pytest.mark.parametrize("updates", [True, False])
    def test_clipping_after_the_step_of_an_optimizer_that_was_not_given(
        self, given: bool, updates: bool, any_hooks: str
    ) -> None:
        model = mlp()
        old, new = sgd(model), sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with gradprobe.attach(model, optimizer=old, grad_scaler=scaler if given else None, strict=True) as probe:
            scaler.scale(loss_of(model)).backward()
            scaler.step(new)
            if updates:
                scaler.update()
            expected = math.hypot(*true_norms(model).values())
            assert probe.clip_grad_norm_(1e-3).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("loss_first", [True, False])
    @pytest.mark.parametrize("activations", [True, False])
    def test_a_skipped_step_in_any_order_of_calls(self, loss_first: bool, activations: bool, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        bad = [True, False, True, True, False, False]
        with gradprobe.attach(model, grad_scaler=scaler, activations=activations, strict=True) as probe:
            for step, is_bad in enumerate(bad):
                optimizer.zero_grad()
                loss = loss_of(model, step) * (math.inf if is_bad else 1.0)
                scaler.scale(loss).backward()
                if loss_first:
                    probe.step(loss)
                scaler.step(optimizer)
                scaler.update()
                if not loss_first:
                    probe.step(loss)
        assert [snapshot.skipped for snapshot in probe.history()] == bad
        assert [snapshot.loss == math.inf for snapshot in probe.history()] == bad
        if activations:  # every step has its own outputs, and those of no other
            assert [s.activations["0"].output.numel for s in probe.history()] == [40] * 6

    def test_two_probes_share_a_scaler(self) -> None:
        generator, critic = mlp(0), mlp(1)
        optimizers = sgd(generator), sgd(critic)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        one, two = (gradprobe.attach(model, grad_scaler=scaler, strict=True) for model in (generator, critic))
        for model, optimizer in zip((generator, critic), optimizers, strict=True):
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        one.detach()
        critic.zero_grad()
        scaler.scale(loss_of(critic) * math.inf).backward()
        scaler.step(optimizers[1])
        scaler.update()
        assert [snapshot.skipped for snapshot in two.history()] == [False, True]
        assert len(one.history()) == 1
        two.detach()

    def test_copies_and_pickles_of_a_scaler_in_use_are_as_without_a_probe(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with gradprobe.attach(model, optimizer=optimizer, grad_scaler=scaler, strict=True):
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert vars(scaler).keys() == vars(torch.amp.GradScaler("cpu")).keys()
            for again in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
                other = mlp()
                other_optimizer = sgd(other)
                before = other[0].weight.detach().clone()
                again.scale(loss_of(other)).backward()
                gradient = other[0].weight.grad.clone()
                again.step(other_optimizer)
                again.update()
                torch.testing.assert_close(other[0].weight.detach(), before - 0.1 * gradient / 8)

    def test_a_loss_that_was_not_scaled(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(1))
        with gradprobe.attach(model, grad_scaler=scaler, strict=True) as probe:
            loss_of(model).backward()
            truth = true_norms(model)
            optimizer.step()
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)

    def test_a_scaler_that_the_probe_does_not_know(self) -> None:
        model = mlp()
        scaler = torch.amp.GradScaler("cpu")
        with gradprobe.attach(model, strict=True) as probe:
            scaler.scale(loss_of(model)).backward()
            with pytest.warns(gradprobe.GradprobeWarning, match="give it to attach as grad_scaler"):
                probe.step()
        assert probe.latest().provenance.scale == "unknown"
