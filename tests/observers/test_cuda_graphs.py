"""Captured steps: each replay of a CUDA graph is measured, at the cadence given to attach."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.graph_tape import Capture
from helpers.signal_cases import Block
from torch import nn

import gradprobe
from gradprobe.observers import cuda_graphs
from gradprobe.ops import statistics

pytestmark = pytest.mark.usefixtures("python_hooks", "graphs_on_the_cpu")


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a probe treat the CPU as a device with graphs."""
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(6, 8), Block(8, True, branch), Block(8, False), nn.Linear(8, 1))


class Training:
    """A model with an optimizer, and batches copied into the tensor that a graph reads."""

    def __init__(self, **options: object) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.batch = torch.empty(5, 6)
        self.load(0)
        self.probe = gradprobe.attach(self.model, activations=True, **options)  # type: ignore[arg-type]

    def load(self, step: int) -> None:
        self.batch.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(step)))

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.batch).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def state(self) -> list[torch.Tensor]:
        momenta = [of["momentum_buffer"] for of in self.optimizer.state.values()]
        return [*self.model.parameters(), *momenta]


def assert_same(seen: gradprobe.Snapshot, expected: gradprobe.Snapshot) -> None:
    assert {name: site.norm for name, site in seen.sites.items()} == pytest.approx(
        {name: site.norm for name, site in expected.sites.items()}, rel=1e-6
    )
    assert list(seen.activations) == list(expected.activations)
    assert list(seen.junctions) == list(expected.junctions)
    for name, activation in expected.activations.items():
        assert seen.activations[name].output == activation.output
        assert seen.activations[name].gradient == activation.gradient
    for name, junction in expected.junctions.items():
        for part in ("x", "f", "y", "gradient", "shortcut", "branch"):
            assert getattr(seen.junctions[name], part) == getattr(junction, part), part
        assert seen.junctions[name].cosine == pytest.approx(junction.cosine, rel=1e-9)


@pytest.mark.filterwarnings("ignore:gradprobe")
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"activations_every": 3}], ids=str)
def test_replays_are_measured_at_the_cadence(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    eager, graphed = Training(**options), Training(**options)
    for training in (eager, graphed):  # a capture needs the optimizer's state to exist
        training.step()
        training.probe.step()
    with Capture(monkeypatch, graphed.state()) as graph:
        graphed.step()
    for step in range(1, 8):
        for training in (eager, graphed):
            training.load(step)
        eager.step()
        eager.probe.step()
        graph.replay()
        graphed.probe.step()
    seen, expected = graphed.probe.history(), eager.probe.history()
    assert [one.step for one in seen] == [one.step for one in expected]
    for snapshot, of_eager in zip(seen, expected, strict=True):
        assert_same(snapshot, of_eager)
    assert all(torch.equal(a, b) for a, b in zip(graphed.state(), eager.state(), strict=True))


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_a_graph_that_does_not_run_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(params=True)
    training.step()
    training.probe.step()
    with Capture(monkeypatch, training.state()) as graph:
        training.step()
    graph.replay()
    training.probe.step()
    training.probe.step()  # without a replay
    first, with_graph, without = training.probe.history()
    assert len(first.activations) == len(with_graph.activations) > 0
    assert len(without.activations) == len(without.junctions) == 0


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_eager_steps_between_replays_count_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.step()
    training.probe.step()
    with Capture(monkeypatch, training.state()) as graph:
        training.step()
    graph.replay()
    training.probe.step()
    training.step()
    training.probe.step()
    graph.replay()
    graph.replay()  # a second batch in one step: the graph overwrites the rows of the first
    training.probe.step()
    numels = [snapshot.activations["0"].output.numel for snapshot in training.probe.history()]
    assert numels == [40, 40, 40, 40]


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_a_replay_while_paused_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.step()
    training.probe.step()
    graphs = []
    for _ in range(2):
        with Capture(monkeypatch, training.state()) as graph:
            training.step()
        graphs.append(graph)
    with training.probe.paused():
        graphs[1].replay()
        training.probe.step()
        graphs[1].replay()
    with torch.no_grad():
        norm = training.model[0](training.batch).norm().item()
    graphs[0].replay()
    with training.probe.paused():
        for graph in graphs:
            training.load(1)
            graph.replay()
    training.probe.step()
    first, measured = training.probe.history()
    assert (first.step, measured.step) == (0, 2)
    output = measured.activations["0"].output
    assert (output.numel, output.norm) == (40, pytest.approx(norm, rel=1e-6))


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_replays_of_a_skipped_step_check_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(every=2)
    training.step()
    flags = []
    count_if = statistics.COUNT_IF

    def spy(flag: torch.Tensor, on: bool) -> None:
        flags.append(flag)
        count_if(flag, on)

    monkeypatch.setattr(statistics, "COUNT_IF", spy)
    with Capture(monkeypatch, training.state()) as graph:
        training.step()
    assert graph.unconditional == []
    assert all(flag is flags[0] for flag in flags)
    states = []
    for _ in range(4):
        training.probe.step()
        states.append(flags[0].item())
    assert states == [0, 1, 0, 1]
    training.probe.detach()
    assert flags[0].item() == 0


def test_the_end_of_a_step_in_a_graph_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = gradprobe.attach(model, optimizer=optimizer)
    with Capture(monkeypatch, list(model.parameters())) as graph:
        model(torch.ones(2, 6)).sum().backward()
        message = r"replaying the graph does not close a step. Call step\(\) after each"
        with pytest.warns(gradprobe.GradprobeWarning, match=message):
            optimizer.step()
    assert probe.history() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned already
        for loss in (2.0, 1.0):
            graph.replay()
            probe.step(loss=loss)
    assert [(snapshot.step, snapshot.loss) for snapshot in probe.history()] == [(0, 2.0), (1, 1.0)]


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_clipping_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.step()
    training.probe.step()
    before = training.probe.latest()
    with Capture(monkeypatch, training.state()) as graph:
        training.backward()
        training.probe.clip_grad_norm_(1e-3)
        training.optimizer.step()
    assert training.probe.latest().total_norm == before.total_norm  # no replay writes to a closed step
    graph.replay()
    training.probe.step()
    assert training.probe.latest().total_norm == pytest.approx(1e-3, rel=1e-3)
    assert training.probe.latest().provenance.state == "modified"
    assert training.probe.history()[0].total_norm == before.total_norm


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_a_nan_in_a_replay_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    training.step()
    training.probe.step()
    with Capture(monkeypatch, training.state()) as graph:
        training.step()
    for step in range(1, 4):
        training.load(step)
        if step == 2:
            training.batch[0, 0] = torch.nan
        graph.replay()
        training.probe.step()
    first = str(training.probe.first_nonfinite())
    assert first == "step 2, forward: 8 of 40 values are not finite in the output of '0'"
