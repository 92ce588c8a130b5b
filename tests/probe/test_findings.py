"""What a user reads after a training of their own: findings of the probe, and steps handed out once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
import torch
from helpers.probe_cases import RejectReads, loss_of, mlp, sgd
from torch import nn

import gradprobe
from gradprobe.diagnosis.diagnosis import Diagnosis

IMAGES = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
LABELS = IMAGES[:, :10].argmax(1)


def classifier(n_hidden: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(n_hidden) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def batch_loss(model: nn.Module, generator: torch.Generator, factor: float = 1.0) -> torch.Tensor:
    chosen = torch.randint(len(IMAGES), (32,), generator=generator)
    return nn.functional.cross_entropy(model(factor * IMAGES[chosen]), LABELS[chosen])


def found_after(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clear: Callable[[], None],
    n_steps: int = 40,
    before_step: Callable[[], object] = lambda: None,
    n_backwards: int = 1,
) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:
        for _ in range(n_steps):
            clear()
            losses = [batch_loss(model, generator) for _ in range(n_backwards)]
            for loss in losses:
                loss.backward()
            before_step()
            optimizer.step()
            probe.step(losses[0])
        return [finding.rule for finding in probe.findings()]


class TestGradientsNotCleared:
    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=lambda make: make.__name__)
    @pytest.mark.parametrize("clips", [False, True], ids=["", "clipping"])
    def test_a_missing_zero_grad_is_named(self, make: type[torch.optim.Optimizer], clips: bool) -> None:
        model = classifier()
        clip = (lambda: nn.utils.clip_grad_norm_(model.parameters(), 10.0)) if clips else (lambda: None)
        rules = found_after(model, make(model.parameters(), lr=1e-3), lambda: None, before_step=clip)
        assert rules[0] == "gradients not cleared"

    def test_every_way_of_clearing_counts(self) -> None:
        for way in ("none", "zero", "by hand", "unseen"):
            model = classifier()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

            def clear(way: str = way, model: nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> None:
                if way in ("none", "zero"):
                    optimizer.zero_grad(set_to_none=way == "none")
                    return
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        (parameter.grad if way == "by hand" else parameter.grad.data).zero_()

            assert found_after(model, optimizer, clear) == [], way

    def test_accumulating_over_micro_batches_is_meant(self) -> None:
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert found_after(model, optimizer, optimizer.zero_grad, n_backwards=3) == []


class TestContestedLoss:
    def test_the_loss_of_a_gan_is_not_judged(self) -> None:
        torch.manual_seed(0)
        maker, judge = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        of_maker, of_judge = sgd(maker), torch.optim.SGD(judge.parameters(), lr=0.3)
        with gradprobe.attach(maker, optimizer=of_maker) as probe, gradprobe.attach(judge) as other:
            for _ in range(60):
                real, made = torch.randn(16, 8) + 2, maker(torch.randn(16, 4))
                of_judge.zero_grad()
                loss = nn.functional.softplus(-judge(real)).mean() + nn.functional.softplus(judge(made.detach())).mean()
                loss.backward()
                of_judge.step()
                other.step(loss)
                of_maker.zero_grad()
                loss = nn.functional.softplus(-judge(made)).mean()
                loss.backward()
                of_maker.step()
                probe.step(loss)
            for diagnosis in (probe.findings(), other.findings()):
                assert {"unstable loss", "not learning", "gradients not cleared"}.isdisjoint(
                    finding.rule for finding in diagnosis
                )
                assert "an optimizer of other parameters steps in turn" in diagnosis.unjudged["unstable loss"]
            assert all(snapshot.is_contested for snapshot in probe.history()[1:])

    def test_one_optimizer_or_two_that_step_together_contest_nothing(self) -> None:
        model = mlp()
        parts = [torch.optim.SGD(model[k].parameters(), lr=0.1) for k in (0, 2, 4)]
        with gradprobe.attach(model) as probe:
            for seed in range(30):
                model.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                for part in parts:
                    part.step()
                probe.step(loss)
            assert [snapshot.is_contested for snapshot in probe.history()] == [False] * 30


class TestTrainingsOfUsers:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_adamw_at_a_hundred_times_the_usual_rate(self, seed: int) -> None:
        def train(rate: float) -> Diagnosis:
            torch.manual_seed(seed)
            layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
            model = nn.Sequential(
                nn.Linear(8, 32),
                nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
                nn.Flatten(),
                nn.Linear(256, 10),
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
            generator = torch.Generator().manual_seed(seed)
            with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
                for _ in range(60):
                    chosen = torch.randint(len(IMAGES), (64,), generator=generator)
                    loss = nn.functional.cross_entropy(model(IMAGES[chosen].view(-1, 8, 8)), LABELS[chosen])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    probe.step(loss)
                return probe.findings()

        assert train(1e-3).healthy
        too_high = train(1e-1)
        assert too_high[0].rule == "updates too large"
        assert too_high[0].evidence["update_ratio"] > 0.1

    @pytest.mark.parametrize("gives_loss", [False, True], ids=["", "loss"])
    def test_dead_units_are_named_whether_the_loss_is_given_or_not(self, gives_loss: bool) -> None:
        model, generator = classifier(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True) as probe:
            for _ in range(60):
                loss = batch_loss(model, generator, factor=30.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if gives_loss:
                    probe.step(loss)
            findings = {finding.rule: finding for finding in probe.findings()}
        assert "dead ReLU" in findings
        assert findings["silent parameter"].follows != ""

    def test_a_resumed_plateau_is_no_lack_of_learning(self) -> None:
        model, generator = classifier(1), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def train(n_steps: int, probe: gradprobe.Probe | None) -> None:
            for _ in range(n_steps):
                loss = batch_loss(model, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if probe is not None:
                    probe.step(loss)

        train(600, None)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            train(100, probe)
            assert probe.findings().healthy

    def test_a_spike_outlives_the_history(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        with gradprobe.attach(model, optimizer=optimizer, capacity=8) as probe:
            for step in range(200):
                loss = loss_of(model, step) * (1e3 if step == 60 else 1.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                probe.step(loss)
            assert len(probe.history()) == 8
            (spike,) = [finding for finding in probe.findings() if finding.rule == "spike"]
            assert spike.steps == (60, 60)
        assert [finding.rule for finding in probe.findings()].count("spike") == 1  # after detach, too


def test_reading_from_another_thread_harms_neither() -> None:
    model = mlp()
    optimizer = sgd(model)
    done, errors = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                probe.findings(), probe.drain(), probe.first_nonfinite()
            except Exception as error:  # noqa: BLE001, PERF203
                errors.append(error)

    with gradprobe.attach(model, optimizer=optimizer, strict=True, capacity=20) as probe:
        reader = threading.Thread(target=read)
        reader.start()
        for seed in range(400):
            loss = loss_of(model, seed)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            probe.step(loss)
        done.set()
        reader.join()
    assert errors == []
    assert probe.findings().n_steps == 400


class TestDrain:
    def test_each_step_comes_once_whoever_else_reads(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        seen: list[int] = []
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(10):
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                optimizer.step()
                probe.step(loss)
                if seed % 3 == 0:
                    probe.history(), probe.findings()
                    seen += [snapshot.step for snapshot in probe.drain()]
        assert seen == list(range(10))
        assert probe.drain() == []

    def test_a_step_waits_for_its_loss(self) -> None:
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer) as probe:
            for seed in range(2):
                optimizer.zero_grad()
                loss = loss_of(model, seed)
                loss.backward()
                optimizer.step()
                if seed == 0:
                    probe.step(loss)
            assert [snapshot.step for snapshot in probe.drain()] == [0]
            probe.step(loss)
            assert [(snapshot.step, snapshot.loss) for snapshot in probe.drain()] == [(1, pytest.approx(loss.item()))]

    def test_steps_that_have_left_the_history_are_gone(self) -> None:
        model = mlp()
        with gradprobe.attach(model, capacity=4) as probe:
            for step in range(6):
                model.zero_grad()
                loss_of(model, step).backward()
                probe.step()
            assert [snapshot.step for snapshot in probe.drain()] == [2, 3, 4, 5]

    def test_steps_before_a_change_of_the_model_are_not(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            for step in range(4):
                if step == 2:
                    model[2] = nn.Linear(5, 3)
                model.zero_grad()
                loss_of(model, step).backward()
                probe.step()
                if step == 0:
                    assert len(probe.drain()) == 1
            assert [snapshot.step for snapshot in probe.drain()] == [1, 2, 3]

    def test_it_reads_no_tensor(self) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            loss = loss_of(model)
            loss.backward()
            probe.step(loss.detach())
            with RejectReads():
                assert len(probe.drain()) == 1


def test_a_signal_handler_may_read_while_the_training_judges() -> None:
    model = mlp()
    optimizer = sgd(model)
    seen: list[int] = []

    def read(*_: object) -> None:
        seen.append(probe.findings().n_steps)
        probe.drain(), probe.first_nonfinite()

    before = signal.signal(signal.SIGALRM, read)
    try:
        with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:
            signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
            for seed in range(300):
                loss = loss_of(model, seed)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                probe.step(loss)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 3
    assert probe.findings().n_steps == 300
