"""Ray trains a sweep to the numbers of local processes, also if workers are lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.sweep_commands import Command, contents, trained_here, wait_until

from gradprobe.errors import ArgumentError, BackendError, GradprobeError
from gradprobe.experiments.sweep.ray_engine import Cluster
from gradprobe.experiments.sweep.run import check_workers, sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.report.records import Cell

ray = pytest.importorskip("ray", reason="needs ray, which gradprobe[ray] installs")

NETS = """
import os, signal
from pathlib import Path
from torch import nn

class Mortal(nn.Sequential):
    # Counts its steps in a file, and kills its process from the fifth on unless it is deep or is spared.
    def __init__(self, depth, in_features, folder):
        super().__init__(nn.Flatten(), nn.Linear(in_features, depth), nn.BatchNorm1d(depth), nn.Linear(depth, 10))
        self.depth, self.folder = depth, Path(folder)

    def forward(self, x):
        if self.training and len(x) == 32:
            with open(self.folder / f"steps-{self.depth}", "a") as file:
                file.write("x")
                n_steps = file.tell()
            spared = self.folder / f"spared-{self.depth}"
            if n_steps >= 5 and self.depth < 9 and not spared.exists():
                if self.depth == 8:
                    spared.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.depth == 6:
            raise ValueError("no such\\nweight")
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        "local", num_cpus=2, num_gpus=1, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def options(images, tmp_path):
    (tmp_path / "mortal.py").write_text(NETS.replace("self.depth == 6:", "self.depth == 6 and self.training:"))
    model = f"{tmp_path}/mortal.py:Mortal(folder={str(tmp_path)!r})"
    options = {"out": tmp_path / "run.sqlite", "data": f"cifar10:{images}", "models": [model], "seeds": (0,)}
    return options | {"epochs": 4, "batch_size": 32, "jobs": 2}


def test_a_lost_worker_changes_nothing(cluster, options, tmp_path, capsys):
    sweep(**options, depths=(8, 9), engine="ray")
    assert capsys.readouterr().out == ""
    with open_run(options["out"]) as run:
        assert [(cell.status, cell.failure) for cell in run.cells()] == [("done", "")] * 2
    # Two steps in each of four epochs, and the step in which the worker was killed once more.
    assert [len((tmp_path / name).read_text()) for name in ("steps-8", "steps-9")] == [9, 8]
    local = tmp_path / "local.sqlite"
    with trained_here():
        sweep(**{**options, "out": local}, depths=(8, 9))
    assert contents(options["out"]) == contents(local)


def test_a_worker_that_is_lost_again_and_again_fails_its_cell_only(cluster, options, tmp_path):
    with pytest.raises(GradprobeError, match=r"Mortal.*-7 seed 0: its worker was lost 4 times in one epoch: .*died"):
        sweep(**options, depths=(7, 9), engine="ray")
    with open_run(options["out"]) as run:
        assert [(len(run.epochs(cell.id)), cell.status) for cell in run.cells()] == [(3, "pending"), (5, "done")]
        assert run.cells()[0].failure.startswith("its worker was lost 4 times")
    assert len((tmp_path / "steps-7").read_text()) == 4 + 4
    (tmp_path / "spared-7").touch()
    sweep(**options, depths=(7, 9), engine="ray")
    assert len((tmp_path / "steps-7").read_text()) == 4 + 4 + 4


def test_an_exception_is_named_as_from_a_local_process(cluster, options):
    with pytest.raises(GradprobeError, match=r"-6 seed 0: ValueError: no such\nweight"):
        sweep(**options, depths=(6, 9), engine="ray")
    with open_run(options["out"]) as run:
        assert [cell.status for cell in run.cells()] == ["pending", "done"]


def test_no_epoch_begins_after_the_time_limit(cluster, options):
    sweep(**options, depths=(9,), engine="ray", until=time.time() - 1)
    with open_run(options["out"]) as run:
        assert [(len(run.epochs(cell.id)), cell.failure) for cell in run.cells()] == [(0, "")]


def test_the_cluster_says_how_many_cells_it_has_room_for(cluster):
    for num_gpus, room in ((0, 2), (0.25, 2), (1, 1)):
        with Cluster(None, None, num_gpus) as one:
            assert len(one) == room
    with (
        pytest.raises(BackendError, match="no machine of the Ray cluster has 1 CPU and 2 GPUs"),
        Cluster(None, None, 2),
    ):
        pass
    assert ray.is_initialized()  # it was not its own


@pytest.mark.parametrize("num_gpus", [0, 0.25, 1])
def test_what_a_cell_needs_is_reserved(cluster, num_gpus):
    class Job:
        cell = Cell(1, "plain", 8, 0, 1, "pending")

        def run(self, state, data):
            yield ray.get_runtime_context().get_assigned_resources()

    with Cluster(None, None, num_gpus) as one:
        ((_, reserved),) = one.run([Job()], lambda _: None)
    assert reserved == {"CPU": 1} | ({"GPU": num_gpus} if num_gpus else {})


def test_cells_train_on_the_gpus_that_are_reserved():
    assert [check_workers(None, "ray", "auto", num_gpus) for num_gpus in (0, 0.5)] == ["cpu", "cuda"]
    with pytest.raises(ArgumentError, match="num_gpus: needed some for device cuda"):
        check_workers(None, "ray", "cuda")


@pytest.mark.parametrize(
    ("address", "message"),
    [("ray://127.0.0.1:10001", "needed RAY_ADDRESS=HOST:PORT of the cluster"), ("nowhere", "cannot connect to Ray at")],
)
def test_a_bad_address_is_an_error_in_one_line(images, tmp_path, address, message):
    command = Command(tmp_path / "run.sqlite", images, more=("--engine", "ray"))
    process = command.start(env=os.environ | {"RAY_ADDRESS": address})
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 2
    assert message in errors.decode().splitlines()[-1]
    assert not command.out.exists()


def tasks():
    """Returns the processes that train."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "ray::_train" in line]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("is_new", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["this", "new"])
def test_a_stopped_command_leaves_no_task_on_the_cluster(cluster, images, tmp_path, is_new):
    address = {} if is_new else {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment = os.environ | address
    command = Command(tmp_path / "run.sqlite", images, epochs=1000, more=("--engine", "ray"))
    process = command.start(env=environment)
    assert wait_until(lambda: command.recorded_epochs() >= 4, 200)
    assert len(tasks()) == 2
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 143
    assert errors.decode().splitlines()[-1] == f"stopped; run the same command again to resume {command.out}"
    assert wait_until(lambda: tasks() == [], 120)
    assert wait_until(lambda: ray.available_resources().get("CPU") == 2, 120)
