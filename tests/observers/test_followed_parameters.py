"""What a probe holds, and how it follows a model whose parameters are swapped, replaced, frozen or given other data."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, sgd, true_norms
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradprobe
from gradprobe.ops import libraries

pytestmark = pytest.mark.usefixtures("probe_warnings_are_errors")


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


class TestHoldsNothing:
    @pytest.mark.parametrize("when", ["auto", "backward", "step", "hook"])
    def test_model_and_probe_are_freed_without_detach(self, when: str, any_hooks: str) -> None:
        model = mlp()
        probe = gradprobe.attach(model, when=when, updates=True, strict=True)  # type: ignore[arg-type]
        optimizer = sgd(model)
        loss_of(model).backward()
        optimizer.step()
        probe.step()
        parameter, alive = weakref.ref(model[0].weight), weakref.ref(probe)
        del model, probe, optimizer
        gc.collect()
        assert parameter() is None
        assert alive() is None

    def test_nothing_is_left_in_the_registries(self, any_hooks: str) -> None:
        from torch.nn.modules import module as modules
        from torch.optim import optimizer as optimizers

        registries = [
            optimizers._global_optimizer_pre_hooks,
            optimizers._global_optimizer_post_hooks,
            modules._global_parameter_registration_hooks,
            modules._global_module_registration_hooks,
        ]
        model = mlp()
        gradprobe.attach(model).detach()  # removes those of earlier probes that were collected
        before = [len(registry) for registry in registries]
        gradprobe.attach(model).detach()
        assert [len(registry) for registry in registries] == before
        probe = gradprobe.attach(model)
        assert [len(registry) for registry in registries] == [n + 1 for n in before]
        del model, probe
        gc.collect()
        gradprobe.attach(mlp()).detach()
        assert [len(registry) for registry in registries] == before

    @pytest.mark.parametrize("registers", [register_optimizer_step_pre_hook, register_module_module_registration_hook])
    def test_a_probe_may_be_collected_while_torch_goes_through_its_hooks(
        self, registers: Callable[..., Any], any_hooks: str
    ) -> None:
        other = mlp()
        forgotten = [other, gradprobe.attach(other)]
        del other

        def collect(*_: object) -> None:
            forgotten.clear()
            gc.collect()

        model = mlp()
        loss_of(model).backward()
        handle = registers(collect)
        late = registers(lambda *_: None)  # torch goes on to this one
        try:
            sgd(model).step()
            model.new = nn.Linear(1, 1)
        finally:
            handle.remove()
            late.remove()
        assert forgotten == []

    def test_data_of_another_shape(self, any_hooks: str) -> None:
        model = nn.Embedding(7, 4)
        with gradprobe.attach(model, strict=True) as probe:
            model(torch.tensor([6])).sum().backward()
            probe.step()
            model.zero_grad()
            model.weight.data = torch.randn(9, 4)
            model(torch.tensor([8, 8])).sum().backward()
            probe.step()
        assert [snapshot["weight"].numel for snapshot in probe.history()] == [28, 36]
        assert [snapshot["weight"].norm for snapshot in probe.history()] == [2.0, 4.0]

    def test_conversions_that_swap_tensors(self, swapping: None, any_hooks: str) -> None:
        model = mlp()
        with gradprobe.attach(model, strict=True) as probe:
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
                model.to(dtype)
                model.zero_grad()
                loss_of(model, dtype=dtype).backward()
                truth = true_norms(model)
                probe.step()
                assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2, 3]

    def test_a_state_that_is_swapped_in(self, swapping: None, any_hooks: str) -> None:
        model, other = mlp(), mlp(seed=5)
        with gradprobe.attach(model, strict=True) as probe:
            model.load_state_dict(other.state_dict())
            loss_of(model).backward()
            truth = true_norms(model)
            probe.step()
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)


def replace_head(model: nn.Module) -> None:
    model[4] = nn.Linear(3, 1)


def assign_state(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(mlp(seed=3).state_dict()), assign=True)


def parametrize(model: nn.Module) -> None:
    parametrizations.weight_norm(model[2])


def add_low_rank(model: nn.Module) -> None:
    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Linear(base.in_features, 1, bias=False)
            self.up = nn.Linear(1, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    for k in (0, 2, 4):
        model[k] = LowRank(model[k])


def write_past_the_registration(model: nn.Module) -> None:
    model[2]._parameters["weight"] = nn.Parameter(torch.randn(3, 5))


def taken(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the messages about changed parameters so far, so that they do not fail the test."""
    messages = [record.getMessage() for record in caplog.get_records("call") if record.name == "gradprobe"]
    caplog.clear()
    assert all("the parameters of the model are others now" in message for message in messages)
    return messages


