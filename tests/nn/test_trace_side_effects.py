"""Tracing at the first forward leaves training as it was: checkpoints, parameters, state, hooks and threads."""

from __future__ import annotations

import random
import threading
import warnings
from collections import UserDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import gradprobe
from gradprobe.nn.graph_paths import GraphPaths
from gradprobe.nn.instrument import Instrumented

X = torch.linspace(-2, 2, 4 * 8).reshape(4, 8).sin()


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any, Instrumented]:
    """Returns an instrumented model that waits for its first forward, an equal plain one, and the report."""
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    return model, make(), gradprobe.instrument(model)


class Checkpointing(nn.Module):
    """Checkpoints its blocks."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.blocks, self.use_reentrant = nn.Sequential(Block(), Block()), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.blocks, x, use_reentrant=self.use_reentrant)
        return y


@pytest.mark.parametrize("inner", [False, True])
def test_the_first_forward_may_be_within_a_checkpoint(inner: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointing()
    report = gradprobe.instrument(model.blocks if inner else model)
    y: Tensor = model(X) if inner else checkpoint(model, X, use_reentrant=False)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(report.junctions) == 2


def test_outer_hooks_on_saved_tensors_do_not_see_the_trace() -> None:
    model, plain, _ = pair(Block)
    saved: list[list[tuple[int, ...]]] = []
    for each in (model, plain):
        shapes: list[tuple[int, ...]] = []

        def keep(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            each(X)
        saved.append(shapes)
    assert saved[0] == saved[1]


class Averaging(nn.Module):
    """Moves a teacher towards its block while it runs, as BYOL does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.teacher = Block(), Block().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, new in zip(self.teacher.parameters(), self.block.parameters(), strict=True):
                mean.mul_(0.9).add_(new, alpha=0.1)
                mean.data.mul_(0.99)
            target = self.teacher(x)
        y: Tensor = self.block(x) - target
        return y


def test_parameters_that_a_forward_writes_to_are_written_to_once() -> None:
    model, plain, report = pair(Averaging)
    for _ in range(2):
        assert torch.equal(model(X), plain(X))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert "block.second+" in report.junctions


class Recurrent(nn.Module):
    """Adds two layers in every round, in its own forward or by a cell."""

    def __init__(self, by_cell: bool) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(8, 8), nn.Linear(8, 8)
        self.cell = Cell() if by_cell else None

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(8)
        for row in x:
            if self.cell is None:
                state = torch.tanh(self.of_input(row) + self.of_state(state))
            else:
                state = self.cell(row, state)
        return state


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, row: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.of_input(row) + self.of_state(state))


class Deepening(nn.Module):
    """Applies one residual block in every round."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(200):
            x = x + 0.01 * self.layer(x).relu()
        return x


@pytest.mark.parametrize(
    ("make", "found"),
    [(lambda: Recurrent(False), ()), (lambda: Recurrent(True), ()), (Deepening, ("layer+",))],
    ids=["loop", "cell", "residual"],
)
def test_long_loops_are_traced_in_steps_that_do_not_grow(
    make: Callable[[], nn.Module], found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    walk = GraphPaths.origins
    monkeypatch.setattr(GraphPaths, "origins", lambda *args, **keywords: (walks.append(1), walk(*args, **keywords))[1])
    report = gradprobe.instrument(make(), torch.linspace(-2, 2, 200 * 8).reshape(200, 8).sin())
    assert report.junctions == found
    assert len(walks) <= 2 * 2 * 10  # a forward in training and one in eval, two operands, each a few times


class AttributesByTable(Block):
    """Looks unknown attributes up in a table, and raises KeyError, not AttributeError."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return vars(self)["table"][name]


class NeverCloned(Tensor):
    """A tensor that cannot be copied."""

    def clone(self, **_: object) -> Any:
        raise NotImplementedError("clone")


class HoldsNeverCloned(Block):
    def __init__(self) -> None:
        super().__init__()
        self.held = torch.ones(3).as_subclass(NeverCloned)


@pytest.mark.parametrize(("kind", "reason"), [(AttributesByTable, "KeyError: "), (HoldsNeverCloned, "clone")])
def test_whatever_the_trace_raises_the_training_goes_on(kind: type[nn.Module], reason: str) -> None:
    model, plain, report = pair(kind)
    with pytest.warns(gradprobe.GradprobeWarning, match="could not be traced"):
        assert torch.equal(model(X), plain(X))
    assert reason in report.unseen[""]
    assert torch.equal(model(X), plain(X))


def test_several_gpus_are_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gradprobe.instrument(Block(), X)
    assert (report.junctions, kept) == (("second+",), [0, 1])


