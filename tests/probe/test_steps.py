"""When the probe measures: steps, optimizers, accumulation, clipping, loss scaling."""

import copy
import math

import pytest
import torch
from helpers.probe_cases import count_calls, loss_of, mlp, norms_of, sgd, true_norms

import gradprobe

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")


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
            assert snapshot.provenance == ("unscaled", "local", "raw")

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

    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("clips", [False, True], ids=["", "clipped"])
    def test_the_loss_may_come_before_the_optimizers_step_now_and_then(
        self, every: int, clips: bool, any_hooks: str
    ) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, every=every) as probe:
            for step in range(6):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                if clips:
                    probe.clip_grad_norm_(1.0)
                if step % 3 == 1:
                    probe.step(loss=float(step))
                optimizer.step()
        losses = {snapshot.step: snapshot.loss for snapshot in probe.history()}
        assert losses == {step: step if step % 3 == 1 else None for step in range(0, 6, every)}

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
        assert snapshot.provenance.state == ("clipped" if max_norm < 1 else "raw")
        assert snapshot.clip_factor == pytest.approx(min(1.0, max_norm / total.item()), rel=1e-5)
        assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)

    def test_measures_once_per_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            passes = count_calls(monkeypatch, probe._recorder._gradients, "measure")
            loss_of(model).backward()
            probe.clip_grad_norm_(0.1)
            optimizer.step()
            assert passes() == 1

    def test_torchs_own_clipping_is_labelled_and_undone(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            loss_of(model).backward()
            truth = true_norms(model)
            total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
            optimizer.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.provenance.state == "clipped"
        assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
        assert snapshot.clip_factor == pytest.approx(1e-3 / total, rel=1e-5)
        with pytest.warns(DeprecationWarning, match="use state"):
            assert snapshot.provenance.clipping == "pre-clip"

    def test_at_the_step_the_clipped_gradients_are_measured(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, when="step") as probe:
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.provenance.state == "modified"
        assert snapshot.clip_factor is None
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
            with pytest.raises(RuntimeError, match="finite total norm, got inf"):
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
        assert snapshot.provenance == ("unscaled", "local", "raw")
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


class TestChangedModels:
    def test_a_copy_of_a_partly_frozen_model_is_observed(self, any_hooks: str) -> None:
        model = mlp()
        model[0].requires_grad_(False)
        copied = copy.deepcopy(model)  # its frozen parameters never had autograd metadata
        with gradprobe.attach(copied, strict=True) as probe:
            loss_of(copied).backward()
            probe.step()
        assert norms_of(probe.latest()) == pytest.approx(true_norms(copied), rel=1e-6)

    def test_a_gradient_of_a_parameter_frozen_before_attach_is_clipped(self, any_hooks: str) -> None:
        ours, torchs = mlp(), mlp()
        for model in (ours, torchs):
            loss_of(model).backward()
            model[0].requires_grad_(False)
        with gradprobe.attach(ours, strict=True) as probe:
            for model in (ours, torchs):
                loss_of(model, 2).backward()
            total = probe.clip_grad_norm_(1e-3)
        torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(torchs.parameters(), 1e-3))
        torch.testing.assert_close(ours[0].weight.grad, torchs[0].weight.grad)

    def test_a_layer_that_goes_as_the_model_is_moved(self, any_hooks: str) -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))
        with gradprobe.attach(model, strict=True) as probe:
            model.double()
            del model[1]
            with pytest.warns(gradprobe.GradprobeWarning, match="others now"):
                loss_of(model, dtype=torch.float64).backward()
            probe.step()
            assert probe.coverage().observed == tuple(true_norms(model))
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)

    def test_a_step_the_user_has_closed_stays_if_the_next_accumulates(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            probe.step()
            optimizer.zero_grad()
            for seed in range(2):
                loss_of(model, seed).backward()
            optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1]

    def test_a_step_the_user_has_closed_before_the_dtype_changed_is_kept_once(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            probe.step()
            model.double()
            loss_of(model, 2, torch.float64).backward()  # accumulates
            optimizer.step()
            assert [snapshot.step for snapshot in probe.history()] == [0]
            assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)

    def test_a_gradient_that_is_missing_in_one_step_is_no_modification(self, any_hooks: str) -> None:
        model = torch.nn.ParameterDict({"often": torch.ones(2), "once": torch.ones(2)})
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:
            for _ in range(2):
                sum(parameter.sum() for parameter in model.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            model["often"].sum().backward()
            optimizer.step()
        assert [snapshot.provenance.state for snapshot in probe.history()] == ["raw", "raw"]

    @pytest.mark.parametrize("when", ["auto", "step"])
    def test_zeroing_before_the_last_backward_is_no_modification(self, when: str, any_hooks: str) -> None:
        model = torch.nn.ParameterDict({"often": torch.ones(2), "once": torch.ones(2)})
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, when=when, strict=True) as probe:  # type: ignore[arg-type]
            sum(parameter.sum() for parameter in model.values()).backward()
            optimizer.zero_grad(set_to_none=False)
            model["often"].sum().backward()
            optimizer.step()
        assert probe.latest().provenance.state == "raw"

    def test_findings_are_of_the_steps_since_the_last_change(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
        with gradprobe.attach(model) as probe:
            loss_of(model).backward()
            probe.step()
            model.append(torch.nn.Linear(1, 1))
            with pytest.warns(gradprobe.GradprobeWarning, match="others now"):
                loss_of(model).backward()
            probe.step()
            assert {finding.steps for finding in probe.findings()} <= {(1, 1)}

    def test_gradients_measured_one_by_one_after_a_change(self, any_hooks: str) -> None:
        model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))
        with gradprobe.attach(model, when="hook", strict=True) as probe:
            model[2] = torch.nn.Identity()
            with pytest.warns(gradprobe.GradprobeWarning, match="others now"):
                loss_of(model).backward()
            probe.step()
        assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)

    def test_every_evaluation_of_a_closure_is_measured(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            for part in range(n_backwards):
                loss = loss_of(model, part)
                loss.backward()
            return loss

        with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:
            for n_backwards in (2, 1):  # noqa: B007 (the closure reads it)
                optimizer.step(closure)
                assert norms_of(probe.latest()) == pytest.approx(true_norms(model), rel=1e-6)

    def test_updates_of_two_optimizers(self) -> None:
        model = mlp()
        optimizers = [torch.optim.SGD(model[k].parameters(), lr=0.1) for k in (0, 2)]
        with gradprobe.attach(model, optimizer=optimizers, updates=True, capacity=1, strict=True) as probe:
            for seed in range(3):
                loss_of(model, seed).backward()
                for optimizer in optimizers:
                    optimizer.step()
        assert [snapshot.step for snapshot in probe.history()] == [2]
