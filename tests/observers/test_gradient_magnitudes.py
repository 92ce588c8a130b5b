"""The magnitudes of gradients in a training: which steps, which gradients, and that nothing else changes."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers.magnitude_cases import EDGES, attach, counts_of, newest
from helpers.probe_cases import RejectReads, loss_of, mlp, sgd
from torch import nn

import gradprobe
from gradprobe.errors import ArgumentError
from gradprobe.log import read_run
from gradprobe.snapshot import Magnitudes


def counts_in(magnitudes: dict[str, Magnitudes]) -> dict[str, list[int]]:
    return {name: one.counts.tolist() for name, one in magnitudes.items()}


def truth(model: nn.Module) -> dict[str, list[int]]:
    return {name: counts_of(one.grad) for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_counts_are_those_of_the_gradients(dtype: torch.dtype, backend: str, any_hooks: str) -> None:
    model = mlp(dtype=dtype)
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, backend=backend) as probe:
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed, dtype).backward()
            expected = truth(model)
            optimizer.step()
            found = newest(probe).magnitudes
            assert list(found) == [name for name, _ in model.named_parameters()]
            assert counts_in(found) == expected
            for name, one in found.items():
                assert one.abs_max == newest(probe)[name].abs_max
                assert one.numel == newest(probe)[name].numel


@pytest.mark.parametrize(
    ("every", "magnitudes_every", "expected"), [(1, 3, [0, 3, 6]), (2, 3, [0, 6]), (3, 1, [0, 3, 6]), (1, 100, [0])]
)
def test_cadence(every: int, magnitudes_every: int, expected: list[int]) -> None:
    model = mlp()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, every=every, magnitudes_every=magnitudes_every, capacity=20) as probe:
        for seed in range(8):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
        assert [snapshot.step for snapshot in probe.history() if snapshot.magnitudes] == expected
    assert [snapshot.step for snapshot in probe.history() if snapshot.magnitudes] == expected


def test_without_the_option_nothing_is_counted() -> None:
    model = mlp()
    with gradprobe.attach(model) as probe:
        loss_of(model).backward()
        probe.step()
    assert newest(probe).magnitudes == {}


@pytest.mark.parametrize("when", ["auto", "step", "hook"])
def test_training_is_the_same_bit_for_bit(when: str, any_hooks: str) -> None:
    def trained(magnitudes: bool) -> list[torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        given = None if when == "hook" else optimizer
        gradprobe.attach(model, optimizer=given, magnitudes=magnitudes, magnitudes_every=2, when=when)  # type: ignore[arg-type]
        for seed in range(6):
            optimizer.zero_grad()
            nn.functional.dropout(loss_of(model, seed).reshape(1) * torch.ones(3), 0.5).sum().backward()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


@pytest.mark.parametrize("by", ["torch", "the probe"])
def test_clipped_gradients_count_as_they_were_before(by: str, any_hooks: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as probe:
        loss_of(model).backward()
        expected = truth(model)
        clip = (
            probe.clip_grad_norm_
            if by == "the probe"
            else lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm)
        )
        clip(1e-6)
        optimizer.step()
        assert newest(probe).provenance.state == "clipped"
        assert counts_in(newest(probe).magnitudes) == expected != truth(model)


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_a_loss_scale_is_undone(scale: float, unscales: bool, any_hooks: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with attach(model, optimizer=optimizer, grad_scaler=scaler) as probe:
        scaler.scale(loss_of(model)).backward()
        expected = truth(model)  # measured at the end of the backward pass
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    found = newest(probe).magnitudes
    assert counts_in(found) == expected
    for name, one in found.items():
        assert one.edges[1:-1] == pytest.approx(EDGES[1:-1] / scale, rel=1e-12)
        assert one.abs_max == pytest.approx(newest(probe)[name].abs_max, rel=1e-12)


def test_a_step_that_the_scaler_skips() -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with attach(model, optimizer=optimizer, grad_scaler=scaler) as probe:
        for factor in (1.0, math.inf):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    finite, skipped = probe.history()
    assert skipped.skipped
    for snapshot in (finite, skipped):
        assert all(one.nonfinite == snapshot[name].nonfinite for name, one in snapshot.magnitudes.items())
    assert sum(one.nonfinite for one in skipped.magnitudes.values()) > 0


@pytest.mark.parametrize("when", ["auto", "step", "hook"])
def test_micro_batches_count_together(when: str, any_hooks: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    with attach(model, optimizer=None if when == "hook" else optimizer, when=when) as probe:
        for _ in range(2):
            optimizer.zero_grad()
            for seed in range(3):
                loss_of(model, seed).backward()
            expected = truth(model)
            if when == "hook":
                probe.step()
            optimizer.step()
            assert counts_in(newest(probe).magnitudes) == expected


def test_a_parameter_without_a_gradient_has_no_magnitudes() -> None:
    model = mlp()
    model.extra = nn.Linear(2, 2)  # type: ignore[assignment]
    with attach(model) as probe:
        nn.Sequential(*list(model)[:5])(torch.ones(2, 6)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the silent parameters
            probe.step()
    assert newest(probe).magnitudes.keys() == newest(probe).sites.keys()
    assert "extra.weight" not in newest(probe).magnitudes


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_sparse_and_complex_gradients() -> None:
    class Mixed(nn.Module):
        """An embedding with sparse gradients, and a complex parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 3, sparse=True)
            self.spin = nn.Parameter(torch.full((2,), 3 + 4j))

        def forward(self) -> torch.Tensor:
            return self.embedding(torch.tensor([1, 1, 4])).square().sum() + (5 * self.spin.abs()).sum()

    model = Mixed()
    with attach(model) as probe:
        model().backward()
        values = model.embedding.weight.grad.coalesce().values()
        probe.step()
    found = newest(probe).magnitudes
    assert counts_in(found) == {"embedding.weight": counts_of(values), "spin": counts_of(model.spin.grad.abs())}
    assert found["spin"].quantile_bounds(0.5) == pytest.approx((4.0, 5.0))


