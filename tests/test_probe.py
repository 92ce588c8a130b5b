"""What a user sees of the probe in ordinary training loops."""

import copy
import gc
import json
import math
import warnings
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe
from gradprobe import hooks


@pytest.fixture(params=["native", "python"])
def any_hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ hooks and with their Python twin."""
    if request.param == "native" and hooks.native_hooks()[0] is None:
        pytest.skip(f"C++ hooks: {hooks.native_hooks()[1]}")
    if request.param == "python":
        monkeypatch.setattr(hooks, "native_hooks", lambda: (None, "switched off by a test"))
    return str(request.param)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def loss_of(model: nn.Module, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return model(x).square().mean()


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def true_norms(model: nn.Module) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(parameter.grad.detach().double().numpy().ravel()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def norms_of(snapshot: gradprobe.Snapshot | None) -> dict[str, float]:
    assert snapshot is not None
    return {name: stats.norm for name, stats in snapshot.sites.items()}


class TestNumbers:
    def test_every_statistic_equals_numpys(self, any_hooks: str) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        for name, parameter in model.named_parameters():
            truth = parameter.grad.double().numpy().ravel()
            site = snapshot[name]
            assert site.norm == pytest.approx(np.linalg.norm(truth), rel=1e-6)
            assert site.rms == pytest.approx(np.sqrt(np.mean(truth**2)), rel=1e-6)
            assert site.abs_max == np.abs(truth).max()
            assert site.abs_mean == pytest.approx(np.abs(truth).mean(), rel=1e-6)
            assert site.mean == pytest.approx(truth.mean(), rel=1e-5)
            assert site.std == pytest.approx(truth.std(), rel=1e-5, abs=1e-9)
            assert (site.zero_fraction, site.nonfinite, site.numel) == (0.0, 0, truth.size)
        everything = np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters()])
        assert snapshot.total_norm == pytest.approx(np.linalg.norm(everything), rel=1e-6)

    @pytest.mark.parametrize("magnitude", [1e-44, 1e-25, 1e25, 1e38], ids=str)
    def test_norms_outside_the_range_of_a_square(self, magnitude: float, any_hooks: str) -> None:
        weight = nn.Parameter(torch.zeros(4))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * torch.full((4,), magnitude)).sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0"].norm == pytest.approx(2 * float(torch.tensor(magnitude)), rel=1e-6)
        assert snapshot.total_norm == snapshot["0"].norm

    @pytest.mark.parametrize("magnitude", [1e-300, 1e300], ids=str)
    def test_float64_norms_outside_the_range_of_a_square(self, magnitude: float) -> None:
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * magnitude).sum().backward()
            clipped = probe.clip_grad_norm_(math.inf)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.total_norm == pytest.approx(2 * magnitude, rel=1e-12)
        assert snapshot["0"].abs_mean == pytest.approx(magnitude, rel=1e-12)
        assert clipped.item() == pytest.approx(2 * magnitude, rel=1e-12)

    def test_nan_and_infinity_are_counted_and_named(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            model[2].weight.grad[0, :2] = torch.tensor([math.nan, math.inf])
            probe.clip_grad_norm_(1.0)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["2.weight"].nonfinite == 2
        assert math.isnan(snapshot["2.weight"].norm)
        assert math.isnan(snapshot.total_norm)
        (finding,) = probe.findings()
        assert (finding.rule, finding.sites, finding.steps) == ("non-finite", ("2.weight",), (0, 0))


class TestSteps:
    def test_an_optimizer_closes_the_step_with_the_gradient_it_uses(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        truths = []
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(3):
                optimizer.zero_grad()
                for part in range(2):  # gradient accumulation
                    loss_of(model, seed=10 * seed + part).backward()
                truths.append(true_norms(model))
                optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]
        for snapshot, truth in zip(probe.history(), truths, strict=True):
            assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
            assert snapshot.provenance == ("unscaled", "local", "pre-clip")

    def test_without_an_optimizer_the_gradient_is_measured_before_zero_grad(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            truth = true_norms(model)
            optimizer.step()
            optimizer.zero_grad()
            probe.step(loss=0.25)
        snapshot = probe.latest()
        assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
        assert snapshot is not None
        assert snapshot.loss == 0.25

    def test_the_loss_may_follow_the_optimizers_step(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        losses = []
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(3):
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                optimizer.step()
                probe.step(loss=loss)
                losses.append(loss.item())
        assert [snapshot.loss for snapshot in probe.history()] == pytest.approx(losses)

    def test_an_optimizer_whose_step_calls_its_parents(self) -> None:
        class Announcing(torch.optim.SGD):
            def step(self, closure=None):  # type: ignore[no-untyped-def]
                return super().step(closure)

        model = mlp()
        sgd(model)  # an instance of the parent makes torch put the hooks around its step too
        optimizer = Announcing(model.parameters(), lr=0.1)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(3):
                optimizer.zero_grad()
                loss_of(model, seed).backward()
                optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]

    def test_step_may_be_called_just_before_the_optimizers(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(3):
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                probe.step(loss=loss)
                optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]

    @pytest.mark.parametrize("when", ["step", "backward"])
    def test_clipping_works_on_steps_that_are_not_measured(self, when: str, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, when=when, every=3) as probe:
            for seed in range(5):
                optimizer.zero_grad()
                loss_of(model, seed).backward()
                expected = math.hypot(*true_norms(model).values())
                assert probe.clip_grad_norm_(1e-3).item() == pytest.approx(expected, rel=1e-6)
                assert math.hypot(*true_norms(model).values()) == pytest.approx(1e-3, rel=1e-2)
                optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 3]

    def test_a_closure_is_measured_after_its_backward(self) -> None:
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        with gradprobe.attach(model, optimizer=optimizer) as probe:
            optimizer.step(closure)
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)
        assert len(probe.history()) == 1

    def test_every_third_step_and_paused_steps(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, every=3) as probe:
            for step in range(10):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                if step == 6:
                    with probe.paused():
                        optimizer.step()
                else:
                    optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 3, 9]

    @pytest.mark.parametrize("when", ["step", "backward", "hook"])
    def test_the_ring_keeps_the_newest(self, when: str, any_hooks: str) -> None:
        model = mlp()
        with gradprobe.attach(model, capacity=4, when=when) as probe:
            norms = []
            for step in range(11):
                model.zero_grad()
                loss_of(model, step).backward()
                norms.append(true_norms(model)["0.weight"])
                probe.step()
            assert [snapshot.step for snapshot in probe.history()] == [7, 8, 9, 10]
            assert [s["0.weight"].norm for s in probe.history()] == pytest.approx(norms[-4:], rel=1e-6)
            probe.detach()
        assert [snapshot.step for snapshot in probe.history()] == [7, 8, 9, 10]
        assert probe.latest() is not None

    def test_an_optimizer_that_steps_inside_backward(self) -> None:
        model = mlp()
        reference = copy.deepcopy(model)
        loss_of(reference).backward()
        optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

        def step_and_free(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step_and_free)
        with gradprobe.attach(model, when="hook") as probe:
            loss_of(model).backward()
            probe.step()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert norms_of(probe.latest()) == pytest.approx(true_norms(reference), rel=1e-6)

    def test_a_failed_backward_does_not_blind_the_next(self, any_hooks: str) -> None:
        model = mlp()

        def explode(_gradient: torch.Tensor) -> None:
            raise RuntimeError("planted")

        with gradprobe.attach(model) as probe:
            loss = loss_of(model)
            handle = model[0].weight.register_hook(explode)
            with pytest.raises(RuntimeError, match="planted"):
                loss.backward()
            handle.remove()
            model.zero_grad()
            loss_of(model).backward()
            probe.step()
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)

    @pytest.mark.parametrize("when", ["step", "backward"])
    def test_a_model_converted_later_is_followed(self, when: str, any_hooks: str) -> None:
        model = mlp()
        with gradprobe.attach(model, when=when) as probe:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                model.to(dtype)
                for seed in range(2):
                    model.zero_grad()
                    loss_of(model, seed, dtype).backward()
                    probe.step()
                assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)
            assert [snapshot.step for snapshot in probe.history()] == list(range(6))


class TestClipping:
    @pytest.mark.parametrize("max_norm", [1e-3, 1e9])
    @pytest.mark.parametrize("when", ["step", "backward"])
    def test_clips_as_torch_does(self, max_norm: float, when: str, any_hooks: str) -> None:
        ours, torchs = mlp(), mlp()
        for model in (ours, torchs):
            loss_of(model).backward()
            model.zero_grad(set_to_none=True)
        with gradprobe.attach(ours, when=when) as probe:
            loss_of(ours).backward()
            loss_of(torchs).backward()
            truth = true_norms(ours)
            total = probe.clip_grad_norm_(max_norm)
            expected = torch.nn.utils.clip_grad_norm_(torchs.parameters(), max_norm)
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
            for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-6, atol=0)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.provenance.clipping == "pre-clip"
        assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)

    def test_measures_once_per_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            passes = count_calls(monkeypatch, probe, "_measure")
            loss_of(model).backward()
            probe.clip_grad_norm_(0.1)
            optimizer.step()
            assert passes() == 1

    def test_torchs_own_clipping_is_labelled(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.provenance.clipping == "post-clip"
        assert snapshot.total_norm == pytest.approx(1e-3, rel=1e-3)

    def test_a_second_backward_after_clipping_is_measured(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            loss_of(model, 1).backward()
            probe.clip_grad_norm_(0.1)
            loss_of(model, 2).backward()
            truth = true_norms(model)
            optimizer.step()
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)

    def test_raises_on_a_nonfinite_norm_when_asked(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            model[0].bias.grad[0] = math.inf
            with pytest.raises(RuntimeError, match="finite total norm; got inf"):
                probe.clip_grad_norm_(1.0, error_if_nonfinite=True)


class TestScaler:
    @pytest.mark.parametrize("unscale_first", [False, True])
    @pytest.mark.parametrize("when", ["step", "backward"])
    def test_numbers_are_unscaled(self, when: str, unscale_first: bool, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with gradprobe.attach(model, optimizer=optimizer, when=when, grad_scaler=scaler) as probe:
            scaler.scale(loss_of(model)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                probe.clip_grad_norm_(1e9)
            scaler.step(optimizer)
            scaler.update()
        plain = mlp()
        loss_of(plain).backward()
        snapshot = probe.latest()
        assert norms_of(snapshot) == pytest.approx(true_norms(plain), rel=1e-5)
        assert snapshot is not None
        assert snapshot.provenance == ("unscaled", "local", "pre-clip")
        assert not snapshot.skipped

    def test_a_skipped_step_is_recorded_as_skipped(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with gradprobe.attach(model, optimizer=optimizer, grad_scaler=scaler) as probe:
            for bad in (True, False, False, True, True, False):
                before = copy.deepcopy(model.state_dict())
                optimizer.zero_grad()
                scaler.scale(loss_of(model) * (math.inf if bad else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items()) is bad
        skipped = [(snapshot.step, snapshot.skipped) for snapshot in probe.history()]
        assert skipped == list(enumerate([True, False, False, True, True, False]))
        assert probe.history()[0].sites["0.weight"].nonfinite > 0

    def test_skipped_steps_are_counted_between_measured_ones(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with gradprobe.attach(model, optimizer=optimizer, grad_scaler=scaler, every=2) as probe:
            for step in range(6):
                optimizer.zero_grad()
                scaler.scale(loss_of(model) * (math.inf if step in (1, 4) else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        assert [(s.step, s.skipped) for s in probe.history()] == [(0, False), (2, False), (4, True)]

    @pytest.mark.parametrize("bad", [False, True], ids=["sound", "infinite"])
    def test_a_fused_optimizer_that_unscales_by_itself(self, bad: bool) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with gradprobe.attach(model, optimizer=optimizer, grad_scaler=scaler) as probe:
            scaler.scale(loss_of(model) * (math.inf if bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        plain = mlp()
        loss_of(plain).backward()
        (snapshot,) = probe.history()
        assert snapshot.skipped is bad
        if not bad:
            assert norms_of(snapshot) == pytest.approx(true_norms(plain), rel=1e-5)

    def test_the_scaler_is_given_back(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu")
        gradprobe.attach(model, optimizer=optimizer, grad_scaler=scaler).detach()
        assert "step" not in vars(scaler)
        assert "unscale_" not in vars(scaler)


class TestOddGradients:
    def test_tied_parameters_count_once_and_answer_to_both_names(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        with gradprobe.attach(model) as probe:
            model(torch.ones(2, 4)).sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert len(snapshot) == 1
        assert snapshot["1.weight"] == snapshot["0.weight"]
        assert snapshot.total_norm == pytest.approx(model[0].weight.grad.norm().item())
        assert probe.coverage().tied == {"0.weight": ("0.weight", "1.weight")}

    def test_sparse_gradients(self, any_hooks: str) -> None:
        model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Linear(4, 1))
        with gradprobe.attach(model) as probe:
            model(torch.tensor([3, 7, 3])).sum().backward()
            assert model[0].weight.grad.is_sparse
            dense = model[0].weight.grad.to_dense()
            total = probe.clip_grad_norm_(0.5)
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0.weight"].norm == pytest.approx(dense.norm().item())
        assert snapshot["0.weight"].numel == 2 * 4
        assert total.item() == pytest.approx(snapshot.total_norm)
        after = math.hypot(*(p.grad.to_dense().norm().item() for p in model.parameters()))
        assert after == pytest.approx(0.5, rel=1e-4)

    def test_complex_gradients(self) -> None:
        weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        model = nn.ParameterList([weight])
        with gradprobe.attach(model) as probe:
            (weight * torch.tensor([3 + 4j, 0])).real.sum().backward()
            probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert (snapshot["0"].norm, snapshot["0"].abs_max, snapshot["0"].zero_fraction) == (5.0, 5.0, 0.5)

    def test_mixed_dtypes_and_scalars_and_empty_parameters(self, any_hooks: str) -> None:
        model = nn.ParameterDict(
            {
                "f16": nn.Parameter(torch.ones(3, dtype=torch.float16)),
                "f32": nn.Parameter(torch.ones(2)),
                "empty": nn.Parameter(torch.ones(0)),
                "bf16": nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
                "scalar": nn.Parameter(torch.tensor(1.0)),
            }
        )
        with gradprobe.attach(model) as probe:
            sum((2 * parameter.float()).sum() for parameter in model.values()).backward()
            probe.step()
        snapshot = probe.latest()
        expected = {"f16": 2 * 3**0.5, "f32": 2 * 2**0.5, "empty": 0.0, "bf16": 2 * 5**0.5, "scalar": 2.0}
        assert norms_of(snapshot) == pytest.approx(expected)
        assert list(norms_of(snapshot)) == [name for name, _ in model.named_parameters()]

    def test_channels_last_and_expanded_gradients(self) -> None:
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        model = nn.Sequential(conv)
        with gradprobe.attach(model) as probe:
            conv(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().mean().backward()
            probe.step()
            assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)
            conv.bias.grad = torch.tensor(2.0).expand(4)
            with pytest.warns(gradprobe.GradprobeWarning, match="an earlier backward"):
                probe.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0.bias"].norm == pytest.approx(4.0)


class TestCoverage:
    def test_a_parameter_that_never_fires_is_named_in_one_warning(self, any_hooks: str) -> None:
        model = mlp()
        model.unused = nn.Linear(2, 2)
        model[0].bias.requires_grad_(False)
        with gradprobe.attach(model) as probe:
            run_through(model)
            with pytest.warns(
                gradprobe.GradprobeWarning, match=r"no gradient for 2 of 7 sites: unused\.weight, unused\.bias"
            ):
                probe.step()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                run_through(model)
                probe.step()
            model[0].bias.requires_grad_(True)
            coverage = probe.coverage()
        assert probe.coverage().unknown == ()  # detached, it looks at no model
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
            with pytest.warns(gradprobe.GradprobeWarning, match="step 0: no parameter has a gradient"):
                probe.step()
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
            with pytest.warns(gradprobe.GradprobeWarning, match=r"no hook fired for 6 of 6 sites: 0\.weight"):
                optimizer.step()
            assert probe.coverage().unhooked == tuple(name for name, _ in model.named_parameters())
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)


class TestAttachChangesNothing:
    @pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
    def test_resnet_20_trains_to_the_same_bits(self, clip: bool, any_hooks: str) -> None:
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.arange(16) % 10

        def train(probed: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            torch.manual_seed(0)
            model = gradprobe.networks.resnet(20)
            optimizer = sgd(model, momentum=0.9, weight_decay=1e-4)
            probe = gradprobe.attach(model, optimizer=optimizer) if probed else None
            for _ in range(50):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                if probe is not None:
                    probe.step(loss=loss)
            if probe is not None:
                assert len(probe.history()) == 50
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
        with gradprobe.attach(model, optimizer=None if how == "step" else optimizer, grad_scaler=scaler) as probe:
            loss = loss_of(model)
            with RejectReads():
                (scaler.scale(loss) if scaler else loss).backward()
                if how == "clip":
                    probe.clip_grad_norm_(1.0)
                if scaler is None:
                    optimizer.step()
                probe.step(loss=loss)
            assert probe.latest() is not None


class TestExport:
    def test_pandas_is_tidy(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            for step in range(3):
                loss_of(model, step).backward()
                probe.step(loss=float(step))
        table = probe.to_pandas()
        assert list(table.columns[:4]) == ["step", "loss", "site", "kind"]
        assert len(table) == 3 * 6
        assert set(table.kind) == {"parameter"}
        last = table[(table.step == 2) & (table.site == "0.weight")].iloc[0]
        assert last.norm == pytest.approx(true_norms(model)["0.weight"], rel=1e-6)
        assert last.loss == 2.0

    def test_jsonl_is_strict_and_never_overwrites(self, tmp_path: "object") -> None:
        model = mlp()
        path = tmp_path / "history.jsonl"  # type: ignore[operator]
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            model[0].weight.grad[0, 0] = math.nan
            probe.clip_grad_norm_(1.0)
            probe.step()
            probe.to_jsonl(path)
        lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        assert [line["site"] for line in lines] == [name for name, _ in model.named_parameters()]
        assert lines[0]["norm"] == "nan"
        assert lines[1]["norm"] == probe.history()[0]["0.bias"].norm
        before = path.read_bytes()
        with pytest.raises(gradprobe.StoreError, match="does not exist yet"):
            probe.to_jsonl(path)
        assert path.read_bytes() == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"optimizer": "sgd"}, "optimizer: need a torch.optim.Optimizer or None; got str"),
            ({"every": 0}, "every: need an integer of at least 1; got 0"),
            ({"every": True}, "every: need an integer of at least 1; got True"),
            ({"capacity": 2.5}, "capacity: need an integer of at least 1; got 2.5"),
            ({"backend": "fpga"}, "backend: needed one of auto, native, triton, reference, got 'fpga'"),
            ({"when": "later"}, "when: need one of auto, step, backward, hook; got 'later'"),
            ({"grad_scaler": 2}, "grad_scaler: need a torch.amp.GradScaler or None; got int"),
            ({"params": False}, "params: need True"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, arguments: dict[str, object], message: str) -> None:
        model = mlp()
        with pytest.raises(gradprobe.ArgumentError, match="^" + message.replace("(", r"\(")):
            gradprobe.attach(model, **arguments)  # type: ignore[arg-type]
        gradprobe.attach(model).detach()  # a refused attach leaves nothing behind

    def test_what_is_not_there_yet_says_so(self) -> None:
        with pytest.raises(NotImplementedError, match="process_group: not available"):
            gradprobe.attach(mlp(), process_group=object())

    def test_models(self) -> None:
        with pytest.raises(gradprobe.ArgumentError, match=r"need a torch\.nn\.Module; got int"):
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
            pytest.raises(gradprobe.ArgumentError, match=r"has a probe already; call its detach\(\) first"),
        ):
            gradprobe.attach(model)
        gradprobe.attach(model).detach()

    def test_an_optimizer_of_another_model(self) -> None:
        with pytest.raises(gradprobe.ArgumentError, match="it steps none of them"):
            gradprobe.attach(mlp(), optimizer=sgd(mlp()))

    @pytest.mark.parametrize("loss", [torch.ones(2), "0.5", True, torch.ones(1, dtype=torch.complex64)], ids=repr)
    def test_losses(self, loss: object) -> None:
        with gradprobe.attach(mlp()) as probe, pytest.raises(gradprobe.ArgumentError, match=r"^loss: need"):
            probe.step(loss=loss)  # type: ignore[arg-type]

    def test_use_after_detach(self) -> None:
        probe = gradprobe.attach(mlp())
        probe.detach()
        with pytest.raises(gradprobe.GradprobeError, match="detached"):
            probe.step()
        with pytest.raises(gradprobe.GradprobeError, match="detached"):
            probe.clip_grad_norm_(1.0)


class RejectReads(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, which would stop a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in str(func), "a value was read on the host"
        return func(*args, **(kwargs or {}))


def run_through(model: nn.Module) -> None:
    model.zero_grad()
    x = torch.ones(2, 6)
    for k in range(5):
        x = model[k](x)
    x.sum().backward()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args: object) -> object:
        calls.append(None)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return lambda: len(calls)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradprobe.GradprobeWarning)
        yield