class TestFollows:
    @pytest.mark.parametrize(
        "surgery",
        [replace_head, assign_state, parametrize, add_low_rank, write_past_the_registration],
        ids=lambda surgery: surgery.__name__,
    )
    def test_the_model_is_another(
        self, surgery: Callable[[nn.Module], None], any_hooks: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = mlp()
        with gradprobe.attach(model, updates=True, strict=True) as probe:
            for step in range(5):
                if step == 2:
                    kept = list(model.parameters())  # a new one at a freed address could not be told from the old
                    surgery(model)
                optimizer = sgd(model)
                optimizer.zero_grad()
                loss_of(model, step).backward()
                truth = true_norms(model)
                optimizer.step()
                snapshot = probe.latest()
                assert snapshot is not None
                assert norms_of(snapshot) == pytest.approx(truth, rel=1e-6)
                assert snapshot.total_norm == pytest.approx(sum(norm**2 for norm in truth.values()) ** 0.5, rel=1e-6)
                assert set(snapshot.updates) == set(truth)
            assert len(kept) == 6
            assert probe.coverage().unknown == ()
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2, 3, 4]
        assert [message.partition(": ")[0] for message in taken(caplog)] == ["step 2"]

    def test_a_parameter_that_is_unfrozen(self, any_hooks: str, caplog: pytest.LogCaptureFixture) -> None:
        model = mlp()
        model[0].requires_grad_(False)
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            assert probe.coverage().frozen == ("0.weight", "0.bias")
            loss_of(model).backward()
            optimizer.step()
            model[0].requires_grad_(True)
            model.zero_grad()
            loss_of(model).backward()
            truth = true_norms(model)
            optimizer.step()
            assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
            assert probe.coverage().frozen == ()
        assert [message.rpartition("others now: ")[2] for message in taken(caplog)] == ["new: 0.weight, 0.bias"]

    def test_a_parameter_that_is_frozen_for_a_while_stays(self, any_hooks: str) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, strict=True) as probe:
            for step in range(6):
                model[0].requires_grad_(step % 2 == 0)
                model.zero_grad()
                loss_of(model, step).backward()
                truth = true_norms(model)
                assert ("0.weight" in truth) == (step % 2 == 0)
                optimizer.step()
                assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)

    def test_removing_a_parametrization_brings_the_parameter_back(
        self, any_hooks: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = mlp()
        parametrizations.weight_norm(model[2])
        with gradprobe.attach(model, strict=True) as probe:
            loss_of(model).backward()
            probe.step()
            remove_parametrizations(model[2], "weight")
            model.zero_grad()
            loss_of(model).backward()
            truth = true_norms(model)
            probe.step()
        assert len(taken(caplog)) == 1
        assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)