def test_a_model_that_changes_keeps_what_was_counted() -> None:
    model = mlp()
    with attach(model) as probe:
        seen = []
        for dtype in (torch.float32, torch.float64):
            model.to(dtype).zero_grad()
            loss_of(model, dtype=dtype).backward()
            seen.append(truth(model))
            probe.step()
        assert [counts_in(snapshot.magnitudes) for snapshot in probe.history()] == seen
    reordered = newest(probe).reordered([5, 4, 3, 2, 1, 0])
    assert list(reordered.magnitudes) == list(reordered.table.names)
    assert counts_in(reordered.magnitudes) == seen[1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_value_is_read_on_the_host(backend: str, any_hooks: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, backend=backend) as probe:
        loss = loss_of(model)
        with RejectReads():
            loss.backward()
            optimizer.step()
        assert newest(probe).magnitudes


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    model = mlp().cuda()
    optimizer = sgd(model)
    x = torch.randn(8, 6, device="cuda")
    with attach(model, optimizer=optimizer) as probe:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("default" if step == 0 else "error")  # the first step loads kernels
            try:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        expected = {name: counts_of(gradient.cpu()) for name, gradient in gradients.items()}
        assert counts_in(newest(probe).magnitudes) == expected


def test_a_failure_switches_off_only_the_magnitudes(monkeypatch: pytest.MonkeyPatch, any_hooks: str) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("planted")

    model = mlp()
    optimizer = sgd(model)
    with gradprobe.attach(model, optimizer=optimizer, magnitudes=True, magnitudes_every=1) as probe:
        monkeypatch.setattr("gradprobe.observers.magnitudes.MagnitudeObserver.count", fail)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for seed in range(3):
                optimizer.zero_grad()
                loss_of(model, seed).backward()
                optimizer.step()
        assert len([one for one in told if "measuring magnitudes failed" in str(one.message)]) == 1
        assert [(len(snapshot), snapshot.magnitudes) for snapshot in probe.history()] == [(6, {})] * 3
        assert probe.coverage().failures == {"magnitudes": "MemoryError: planted"}


def test_a_run_folder_and_the_tables_leave_them_out(tmp_path: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, log_dir=tmp_path / "run") as probe:
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
        probe.to_jsonl(tmp_path / "run.jsonl")
        assert len(probe.to_pandas()) == 3 * 6
        probe.flush()
    stored = read_run(tmp_path / "run").snapshots()
    assert [(snapshot.step, snapshot.magnitudes) for snapshot in stored] == [(0, {}), (1, {}), (2, {})]


def test_bad_arguments_are_rejected() -> None:
    with pytest.raises(ArgumentError, match="magnitudes: needed True or False, got 'all'"):
        gradprobe.attach(mlp(), magnitudes="all")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="magnitudes_every: needed an integer of at least 1, got 0"):
        gradprobe.attach(mlp(), magnitudes_every=0)
