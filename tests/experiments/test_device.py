"""Cells on a device: nothing is left on the CPU, no step waits, and every precision gives the same numbers again."""

import multiprocessing
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradprobe import networks
from gradprobe.cli import commands as cli
from gradprobe.errors import ArgumentError, BackendError, StoreError
from gradprobe.experiments import device, train
from gradprobe.experiments.data import augment, draw_batches, load, take_batch
from gradprobe.experiments.readers.raw import DataSpec
from gradprobe.experiments.step import TrainingStep
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.experiments.train import Recipe, make_optimizer, train_cell
from gradprobe.probe.probe import attach
from gradprobe.report.records import Cell

RECIPE = Recipe(epochs=2, batch_size=32)


@pytest.mark.soak
def test_a_cell_on_a_device_mixes_no_devices_and_reads_nothing_in_a_step():
    pytest.importorskip("torch.utils.backend_registration")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fake_cell"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Loss and number right of an evaluation: of both sets at the start, of the test set after the first epoch, of both
    # after the last; and the 3 steps of each epoch at once.
    evaluation, epoch = [(), ()], [(2, 3)]
    read = [*evaluation, *evaluation, *epoch, *evaluation, *epoch, *evaluation, *evaluation]
    assert done.stdout.splitlines() == [str(read)]


@pytest.fixture(scope="module")
def data():
    return load(DataSpec("digits", per_class=10))


def test_batches_drawn_at_once_are_those_drawn_one_after_another(data):
    data, size = replace(data, augmented=True), 30
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(100, generator=generator)
    batches = draw_batches(data, size, torch.Generator().manual_seed(7))
    assert batches.shape == (3, 4, 30)
    for step in range(3):
        chosen = order[step * size : (step + 1) * size]
        images, labels = take_batch(data, batches[step])
        assert torch.equal(images, augment(data.train_x[chosen], generator))
        assert torch.equal(labels, data.train_y[chosen])


