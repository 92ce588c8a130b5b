"""A captured training step gives the numbers of an eager one; the graph is emulated on the CPU."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.few_digits import few_digits
from helpers.graph_tape import Capture
from helpers.sweep_commands import numbers

import gradprobe
from gradprobe import networks
from gradprobe.errors import BackendError
from gradprobe.experiments import graphed_step, train
from gradprobe.experiments.graphed_step import Captured
from gradprobe.experiments.train import Recipe, train_cell
from gradprobe.observers import cuda_graphs

pytestmark = pytest.mark.usefixtures("python_hooks")

RECIPE = Recipe(epochs=4, batch_size=10)


@pytest.fixture(scope="module")
def data():
    return few_digits(40, 20)


@pytest.fixture
def captures(monkeypatch):
    """Makes the CPU a device with graphs; returns the learning rates at which a step was captured, and the replays."""
    noted = {"rates": [], "replays": 0}
    trained = []
    attach = train.attach

    def attached(model, *, optimizer, **options):
        trained.append((model, optimizer))
        return attach(model, optimizer=optimizer, **options)

    def capture(run, device):
        model, optimizer = trained[-1]
        state = [*model.parameters(), *model.buffers()]
        state += [value for each in optimizer.state.values() for value in each.values()]
        noted["rates"].append(optimizer.param_groups[0]["lr"])
        random_state = torch.get_rng_state()
        with Capture(monkeypatch, state) as tape:
            result = run()
        torch.set_rng_state(random_state)
        assert tape.unconditional == []

        def replay():
            noted["replays"] += 1
            tape.replay()

        return Captured(replay, result)

    monkeypatch.setattr(train, "attach", attached)
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphed_step, "capture", capture)
    return noted


@pytest.mark.parametrize(
    ("family", "augmented", "precision"), [("plain", True, "float32"), ("resnet", False, "bfloat16")]
)
def test_a_replayed_step_gives_the_numbers_of_an_eager_one(
    data, captures, family, augmented, precision, probe_warnings_are_errors
):
    data, recipe = replace(data, augmented=augmented), replace(RECIPE, precision=precision)
    graphed = list(train_cell(family, 8, 0, data, recipe, None))
    eager = list(train_cell(family, 8, 0, data, recipe, None, graph=False))
    # Three of the 16 steps are eager; the learning rate drops after half of them and after three quarters.
    assert captures == {"rates": pytest.approx([0.1, 0.01, 0.001]), "replays": 13}
    assert numbers(graphed) == numbers(eager)
    assert [result.state for result in graphed] == [result.state for result in eager]
    n_junctions = 3 if family == "resnet" else 0
    assert [len(result.junctions) for result in graphed] == [n_junctions] * 4


def test_a_resumed_run_gives_the_same_numbers_with_dropout_too(data, captures, monkeypatch):
    def build(*_):
        return torch.nn.Sequential(networks.plain(8, in_channels=1), torch.nn.Dropout(0.5))

    monkeypatch.setattr(train, "build", build)
    whole = list(train_cell("plain", 8, 0, data, RECIPE, None))
    rest = list(train_cell("plain", 8, 0, data, RECIPE, whole[1].state))
    assert captures["replays"] == 13 + 5
    assert numbers(rest) == numbers(whole[2:])
    assert rest[-1].state == whole[-1].state


def test_divergence_ends_the_cell(data, captures):
    results = list(train_cell("plain", 8, 0, data, replace(RECIPE, learning_rate=1e30), None))
    assert [result.status for result in results] == ["diverged"]
    assert math.isnan(results[0].epochs[-1].running_loss)


def test_an_optimizer_that_counts_on_the_cpu_trains_without_a_graph(data, captures):
    recipe = replace(RECIPE, optimizer="adagrad")
    message = "the training step runs without a CUDA graph: Adagrad counts its steps outside the device$"
    with pytest.warns(gradprobe.GradprobeWarning, match=message) as warned:
        graphed = list(train_cell("resnet", 8, 0, data, recipe, None))
    assert len(warned) == 1
    assert numbers(graphed) == numbers(train_cell("resnet", 8, 0, data, recipe, None, graph=False))
    assert captures == {"rates": [], "replays": 0}


@pytest.mark.parametrize("breaks", [True, False])
def test_a_failed_capture_ends_the_cell_with_its_cause(data, monkeypatch, breaks):
    """After a capture that an error breaks, the device's generator refuses eager steps: none may follow."""
    net = networks.plain(8, in_channels=1)
    steps = []

    class Graph:
        is_on = False

        def __init__(self, graph, stream):
            pass

        def __enter__(self):
            Graph.is_on = True

        def __exit__(self, kind, *_):
            if breaks and kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture\nsecond line")

    def forward(*_):
        if torch.is_grad_enabled():
            steps.append(Graph.is_on)
            if Graph.is_on:
                raise ValueError("operation not permitted when stream is capturing\nsecond line")

    net.register_forward_pre_hook(forward)
    monkeypatch.setattr(train, "build", lambda *_: net)
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with pytest.raises(BackendError) as raised:
        list(train_cell("plain", 8, 0, data, RECIPE, None))
    assert str(raised.value) == (
        "the training step cannot be captured in a CUDA graph; train with --no-graph. "
        "ValueError: operation not permitted when stream is capturing"
        + ("; then RuntimeError: operation failed due to a previous error during capture" if breaks else "")
    )
    assert steps == [False, False, False, True]