class Tally:
    """An object of the user's that counts."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.shapes: list[tuple[int, ...]] = []


class KeepsState(Block):
    """Has state of many kinds besides buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = (torch.Generator().manual_seed(1), np.random.default_rng(1), random.Random(1))
        self.old_generator = np.random.RandomState(1)
        self.recent: deque[float] = deque(maxlen=2)
        self.names: set[str] = set()
        self.nested: list[list[int]] = [[]]
        self.tally, self.counts, self.mean = Tally(), np.zeros(2), torch.zeros(8)
        self.hidden = [nn.BatchNorm1d(8)]

    def forward(self, x: Tensor) -> Tensor:
        of_torch, of_numpy, of_python = self.generators
        noise = torch.rand(8, generator=of_torch) + of_numpy.random() + of_python.random() + self.old_generator.rand()
        self.recent.append(noise.sum().item())
        self.names.add(str(len(self.names)))
        self.nested[0].append(len(x))
        self.tally.n_calls += 1
        self.tally.shapes.append(tuple(x.shape))
        self.counts += 1
        self.mean += x.mean(0)
        y: Tensor = super().forward(self.hidden[0](x) + noise)
        return y


def test_state_of_many_kinds_is_written_to_once() -> None:
    model, plain, report = pair(KeepsState)
    for _ in range(2):
        assert torch.equal(model(X), plain(X))
    for name in ("recent", "names", "nested"):
        assert getattr(model, name) == getattr(plain, name), name
    assert vars(model.tally) == vars(plain.tally)
    assert model.counts.tolist() == plain.counts.tolist() == [2, 2]
    assert torch.equal(model.mean, plain.mean)
    assert not model.mean.requires_grad
    assert torch.equal(model.hidden[0].running_mean, plain.hidden[0].running_mean)
    assert report.junctions == ("second+",)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_hooks_run_in_the_forward_of_the_training_alone() -> None:
    model, plain, report = pair(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), Block()))
    terms: list[Tensor] = []
    inputs: list[Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: terms.append(output.square().mean()))
        module.register_forward_pre_hook(lambda module, args, keywords: inputs.append(args[0]), with_kwargs=True)
    n_modules = len([*model.modules()])
    assert torch.equal(model(X), plain(X))
    assert (len(terms), len(inputs)) == (n_modules, n_modules)
    assert report.junctions == ("1.second+",)
    assert torch.equal(model(X), plain(X))
    assert len(terms) > n_modules


class CalledFromTwoThreads(Block):
    """Is called by a second thread while its first forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.second_thread: list[Callable[[], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        for start in self.second_thread:
            start()
        return super().forward(x)


def test_a_second_thread_gets_its_gradient() -> None:
    model, plain, report = pair(CalledFromTwoThreads)
    calls: list[str] = []
    other = threading.Thread(target=lambda: model(X).sum().backward())

    def start() -> None:
        if other.ident is None:
            other.start()
            other.join(0.2)
            calls.append("waits" if other.is_alive() else "ran through")

    model.second_thread.append(start)
    model.register_forward_hook(lambda *_: calls.append("hook"))
    model(X)
    model.second_thread.clear()
    other.join(60)
    plain(X).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert calls == ["waits", "hook", "hook"]
    assert report.junctions == ("second+",)
    assert "_call_impl" not in vars(model)


class FrozenBackbone(nn.Module):
    """Runs its backbone without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.block = nn.Sequential(Block(), Block()), Block()
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        y: Tensor = self.block(x)
        return y


@pytest.mark.filterwarnings("ignore:.*returned nothing:gradprobe.GradprobeWarning")
def test_a_part_that_runs_without_gradients_is_seen() -> None:
    model, plain, report = pair(FrozenBackbone)
    probe = gradprobe.attach(model)
    for each in (model, plain):
        each(X).sum().backward()
    probe.step()
    assert report.junctions == ("backbone.0.second+", "backbone.1.second+", "block.second+")
    gradients = [[one.grad for one in each.block.parameters()] for each in (model, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(one.grad is None for one in model.backbone.parameters())
    snapshot = probe.latest(wait=True)
    assert snapshot is not None
    assert "block.second+" in snapshot.junctions


def test_blocks_in_reentrant_checkpoints_are_seen() -> None:
    model, plain, report = pair(lambda: nn.Sequential(nn.Linear(8, 8), Checkpointing(use_reentrant=True)))
    for each in (model, plain):
        each(X).sum().backward()
    assert report.junctions == ("1.blocks.0.second+", "1.blocks.1.second+")
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert "apply" not in vars(CheckpointFunction)


class Graph:
    """Holds the features of nodes, as the graphs and batches of libraries do."""

    def __init__(self, x: Tensor) -> None:
        self.parts = {"x": [x]}

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name][0]


class OnGraphs(Block):
    def forward(self, graph: Any) -> Tensor:
        return super().forward(graph["x"].mul_(2))


@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("kind", [Graph, lambda x: UserDict(x=x)], ids=["object", "mapping"])
def test_inputs_in_objects_are_inputs(kind: Callable[[Tensor], Any], is_leaf: bool) -> None:
    model, plain, report = pair(OnGraphs)
    layer = nn.Linear(8, 8)
    inputs = [kind(X.clone() if is_leaf else layer(X)) for _ in range(2)]
    assert torch.equal(model(inputs[0]), plain(inputs[1]))
    assert torch.equal(inputs[0]["x"], inputs[1]["x"])
    assert report.junctions == ("second+",)
