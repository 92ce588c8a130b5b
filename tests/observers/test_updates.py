"""The optimizer's updates, against differences of the parameters themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.errors import ArgumentError
from gradprobe.snapshot import Snapshot


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int, dtype: torch.dtype) -> Iterator[float]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        x = torch.randn(6, 5, generator=generator).to(dtype)
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        yield loss.item()
        optimizer.step()


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD, a loop": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_updates_are_the_differences_of_the_parameters(make, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    model = net().to(dtype)
    optimizer = make(model.parameters())
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        earlier = copies(model)
        for step, _ in enumerate(losses(model, optimizer, 4, dtype)):
            if step == 0:
                continue
            updates = probe.latest().updates
            assert list(updates) == list(earlier)
            for name, parameter in model.named_parameters():
                before, change = earlier[name].double(), parameter.detach().double() - earlier[name].double()
                update = updates[name]
                close = {"rel": 1e-12, "abs": 1e-14} if dtype is torch.float64 else {"rel": 1e-5, "abs": 1e-9}
                assert update.weight.norm == pytest.approx(before.norm().item(), rel=1e-6)
                assert update.weight.mean == pytest.approx(before.mean().item(), rel=1e-6)
                assert update.update.norm == pytest.approx(change.norm().item(), **close)
                assert update.update.mean == pytest.approx(change.mean().item(), **close)
                assert update.update.zero_fraction == pytest.approx((change == 0).double().mean().item())
                assert update.ratio == pytest.approx((change.norm() / before.norm()).item(), **close)
            earlier = copies(model)


def test_training_is_the_same_bit_for_bit() -> None:
    def trained(updates: bool) -> list[torch.Tensor]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        gradprobe.attach(model, optimizer=optimizer, updates=updates)
        list(losses(model, optimizer, 10, torch.float32))
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


@pytest.mark.parametrize(
    ("every", "updates_every", "expected"), [(1, 3, [0, 3, 6]), (2, 3, [0, 6]), (2, 1, [0, 2, 4, 6])]
)
def test_cadence(every: int, updates_every: int, expected: list[int]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, every=every, updates_every=updates_every) as probe:
        list(losses(model, optimizer, 8, torch.float32))
    assert [snapshot.step for snapshot in probe.history() if snapshot.updates] == expected


def test_the_newest_steps_are_kept() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, capacity=3) as probe:
        list(losses(model, optimizer, 8, torch.float32))
        kept = probe.history()
    assert [snapshot.step for snapshot in kept] == [5, 6, 7]
    assert len({snapshot.updates["0.weight"].weight.norm for snapshot in kept}) == 3
    assert [one.updates["0.weight"] for one in probe.history()] == [one.updates["0.weight"] for one in kept]


def test_an_optimizer_with_a_closure() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = torch.randn(6, 5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        before = copies(model)
        optimizer.step(closure)
        after = copies(model)
    for name, update in probe.latest().updates.items():
        assert update.update.norm == pytest.approx((after[name] - before[name]).norm().item(), rel=1e-5)


def test_parameters_outside_the_optimizer_are_excluded_and_ties_counted_once() -> None:
    model = net()
    model.append(nn.Linear(3, 3, bias=False))
    model.append(nn.Linear(3, 3, bias=False))
    model[4].weight = model[3].weight
    model[0].bias.requires_grad_(False)
    stepped = [model[0].weight, model[3].weight]
    optimizer = torch.optim.SGD(stepped, lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        list(losses(model, optimizer, 1, torch.float32))
    assert list(probe.latest().updates) == ["0.weight", "3.weight"]


def test_several_dtypes_including_complex() -> None:
    class Mixed(nn.Module):
        """Three dtypes."""

        def __init__(self) -> None:
            super().__init__()
            self.single = nn.Parameter(torch.full((3,), 2.0))
            self.wide = nn.Parameter(torch.full((2,), 4.0, dtype=torch.float64))
            self.spin = nn.Parameter(torch.full((2,), 3 + 4j))

        def forward(self) -> torch.Tensor:
            return self.single.sum() + self.wide.sum() + self.spin.abs().sum()

    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        model().backward()
        optimizer.step()
    updates = probe.latest().updates
    ratios = {name: update.ratio for name, update in updates.items()}
    assert ratios == {"single": pytest.approx(0.25), "wide": pytest.approx(0.125), "spin": pytest.approx(0.1)}
    assert updates["single"].update.mean == pytest.approx(-0.5)


def test_a_parameter_that_was_zero() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD([{"params": model.weight, "lr": 0.1}, {"params": model.bias, "lr": 0.0}])
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    updates = probe.latest().updates
    assert updates["weight"].ratio == math.inf
    assert math.isnan(updates["bias"].ratio)
    assert updates["bias"].update.zero_fraction == 1.0


def test_a_step_that_the_scaler_skips_updates_nothing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, grad_scaler=scaler) as probe:
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 5)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [(one.skipped, len(one.updates)) for one in probe.history()] == [(False, 4), (True, 0), (False, 4)]


def test_a_step_that_raises_leaves_no_update() -> None:
    class Fails(torch.optim.SGD):
        """Raises at the first step."""

        calls = 0

        def step(self, closure=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("not yet")
            return super().step(closure)

    model = net()
    optimizer = Fails(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True, updates_every=2) as probe:
        with pytest.raises(RuntimeError, match="not yet"):
            list(losses(model, optimizer, 1, torch.float32))
        list(losses(model, optimizer, 2, torch.float32))
    assert [len(snapshot.updates) for snapshot in probe.history()] == [0, 0, 4]


def test_a_model_that_changes_its_dtype() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        list(losses(model, optimizer, 2, torch.float32))
        model.double()
        list(losses(model, optimizer, 2, torch.float64))
        assert [len(snapshot.updates) for snapshot in probe.history()] == [4, 4, 4, 4]
    assert all(0 < snapshot.updates["0.weight"].ratio < 1 for snapshot in probe.history())


def test_tables_and_files_contain_updates(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        list(losses(model, optimizer, 2, torch.float32))
    table = probe.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table.groupby("kind").size().to_dict() == {"parameter": 8, "update": 8, "weight": 8}
    probe.to_jsonl(tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    (norm,) = [line["norm"] for line in lines if (line["step"], line["site"], line["kind"]) == (1, "2.bias", "update")]
    assert norm == probe.latest().updates["2.bias"].update.norm


@dataclass
class TwoOptimizers:
    """Trains a model with one optimizer for some parameters and another for the others; knows the true updates."""

    model: nn.Sequential
    of_first: Sequence[str]
    truths: list[dict[str, tuple[float, float]]] = field(default_factory=list)  # norms of weight and update, by step

    def __post_init__(self) -> None:
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.model.named_parameters():
            parts[name not in self.of_first].append(parameter)
        self.optimizers = torch.optim.SGD(parts[0], lr=0.1), torch.optim.Adam(parts[1], lr=0.01)

    def train(self, *turns: Sequence[int]) -> None:
        """Makes one step for each turn, with the optimizers at these positions."""
        for turn in turns:
            self.model.zero_grad()
            self.model(torch.ones(2, 5, dtype=self.model[0].weight.dtype)).abs().square().sum().backward()
            self.truths.append({})
            for k in turn:
                before = copies(self.model)
                self.optimizers[k].step()
                for name, parameter in self.model.named_parameters():
                    if (name in self.of_first) == (k == 0):
                        change = parameter.detach() - before[name]
                        self.truths[-1][name] = before[name].norm().item(), change.norm().item()


def update_norms(snapshot: Snapshot) -> dict[str, object]:
    """Returns the norms of weight and update, for comparison with those of `TwoOptimizers`."""
    return {
        name: pytest.approx((update.weight.norm, update.update.norm), rel=1e-5)
        for name, update in snapshot.updates.items()
    }


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("of_first", [("0.weight", "0.bias"), ("0.weight", "2.weight"), ("2.bias",)], ids=str)
def test_two_optimizers_in_each_step(of_first: Sequence[str], dtype: torch.dtype, capacity: int) -> None:
    training = TwoOptimizers(net().to(dtype), of_first)
    with gradprobe.attach(training.model, updates=True, capacity=capacity) as probe:
        training.train((0, 1), (1, 0), (0, 1))
    assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2][-capacity:]
    for snapshot in probe.history():
        assert list(snapshot.updates) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert training.truths[snapshot.step] == update_norms(snapshot)


def test_two_optimizers_that_take_turns() -> None:
    training = TwoOptimizers(net(), ("0.weight", "2.bias"))
    with gradprobe.attach(training.model, updates=True, capacity=3) as probe:
        training.train((0,), (1,), (0, 1), (0,), (1,))
    assert [list(snapshot.updates) for snapshot in probe.history()] == [
        ["0.weight", "0.bias", "2.weight", "2.bias"],
        ["0.weight", "2.bias"],
        ["0.bias", "2.weight"],
    ]
    for snapshot in probe.history():
        assert training.truths[snapshot.step] == update_norms(snapshot)


def test_bad_arguments_are_rejected() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="updates_every: needed an integer of at least 1, got 0"):
        gradprobe.attach(model, optimizer=optimizer, updates=True, updates_every=0)
    with pytest.raises(ArgumentError, match="updates: needed True or False, got 'all'"):
        gradprobe.attach(model, optimizer=optimizer, updates="all")  # type: ignore[arg-type]
