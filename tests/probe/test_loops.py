"""Training loops as people write them: closures, wrapped and several optimizers, micro-batches, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, sgd, true_norms
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import gradprobe

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")

Closure = Callable[[], torch.Tensor]


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, truths: list[dict[str, float]]) -> Closure:
    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = loss_of(model, seed=len(truths))
        loss.backward()
        truths.append(true_norms(model))
        return loss

    return closure


class WritesToGrad(torch.optim.SGD):
    """Forms its update in the gradient's place, as Muon and schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad.lerp_(parameter, 0.5), alpha=0.01)


class ClosureThenSuper(torch.optim.Adam):
    def step(self, closure: Closure | None = None) -> torch.Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


class BareWrapper(torch.optim.Optimizer):
    """Wraps an optimizer without calling the parent's constructor, as some trainers do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, object]]:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        self.inner.step(closure)  # type: ignore[arg-type]


class Lookahead(torch.optim.Optimizer):
    """A full optimizer around another one: both have hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        self.inner.step(closure)  # type: ignore[arg-type]


class Sam:
    """Two backward passes for each step, the second at a shifted point."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @torch.no_grad()
    def shift(self, model: nn.Module, by: float) -> None:
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=by)


class TestClosures:
    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda model: WritesToGrad(model.parameters(), lr=0.1),
            lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True),
            lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4),
            lambda model: ClosureThenSuper(model.parameters()),
            lambda model: Lookahead(torch.optim.AdamW(model.parameters())),
            lambda model: BareWrapper(sgd(model)),
        ],
        ids=["writes to grad", "nesterov", "LBFGS", "closure, then super", "Lookahead", "bare wrapper"],
    )
    def test_the_gradient_that_the_optimizer_was_given(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], given: bool, any_hooks: str
    ) -> None:
        model = mlp()
        ClosureThenSuper([nn.Parameter(torch.ones(1))])  # torch adds the hooks to a class when it first makes one
        torch.optim.Adam([nn.Parameter(torch.ones(1))])
        optimizer = make(model)
        truths: list[dict[str, float]] = []
        last = []
        with gradprobe.attach(model, optimizer=optimizer if given else None, strict=True) as probe:
            for _ in range(3):
                optimizer.step(closure_of(model, optimizer, truths))  # type: ignore[arg-type]
                last.append(truths[-1])
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]
        for snapshot, truth in zip(probe.history(), last, strict=True):
            assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
            assert (snapshot.provenance.state, snapshot.clip_factor) == ("raw", 1.0)

    def test_clipping_inside_the_closure(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = WritesToGrad(model.parameters(), lr=0.1)
        truths: list[dict[str, float]] = []
        inner = closure_of(model, optimizer, truths)

        def closure() -> torch.Tensor:
            loss = inner()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss

        with gradprobe.attach(model, strict=True) as probe:
            optimizer.step(closure)
        snapshot = probe.latest()
        assert norms_of(snapshot) == pytest.approx(truths[0], rel=1e-6)
        assert snapshot is not None
        assert snapshot.provenance.state == "clipped"
        assert snapshot.clip_factor == pytest.approx(0.01 / snapshot.total_norm, rel=1e-4)

    def test_a_closure_that_raises_passes_its_error_on(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        truths: list[dict[str, float]] = []

        def fails() -> torch.Tensor:
            raise KeyError("mine")

        with gradprobe.attach(model, strict=True) as probe:
            with pytest.raises(KeyError, match="mine"):
                optimizer.step(fails)  # type: ignore[arg-type]
            optimizer.step(closure_of(model, optimizer, truths))  # type: ignore[arg-type]
        assert [norms_of(snapshot) for snapshot in probe.history()] == [pytest.approx(truths[0], rel=1e-6)]

    def test_sharpness_aware_minimisation(self, any_hooks: str) -> None:
        model = mlp()
        sam = Sam(sgd(model))
        truths = []
        with gradprobe.attach(model, optimizer=sam, strict=True) as probe:  # type: ignore[arg-type]
            for seed in range(3):
                sam.inner.zero_grad()
                loss_of(model, seed).backward()
                sam.shift(model, 0.1)
                first = [parameter.grad.clone() for parameter in model.parameters()]
                sam.inner.zero_grad()
                loss_of(model, seed).backward()
                truths.append(true_norms(model))
                with torch.no_grad():
                    for parameter, gradient in zip(model.parameters(), first, strict=True):
                        parameter.sub_(gradient, alpha=0.1)
                sam.inner.step()
        assert [norms_of(snapshot) for snapshot in probe.history()] == [
            pytest.approx(truth, rel=1e-6) for truth in truths
        ]


class TestWhoClosesAStep:
    @pytest.mark.parametrize("given", ["both", "none", "first"])
    def test_two_optimizers_of_one_model_close_one_step(self, given: str) -> None:
        model = mlp()
        first, second = sgd(model[0]), torch.optim.AdamW(model[2:].parameters())
        options = {"both": [first, second], "none": None, "first": first}
        with gradprobe.attach(model, optimizer=options[given], strict=True) as probe:
            for seed in range(3):
                model.zero_grad()
                loss_of(model, seed).backward()
                first.step()
                second.step()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]

    def test_an_optimizer_of_another_model_closes_nothing(self) -> None:
        model, other = mlp(), mlp()
        optimizer = sgd(other)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            loss_of(other).backward()
            optimizer.step()
            assert probe.latest() is None
            sgd(model).step()
            assert probe.latest() is not None

    def test_a_group_that_is_added_later_makes_an_optimizer_count(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            optimizer.step()
            assert probe.history() == []
            optimizer.add_param_group({"params": list(model.parameters())})
            optimizer.step()
            assert len(probe.history()) == 1

    def test_an_optimizer_that_steps_nothing_of_the_model_any_more(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        stranger = nn.Parameter(torch.ones(1))
        with gradprobe.attach(model, optimizer=optimizer, updates=True, strict=True) as probe:
            optimizer.param_groups[0]["params"] = [stranger]
            loss_of(model).backward()
            stranger.sum().backward()
            optimizer.step()
            assert probe.latest().updates == {}
            assert probe.coverage().unstepped == tuple(name for name, _ in model.named_parameters())

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (True, r"the optimizer given to attach \(SGD\) has not stepped; the model is stepped by AdamW"),
            (False, r"no optimizer has stepped the model's parameters, and Probe\.step\(\) was not called"),
        ],
    )
    def test_backward_passes_that_nothing_closes_are_told_once(self, given: bool, reason: str) -> None:
        model = mlp()
        optimizer, forgotten = torch.optim.AdamW(model.parameters()), sgd(model)

        def train() -> None:
            with gradprobe.attach(model, optimizer=forgotten if given else None, strict=True):
                for seed in range(250):
                    model.zero_grad()
                    loss_of(model, seed).backward()
                    if given:
                        optimizer.step()

        with pytest.warns(gradprobe.GradprobeWarning, match=reason) as told:
            train()
        assert len([each for each in told if "backward passes" in str(each.message)]) == 1


class TestMicroBatches:
    @pytest.mark.parametrize("n_parts", [2, 3])
    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    def test_the_loss_of_each_part_is_averaged(self, given: bool, n_parts: int, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        truths, losses = [], []
        with gradprobe.attach(model, optimizer=optimizer if given else None, strict=True) as probe:
            for k in range(4 * n_parts):
                loss = loss_of(model, seed=k)
                loss.backward()
                losses.append(loss.item())
                if k % n_parts == n_parts - 1:
                    truths.append(true_norms(model))
                    optimizer.step()
                probe.step(loss)
                if k % n_parts == n_parts - 1:
                    optimizer.zero_grad()
        history = probe.history()
        assert [snapshot.step for snapshot in history] == [0, 1, 2, 3]
        assert [norms_of(snapshot) for snapshot in history] == [pytest.approx(truth, rel=1e-6) for truth in truths]
        means = [sum(losses[k : k + n_parts]) / n_parts for k in range(0, 4 * n_parts, n_parts)]
        assert [snapshot.loss for snapshot in history] == pytest.approx(means, rel=1e-6)

    @pytest.mark.parametrize("n_parts", [2, 4])
    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    def test_losses_given_before_the_optimizers_step_split_no_step(
        self, given: bool, n_parts: int, any_hooks: str
    ) -> None:
        model = mlp()
        optimizer = sgd(model)
        truths, losses = [], []
        with gradprobe.attach(model, optimizer=optimizer if given else None, strict=True) as probe:
            for k in range(3 * n_parts):
                loss = loss_of(model, seed=k)
                loss.backward()
                losses.append(loss.item())
                probe.step(loss)
                if k % n_parts == n_parts - 1:
                    truths.append(true_norms(model))
                    optimizer.step()
                    optimizer.zero_grad()
        history = probe.history()
        assert [snapshot.step for snapshot in history] == [0, 1, 2]
        assert [norms_of(snapshot) for snapshot in history] == [pytest.approx(truth, rel=1e-6) for truth in truths]
        means = [sum(losses[k : k + n_parts]) / n_parts for k in range(0, 3 * n_parts, n_parts)]
        assert [snapshot.loss for snapshot in history] == pytest.approx(means, rel=1e-6)

    def test_a_state_made_for_a_checkpoint_is_no_step(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters())
        with gradprobe.attach(model, strict=True) as probe:
            get_state_dict(model, optimizer)
            assert probe.history() == []
            loss_of(model).backward()
            truth = true_norms(model)
            optimizer.step()
        assert [(one.step, norms_of(one)) for one in probe.history()] == [(0, pytest.approx(truth, rel=1e-6))]
        assert probe.coverage().unhooked == ()

    def test_an_accumulation_that_ends_early_is_measured_before_clipping(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            truths = []
            for n_parts in (3, 3, 1, 5, 2, 2):
                optimizer.zero_grad()
                for part in range(n_parts):
                    loss_of(model, seed=part).backward()
                truths.append(true_norms(model))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
        assert [norms_of(snapshot) for snapshot in probe.history()] == [
            pytest.approx(truth, rel=1e-6) for truth in truths
        ]
        assert {snapshot.provenance.state for snapshot in probe.history()} == {"clipped"}

    def test_a_step_that_the_user_leaves_out_is_recorded(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            for step in range(4):
                optimizer.zero_grad()
                loss = loss_of(model, step) * (math.inf if step == 2 else 1.0)
                loss.backward()
                if math.isfinite(loss.item()):
                    optimizer.step()
                probe.step(loss)
        assert [(snapshot.step, snapshot.loss == math.inf) for snapshot in probe.history()] == [
            (0, False),
            (1, False),
            (2, True),
            (3, False),
        ]
        assert probe.first_nonfinite().step == 2


class TestWhatWasDoneToTheGradients:
    def test_other_changes_are_not_called_clipping(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        changes = [
            lambda gradients: torch.nn.utils.clip_grad_value_(model.parameters(), 0.01),
            lambda gradients: [gradient.add_(0.1) for gradient in gradients],
            lambda gradients: gradients[0].mul_(0.5),
            lambda gradients: [gradient.mul_(0.25) for gradient in gradients],
            lambda gradients: None,
        ]
        with gradprobe.attach(model, strict=True) as probe:
            for change in changes:
                optimizer.zero_grad()
                loss_of(model).backward()
                change([parameter.grad for parameter in model.parameters()])
                optimizer.step()
        assert [snapshot.provenance.state for snapshot in probe.history()] == [
            "modified",
            "modified",
            "modified",
            "clipped",
            "raw",
        ]
        assert [snapshot.clip_factor for snapshot in probe.history()] == [None, None, None, 0.25, 1.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_clipping_is_recognised_in_every_dtype(self, dtype: torch.dtype) -> None:
        model = mlp(dtype=dtype)
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model, dtype=dtype).backward()
            total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()
            optimizer.step()
        snapshot = probe.latest()
        assert snapshot.provenance.state == "clipped"
        assert snapshot.clip_factor == pytest.approx(0.05 / total, rel=2e-2)

    def test_clipped_by_torch_and_then_by_the_probe(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            truth = true_norms(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert probe.clip_grad_norm_(0.01).item() == pytest.approx(0.1, rel=1e-4)
            assert probe.clip_grad_norm_(1.0).item() == pytest.approx(0.01, rel=1e-4)
            optimizer.step()
        snapshot = probe.latest()
        assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
        assert snapshot.clip_factor == pytest.approx(0.01 / snapshot.total_norm, rel=1e-4)

    def test_one_bad_layer_is_not_smeared_by_clipping(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        model[2].weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.nan))
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert [name for name, site in probe.latest().sites.items() if site.nonfinite] == ["2.weight"]
        assert probe.first_nonfinite().site == "2.weight"

    def test_a_users_hook_that_changes_the_gradient_is_part_of_the_backward_pass(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)

        def triple(parameter: torch.Tensor) -> None:
            parameter.grad.mul_(3)

        model[0].weight.register_post_accumulate_grad_hook(triple)
        with gradprobe.attach(model, strict=True) as probe:
            model[2].weight.register_post_accumulate_grad_hook(triple)
            loss_of(model).backward()
            truth = true_norms(model)
            optimizer.step()
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
        assert probe.latest().provenance.state == "raw"
