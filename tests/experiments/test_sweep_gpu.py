"""The sweep on a GPU: no step waits, graphs and resumption change no bit, and the numbers are near those of the CPU."""

import io
from dataclasses import replace

import pytest
import torch
from helpers.sweep_commands import numbers

from gradprobe import networks
from gradprobe.experiments import device
from gradprobe.experiments.data import draw_batches, load
from gradprobe.experiments.readers.raw import DataSpec
from gradprobe.experiments.step import TrainingStep
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.experiments.train import Recipe, make_optimizer, train_cell

pytestmark = pytest.mark.gpu

RECIPE = Recipe(epochs=4, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return replace(load(DataSpec("digits", per_class=30)), augmented=True)


def tensors(state):
    found = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    momenta = [value for each in found["optimizer"]["state"].values() for value in each.values()]
    return [*found["model"].values(), *(value for value in momenta if isinstance(value, torch.Tensor))]


def assert_equal(results, others):
    assert numbers(results) == numbers(others)
    pairs = zip(tensors(results[-1].state), tensors(others[-1].state), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_graphs_and_resumption_change_no_bit(data, precision, optimizer, probe_warnings_are_errors):
    rate = 0.1 if optimizer == "sgd" else 1e-3
    recipe = replace(RECIPE, precision=precision, optimizer=optimizer, learning_rate=rate)
    graphed = list(train_cell("resnet", 14, 0, data, recipe, None, device="cuda"))
    assert_equal(graphed, list(train_cell("resnet", 14, 0, data, recipe, None, device="cuda", graph=False)))
    assert_equal(graphed[2:], list(train_cell("resnet", 14, 0, data, recipe, graphed[1].state, device="cuda")))
    assert all(len(result.junctions) == 6 for result in graphed)


def test_the_numbers_are_near_those_of_the_cpu(data):
    recipe = replace(RECIPE, learning_rate=0.01)
    here, there = ([*train_cell("resnet", 14, 0, data, recipe, None, device=name)] for name in ("cpu", "cuda"))
    first, second = ([row.norm_l2 for row in results[0].layers if row.epoch == 0] for results in (here, there))
    assert first == pytest.approx(second, rel=1e-3)
    first, second = ([result.epochs[-1].running_loss for result in results] for results in (here, there))
    assert first == pytest.approx(second, rel=0.05)


def test_no_step_waits_for_the_gpu(data):
    where = torch.device("cuda")
    placed = data.to(where)
    model = networks.resnet(8, in_channels=1).to(where, memory_format=torch.channels_last)
    step = TrainingStep(model, make_optimizer(model, RECIPE), placed, "bfloat16")
    with device.training(where, device.make_stream(where), 0):
        first, *rest = draw_batches(placed, 32, torch.Generator().manual_seed(0))
        step(first)  # loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in rest:
                step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_short_sweep(tmp_path):
    out = tmp_path / "run.sqlite"
    sweep(out=out, device="cuda", jobs=2, depths=(20,), seeds=(0,), epochs=3, precision="bfloat16")
    with open_run(out) as run:
        assert run.config["device"] == "cuda"
        assert [cell.status for cell in run.cells()] == ["done", "done"]
        for cell in run.cells():
            rows = run.epochs(cell.id)
            assert rows[-1].train_error_pct < rows[0].train_error_pct
            print(f"{cell.name}: seconds per epoch {[round(row.seconds, 2) for row in rows]}")