def test_the_command_line_gives_device_and_graph_to_the_jobs(monkeypatch, tmp_path, capsys):
    noted = []

    def run(jobs, workers, checkpoint):
        noted.extend((job.device, job.graph, job.recipe.precision, len(workers)) for job in jobs)
        return iter(())

    monkeypatch.setattr(engines, "run_local", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    grid = ["--depths", "8", "--families", "plain", "--seeds", "0,1,2", "--precision", "bfloat16"]
    command = ["gradprobe", "sweep", *grid, "--no-graph", "--out", str(tmp_path / "run.sqlite")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert noted == [("cuda", False, "bfloat16", 2)] * 3


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_gpu_is_used_if_torch_sees_one(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve(asked) == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if asked == "auto":
        assert device.resolve(asked) == "cpu"
    else:
        with pytest.raises(BackendError, match="cuda was asked for, but torch sees no CUDA device; use --device cpu"):
            device.resolve(asked)


def test_each_process_uses_one_gpu(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    assert [str(device.use("cuda", number)) for number in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert used == [0, 1, 0, 1]
    assert engines.default_jobs("cuda") == 2


def test_workers_for_a_gpu_are_not_forked(monkeypatch):
    monkeypatch.setattr(engines, "_can_fork", lambda: True)
    with engines.Workers(1, device="cuda") as workers:
        assert workers._all == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads and fork, from Python 3.12 on
def test_a_worker_that_replaces_a_dead_one_has_its_number(monkeypatch):
    """The workers answer with their numbers; the one of the second job dies, and so does the one that replaces it."""

    def answer(number, connection, inherited, data):
        while True:
            job, _ = connection.recv()
            if job.cell.seed in (1, 2):
                os._exit(1)
            connection.send(engines.Failure(str(number), ""))
            if job.cell.seed == 0:
                connection.recv()  # busy until the end
            connection.send(None)

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(engines, "_run_worker", answer)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    jobs = [engines.Job(Cell(k, "plain", 8, k, 1, "pending"), DataSpec("digits"), RECIPE) for k in range(5)]
    seen = {}
    with engines.Workers(2, device="cuda") as workers:
        for job, result in workers.run(jobs, lambda cell: None):
            seen[job.cell.seed] = result.message
            if len(seen) == len(jobs):
                break
    died = "the worker ended with exit code 1"
    assert seen == {0: "0", 1: died, 2: died, 3: "1", 4: "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_worker_on_a_gpu_ends_with_a_job_that_fails(kind, monkeypatch):
    """An error can leave CUDA unusable in a process: the next job gets a new one, and no second failure is reported."""

    def run(job, state, data):
        if job.cell.seed == 0:
            raise ValueError("a broken capture")
        yield engines.Failure(str(os.getpid()), "")

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(engines.Job, "run", run)
    monkeypatch.setattr("gradprobe.experiments.data.load", lambda spec: SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(device, "use", lambda name, number: None)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(engines, "_can_fork", lambda: False)
    cells = [Cell(k, "plain", 8, k, 1, "pending") for k in range(2)]
    with engines.Workers(1, device=kind) as workers:
        results, started = [], []
        for job, result in workers.run([engines.Job(cell, None, RECIPE, device=kind) for cell in cells], {}.get):
            results.append((job.cell.seed, result.message))
            started += [worker.process.pid for worker in workers._all]
    assert results == [(0, "ValueError: a broken capture"), (1, str(started[-1]))]
    assert (started[0] == started[-1]) == (kind == "cpu")


def test_every_worker_trains_on_the_device_of_its_number(data, monkeypatch):
    """The worker runs here; its end of the connection is replaced."""
    job = engines.Job(Cell(1, "plain", 8, 0, 1, "pending"), data.spec, RECIPE, device="cuda", graph=False)
    sent, seen, used = [], [], []

    class Connection:
        def __init__(self, *jobs):
            self.jobs = list(jobs)

        def recv(self):
            if not self.jobs:
                raise EOFError
            return self.jobs.pop(0)

        def send(self, message):
            sent.append(message)

    def train_cell(*arguments, **options):
        seen.append((arguments[3], arguments[5], options))
        yield "result"

    loads = []
    monkeypatch.setattr(train, "train_cell", train_cell)
    monkeypatch.setattr("gradprobe.experiments.data.load", lambda spec: loads.append(spec) or data)
    monkeypatch.setattr(device, "use", lambda name, number: used.append((name, number)) or torch.device("meta"))
    monkeypatch.setattr(engines.signal, "signal", lambda *_: None)
    engines._run_worker(3, Connection((job, b"state"), (job, None)), (), None)
    assert sent == ["result", None, "result", None]
    assert loads == [data.spec]
    first, second = seen
    assert first[0] is second[0]  # uploaded once
    assert used == [("cuda", 3)]
    assert first[0].train_x.device.type == "meta"
    assert (first[1], second[1], first[2]) == (b"state", None, {"device": "cuda", "graph": False})


def matmul_settings():
    """Returns torch's settings of float32 matrix products, older and newer; None for one that cannot be read."""
    matmul = torch.backends.cuda.matmul

    def older(read):
        try:
            return read()
        except RuntimeError:
            return None

    older_ones = [older(lambda: matmul.allow_tf32), older(torch.get_float32_matmul_precision)]
    return [*older_ones, matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


@pytest.mark.parametrize(
    "change",
    [
        lambda: None,
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["default", "allow_tf32", "fp32_precision", "high", "medium"],
)
def test_a_gpu_computes_float32_in_float32_whatever_the_settings_are(change, monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    start = [one.fp32_precision for one in backends]
    try:
        change()
        before = matmul_settings()
        with device.training(torch.device("cuda"), None, 0):
            assert matmul_settings() == [False, "highest", "ieee", "ieee"]
            assert not torch.backends.cudnn.allow_tf32
        assert matmul_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for one, precision in zip(backends, start, strict=True):
            one.fp32_precision = precision


class TestPrecision:
    def test_the_probe_changes_no_bit(self, data, any_hooks):
        """In bfloat16 the branch is rounded before the residual add, whether or not the probe sees it."""

        def trained(observe):
            torch.manual_seed(0)
            model = networks.resnet(8, in_channels=1).to(memory_format=torch.channels_last)
            optimizer = make_optimizer(model, RECIPE)
            step = TrainingStep(model, optimizer, data, "bfloat16")
            probe = attach(model, optimizer=optimizer) if observe else None
            outcomes = [step(batch).tolist() for batch in draw_batches(data, 25, torch.Generator().manual_seed(0))]
            if probe is not None:
                assert [len(snapshot.junctions) for snapshot in probe.history()] == [3] * 4
            return outcomes, model.state_dict()

        (seen, observed), (alone, unobserved) = trained(True), trained(False)
        assert seen == alone
        assert all(torch.equal(value, unobserved[name]) for name, value in observed.items())

    def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(self, data, monkeypatch):
        seen = set()
        net = networks.resnet(8, in_channels=1)
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda _, __, y: seen.add(y.dtype))
        monkeypatch.setattr(train, "build", lambda *_: net)
        list(train_cell("resnet", 8, 0, data, replace(RECIPE, precision="bfloat16"), None))
        assert seen == {torch.bfloat16}
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}

    def test_bfloat16_resumes_bit_for_bit_and_differs_from_float32(self, data):
        recipe = replace(RECIPE, precision="bfloat16")
        whole = list(train_cell("resnet", 8, 0, data, recipe, None))
        rest = list(train_cell("resnet", 8, 0, data, recipe, whole[0].state))
        assert rest[-1].state == whole[-1].state
        exact = list(train_cell("resnet", 8, 0, data, RECIPE, None))
        losses = [results[-1].epochs[-1].train_loss for results in (whole, exact)]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)

    def test_it_is_part_of_a_run(self, monkeypatch, tmp_path):
        monkeypatch.setattr(engines, "run_local", lambda *_: iter(()))
        options = {"out": tmp_path / "run.sqlite", "depths": (8,), "seeds": (0,), "epochs": 1, "device": "cpu"}
        sweep(**options, precision="bfloat16")
        with open_run(options["out"]) as run:
            assert (run.config["precision"], run.config["device"]) == ("bfloat16", "cpu")
            assert 'precision = "bfloat16"' in run.specs()[0]
        with pytest.raises(StoreError, match="precision is 'bfloat16' in the file and 'float32' now"):
            sweep(**options)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(StoreError, match="device is 'cpu' in the file and 'cuda' now"):
            sweep(**{**options, "device": "auto", "jobs": 1}, precision="bfloat16")
        with pytest.raises(ArgumentError, match="precision: needed one of float32, bfloat16, got 'float16'"):
            sweep(**options, precision="float16")
