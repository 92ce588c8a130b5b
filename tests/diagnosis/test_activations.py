"""Rules on the forward pass, on synthetic outputs and on those of small networks."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.diagnose_cases import FALLING, FLAT, Out, layers, passing, snapshot, with_outputs
from torch import nn

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose, verdict
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.errors import ArgumentError

LEVEL = layers([1.0, 1.1, 0.9, 1.0, 1.2, 0.5])
GROWING = layers([1.0, 10.0, 100.0, 1e3, 1e4, 0.1])


def titles(history: list[gradprobe.Snapshot]) -> list[str]:
    return [finding.title for finding in diagnose(history)]


def test_healthy_outputs_give_no_finding() -> None:
    assert titles(passing(FALLING, LEVEL)) == []
    assert titles(passing(FLAT[:10], LEVEL)) == []


class TestExploding:
    def test_names_the_layers_the_growth_and_the_loss(self) -> None:
        finding, symptom = diagnose(passing([5e5], GROWING))
        assert (finding.title, finding.steps, finding.follows) == ("exploding (forward)", (0, 0), "")
        assert (symptom.title, symptom.follows) == ("loss blow-up", "exploding (forward)")
        assert finding.sites == ("layer2", "layer3", "layer4")
        assert finding.evidence == {
            "rms_first": pytest.approx(1.0),
            "rms_last": pytest.approx(1e4),  # the last layer does not count
            "ratio": pytest.approx(1e4),
            "factor_per_layer": pytest.approx(10.0),
            "std_error": pytest.approx(0.0, abs=1e-6),
            "loss": 5e5,
        }
        assert "by 10 ±" in finding.message
        assert "the loss is 5e+05" in finding.message
        assert "1502.01852" in finding.source
        assert verdict(passing([5e5], GROWING)) == "exploding"

    def test_is_no_fault_if_the_loss_falls(self) -> None:
        assert titles(passing(FALLING, GROWING)) == []

    def test_later_steps_with_nan_hide_nothing(self) -> None:
        for broken in (layers([math.nan] * 6), layers([1.0, 1.0, 1.0, 1.0, math.inf, 1.0])):
            history = [with_outputs(one, GROWING if one.step == 0 else broken) for one in passing([5e5] * 4, GROWING)]
            finding, symptom = diagnose(history)
            assert (finding.title, finding.steps) == ("exploding (forward)", (0, 0))
            assert (symptom.title, symptom.follows) == ("loss blow-up", "exploding (forward)")

    def test_must_persist_for_more_than_half_of_the_steps(self) -> None:
        def history(n_growing: int) -> list[gradprobe.Snapshot]:
            return [with_outputs(one, GROWING if one.step < n_growing else LEVEL) for one in passing([2.3] * 6, LEVEL)]

        assert titles(history(3)) == []
        assert titles(history(4)) == ["exploding (forward)"]

    def test_a_step_in_which_layers_did_not_run_does_not_count(self) -> None:
        history = passing([2.3] * 6, GROWING)
        for one in history[:4]:
            table = one.signals.table
            left_out = [k for k, name in enumerate(table.names) if name == "layer4"]
            one.signals.events.measured.present[left_out] = False
            one.signals.rows[left_out] = 0.0
        assert titles(history) == ["exploding (forward)"]

    def test_residual_adds_are_compared_with_residual_adds(self) -> None:
        names = ["a", "b", "c"]
        assert titles(passing([2.3], [Out(name, "", 10.0**k) for k, name in enumerate(names)])) == [
            "exploding (forward)"
        ]
        assert titles(passing([2.3], [Out(name, "", 3.0**k) for k, name in enumerate(names)])) == []
        too_few = names[:2]
        assert titles(passing([2.3], [Out(name, "", 10.0**k) for k, name in enumerate(too_few)])) == []

    def test_a_layer_is_judged_by_the_output_of_its_normalisation(self) -> None:
        outputs = []
        for out in GROWING:
            outputs += [out, Out(f"norm of {out.name}", "BatchNorm1d", 1.0)] if out.module_type == "Linear" else [out]
        assert titles(passing([2.3], outputs)) == []

    def test_embeddings_and_modules_without_weights_are_not_compared(self) -> None:
        outputs = [Out("layer0", "Embedding", 1e-3), *LEVEL[2:], Out("pool", "AvgPool2d", 1e6)]
        assert titles(passing([2.3], outputs)) == []

    @pytest.mark.parametrize(
        ("outputs", "words"),
        [(LEVEL, "the observed activations do not show that"), (None, "attach(activations=True) tells which")],
        ids=["observed", "not-observed"],
    )
    def test_a_huge_first_loss_says_what_was_observed(self, outputs: list[Out], words: str) -> None:
        history = passing([5e5], outputs) if outputs else [snapshot(0, [1.0, 1.0], loss=5e5)]
        (finding,) = diagnose(history)
        assert finding.title == "loss blow-up"
        assert "a uniform guess among a million classes has 13.8" in finding.message
        assert finding.message.endswith(words)

    def test_a_loss_that_blows_up_later_is_reported_too(self) -> None:
        assert titles(passing([2.3, 2.3, 1e9], GROWING)) == ["exploding (forward)", "loss blow-up"]

    def test_snapshots_of_different_modules_are_rejected(self) -> None:
        with pytest.raises(ArgumentError, match="different modules"):
            diagnose([*passing([2.3], LEVEL), *passing([2.3], LEVEL[2:])])


class TestPoorInitialisation:
    SHRINKING = layers([1.0, 0.1, 0.01, 1e-3, 1e-4, 1.0])

    def test_names_the_layers_of_largest_and_smallest_variance(self) -> None:
        (finding, stuck) = diagnose(passing(FLAT, self.SHRINKING))
        assert stuck.rule == "not learning"
        assert (finding.rule, finding.sites, finding.steps) == ("poor initialisation", ("layer4", "layer0"), (0, 9))
        assert finding.evidence["ratio"] == pytest.approx(1e8)
        assert "PoorWeightInitialization" in finding.source

    def test_is_not_reported_if_the_run_converges_is_young_or_was_attached_late(self) -> None:
        assert titles(passing(FALLING, self.SHRINKING)) == []
        assert titles(passing(FLAT[:19], self.SHRINKING)) == []
        assert titles(passing(FLAT, self.SHRINKING, first=500)) == []

    def test_layers_of_healthy_networks_differ_by_as_much(self) -> None:
        assert titles(passing(FLAT, layers([1.0, 0.4, 0.16, 0.1, 0.1, 1.0]))) == ["not learning"]

    def test_must_hold_in_all_of_the_first_steps(self) -> None:
        history = [with_outputs(one, LEVEL if one.step == 5 else self.SHRINKING) for one in passing(FLAT, LEVEL)]
        assert titles(history) == ["not learning"]

    def test_branches_that_start_at_zero_are_intended(self) -> None:
        assert titles(passing(FLAT, layers([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]))) == ["not learning"]

    def test_dead_units_are_another_fault(self) -> None:
        assert titles(passing(FLAT, layers([1.0, 1.0, 1e-9, 1e-9, 1e-9, 1.0], zeros=0.999))) == [
            "dead ReLU",
            "not learning",
        ]


class TestSaturation:
    @pytest.mark.parametrize(
        ("out", "is_saturated"),
        [
            (Out("act", "Tanh", 0.99), True),  # 1 - 0.99^2 = 0.02
            (Out("act", "Tanh", 0.9), False),
            (Out("act", "Sigmoid", math.sqrt(0.495), mean=0.5), True),  # 0 or 1
            (Out("act", "Sigmoid", 0.999, mean=0.999), True),
            (Out("act", "Sigmoid", 0.5, mean=0.5), False),
            (Out("act", "Sigmoid", math.sqrt(0.4), mean=0.5), False),
            (Out("act", "GELU", 0.999, mean=0.999), False),
        ],
        ids=["tanh", "small-tanh", "sigmoid-at-both-ends", "sigmoid-at-one", "half-sigmoid", "small-sigmoid", "gelu"],
    )
    def test_is_judged_by_the_mean_derivative(self, out: Out, is_saturated: bool) -> None:
        head = Out("head", "Linear", 1.0)
        assert titles(passing(FLAT[:10], [out, head])) == (["saturation"] if is_saturated else [])
        assert titles(passing(FALLING, [out, head])) == []
        assert titles(passing(FLAT[:10], [head, out])) == []  # a confident output

    def test_a_module_that_rarely_runs_is_not_saturated(self) -> None:
        history = passing(FLAT[:10], [Out("act", "Sigmoid", 0.999, mean=0.999), Out("head", "Linear", 1.0)])
        for one in history[:6]:
            one.signals.events.measured.present[0] = False
            one.signals.rows[0] = 0.0
        assert titles(history) == []

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
    def test_the_derivative_agrees_with_autograd(self, activation: type[nn.Module]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 400), activation(), nn.Linear(400, 1))
        nn.init.normal_(model[0].weight, std=40.0)
        images = torch.randn(64, 5)
        with gradprobe.attach(model, activations=True) as probe:
            model(images).sum().backward()
            probe.step()
            (finding,) = probe.findings()
        x = model[0](images).detach().requires_grad_()
        (derivative,) = torch.autograd.grad(activation()(x).sum(), x)
        assert finding.rule == "saturation"
        largest = {nn.Tanh: 1.0, nn.Sigmoid: 0.25}[activation]
        assert finding.evidence["slope"] == pytest.approx(derivative.mean().item() / largest, rel=1e-3)
        assert (derivative < 0.1 * largest).double().mean() >= 0.5  # as the formula states


class TestDeadReLU:
    @pytest.mark.parametrize(("zeros", "is_dead"), [(0.996, True), (0.994, False)])
    def test_half_of_the_units_must_be_dead(self, zeros: float, is_dead: bool) -> None:
        outputs = layers([1.0, 1.0, 1.0], zeros)
        assert titles(passing(FLAT[:10], outputs)) == (["dead ReLU"] if is_dead else [])
        assert titles(passing(FLAT[:9], outputs)) == []
        assert titles(passing(FALLING, outputs)) == []

    def test_units_may_die_late(self) -> None:
        history = [
            with_outputs(one, layers([1.0, 1.0, 1.0], 0.5 if one.step < 20 else 0.999)) for one in passing(FLAT, LEVEL)
        ]
        (finding, stuck) = diagnose(history)
        assert stuck.rule == "not learning"
        assert (finding.rule, finding.sites, finding.steps) == ("dead ReLU", ("relu0", "relu1"), (30, 39))
        assert "too large an update" in finding.cause

    def test_units_that_are_dead_before_the_first_update_died_of_no_update(self) -> None:
        dead = passing(FLAT, layers([1.0, 1.0, 1.0], 0.999))
        (finding,) = [one for one in diagnose(dead) if one.rule == "dead ReLU"]
        assert "before the first update" in finding.cause
        assert finding.remedies[0].startswith("He initialisation")

    def test_the_share_is_a_lower_bound_of_the_true_share(self) -> None:
        torch.manual_seed(0)
        relu = nn.ReLU()
        model = nn.Sequential(nn.Linear(20, 200), relu, nn.Linear(200, 1))
        nn.init.normal_(model[0].bias, mean=-3.5, std=1.0)
        active = torch.zeros(200)

        def count(_module: nn.Module, _inputs: object, y: torch.Tensor) -> None:
            active.add_((y > 0).sum(0))

        relu.register_forward_hook(count)
        with gradprobe.attach(model, activations=True) as probe:
            for _ in range(10):
                model(torch.randn(100, 20)).sum().backward()
                probe.step()
            (finding,) = [one for one in probe.findings() if one.rule == "dead ReLU"]
        truly_dead = (active / 1000 < 0.01).double().mean().item()
        assert finding.sites == ("1",)
        assert 0.5 < finding.evidence["dead_share"] <= truly_dead
        assert finding.evidence["active_share"] == pytest.approx(active.sum().item() / 200_000)

    def test_the_limits_can_be_set(self) -> None:
        history = passing(FLAT[:10], layers([1.0, 1.0, 1.0], 0.9))
        assert [one.rule for one in diagnose(history, Thresholds(dead_activity=0.3))] == ["dead ReLU"]