class TestCompany:
    def test_hooks_of_the_user_before_and_after_attach(self, any_hooks: str) -> None:
        model = mlp()
        seen = []
        early = model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append("early"))
        probe = gradprobe.attach(model, strict=True)
        model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append("late"))
        model[2].weight.register_post_accumulate_grad_hook(lambda _: seen.append("first"))
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            truth = true_norms(model)
            probe.step()
            assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
        assert seen == ["first", "early", "late"] * 2
        probe.detach()
        early.remove()
        loss_of(model).backward()
        assert seen[6:] == ["first", "late"]

    @pytest.mark.parametrize("outer_goes_first", [True, False])
    def test_probes_on_a_model_and_on_a_part_of_it(self, outer_goes_first: bool, any_hooks: str) -> None:
        model = mlp()
        inner = gradprobe.attach(model[2], strict=True)
        outer = gradprobe.attach(model, strict=True)
        first, second = (outer, inner) if outer_goes_first else (inner, outer)
        loss_of(model).backward()
        for probe in (outer, inner):
            probe.step()
        assert outer.latest()["2.weight"].norm == inner.latest()["weight"].norm
        first.detach()
        model.zero_grad()
        loss_of(model).backward()
        second.step()
        assert len(second.history()) == 2
        assert second.latest().total_norm > 0
        second.detach()
        loss_of(model).backward()

    def test_copies_carry_no_probe(self, any_hooks: str) -> None:
        model = mlp()
        model.probe = gradprobe.attach(model, strict=True)
        again = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (again, loaded):
            assert other.probe is None
            loss_of(other).backward()
            gradprobe.attach(other).detach()
        assert model.probe.latest() is None
        model.probe.detach()


def run(program: str, seconds: float = 250.0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


class TestThreads:
    @pytest.mark.soak
    def test_attaching_and_detaching_beside_a_backward_pass_in_another_thread(self) -> None:
        """Frees of hooks that the engine was in, and hooks that ran before the probe was whole, crashed here."""
        assert (
            run(
                """
                import threading, time, torch, gradprobe
                from torch import nn
                torch.set_num_threads(1)
                model, stop = nn.Sequential(*[nn.Linear(8, 8) for _ in range(60)]), threading.Event()
                errors = []
                gradprobe.attach(model).detach()

                def train():
                    try:
                        while not stop.is_set():
                            model(torch.ones(4, 8)).sum().backward()
                    except BaseException as error:
                        errors.append(error)

                thread = threading.Thread(target=train)
                thread.start()
                begin, n = time.time(), 0
                while time.time() < begin + 3 or (n < 10 and time.time() < begin + 60):
                    gradprobe.attach(model, strict=True, activations=n % 2 == 0).detach()
                    n += 1
                stop.set()
                thread.join()
                print("ok" if not errors and n >= 10 else (n, errors))
                """
            )
            == "ok"
        )

    def test_detaching_inside_hooks_of_the_backward_pass(self, any_hooks: str) -> None:
        for when in ("auto", "hook"):
            model = mlp()
            probe = gradprobe.attach(model, when=when, strict=True)  # type: ignore[arg-type]
            model[2].weight.register_post_accumulate_grad_hook(lambda _, probe=probe: probe.detach())
            loss_of(model).backward()
            loss_of(model).backward()
            assert probe.history() == []

    def test_attaching_inside_a_hook(self, any_hooks: str) -> None:
        for _ in range(20):
            model = mlp()
            probes: list[gradprobe.Probe] = []

            def attach(_: torch.Tensor, model: nn.Module = model, probes: list[gradprobe.Probe] = probes) -> None:
                if not probes:
                    probes.append(gradprobe.attach(model, strict=True))

            for parameter in model.parameters():
                parameter.register_hook(attach)
            loss_of(model).backward()
            probes[0].detach()


@pytest.mark.skipif(libraries.native_hooks()[0] is None, reason="needs the C++ hooks")
def test_removed_hooks_are_freed_after_their_parameters() -> None:
    hooks = libraries.native_hooks()[0]
    for outlives in (True, False):
        model = mlp()
        probe = gradprobe.attach(model)
        loss_of(model).backward()
        if outlives:
            probe.detach()
        del model, probe
        gc.collect()
        hooks.free_removed_hooks()


def test_attach_takes_linear_time() -> None:
    gradprobe.attach(nn.Linear(1, 1)).detach()

    def seconds(n: int) -> float:
        model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(n)])
        begin = time.perf_counter()
        with gradprobe.attach(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) as probe:
            took = time.perf_counter() - begin
            assert sum(len(block) for block in probe._recorder.history.ring._blocks.values()) == 1
        return took

    small, large = (min(seconds(n) for _ in range(3)) for n in (1_000, 10_000))
    assert large < 25 * small + 0.05
