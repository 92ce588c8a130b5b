"""A sweep that is stopped or killed, or whose workers die, leaves nothing running and resumes to the same numbers."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.sweep_commands import Command, contents, none_runs, wait_until, workers_of

from gradprobe.errors import GradprobeError
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run

SOAK = pytest.mark.soak
linux_only = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads process states from Linux's /proc")


def stop_at_random(command, moments, number, whole_group):
    """Stops a sweep by a signal at a random time after it has recorded a random number of epochs."""
    before = command.recorded_epochs()
    process = command.start()
    epochs, delay_s = moments.randrange(4), moments.uniform(0, 0.4)
    wait_until(lambda: process.poll() is not None or command.recorded_epochs() >= before + epochs, 200)
    time.sleep(delay_s)
    assert process.poll() is None, "the sweep ended before it could be stopped: train for more epochs"
    workers = workers_of(process)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate()
    assert wait_until(partial(none_runs, workers), 120), "a worker outlived its sweep"


def check_kills(command, count, seed):
    moments = random.Random(seed)
    for number in range(count):
        stop_at_random(command, moments, signal.SIGKILL, whole_group=number % 2 == 1)
    command.finish()
    names = sorted(entry.name for entry in command.out.parent.iterdir())
    assert names == [command.out.name, f"{command.out.name}.lock"]
    assert contents(command.out) == command.undisturbed()


@linux_only
def test_a_kill_changes_nothing(images, tmp_path):
    check_kills(Command(tmp_path / "run.sqlite", images), count=1, seed=4)


@linux_only
@SOAK
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_change_nothing(images, tmp_path, seed):
    command = Command(tmp_path / "run.sqlite", images, epochs=16)
    check_kills(command, count=10, seed=seed)
    again = tmp_path / "again.sqlite"
    spec = [sys.executable, "-m", "gradprobe.cli", "sweep", "--spec", str(command.out), "--out", str(again)]
    subprocess.run(spec, check=True, stdout=subprocess.DEVNULL)
    assert contents(again) == contents(command.out)


@linux_only
@SOAK
@pytest.mark.timeout(900)
def test_ten_signals_to_stop_change_nothing(images, tmp_path):
    command, moments = Command(tmp_path / "run.sqlite", images, epochs=16), random.Random(0)
    for count in range(10):
        stop_at_random(command, moments, (signal.SIGTERM, signal.SIGINT)[count // 2 % 2], whole_group=count % 2 == 1)
    command.finish()
    assert contents(command.out) == command.undisturbed()


@linux_only
@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="SIGINT", marks=SOAK)],
)
def test_a_signal_to_the_whole_group_stops_the_sweep_in_order(images, tmp_path, number, status):
    command = Command(tmp_path / "run.sqlite", images, epochs=1000)
    process = command.start()
    assert wait_until(lambda: command.recorded_epochs() >= 4, 200)
    workers = workers_of(process)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == status
    assert errors.decode().splitlines()[-1] == f"stopped; run the same command again to resume {command.out}"
    assert wait_until(partial(none_runs, workers), 120)
    with open_run(command.out) as run:
        cells = run.cells()
    assert [cell.failure for cell in cells] == [""] * len(cells)


@linux_only
@SOAK
def test_no_epoch_begins_after_the_time_limit(images, tmp_path):
    command = Command(tmp_path / "run.sqlite", images, epochs=1000, more=("--max-hours", "0.003"))
    began = time.monotonic()
    process = command.start()
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 124
    assert time.monotonic() - began < 120  # 11 s, and what ends the epoch and the imports take
    assert errors.decode().splitlines()[-1].startswith("stopped by --max-hours; run the same command again")
    assert command.recorded_epochs() > 2


NETS = """
import os, signal
from torch import nn

class Mortal(nn.Sequential):
    def __init__(self, depth, in_features):
        super().__init__(nn.Flatten(), nn.Linear(in_features, depth), nn.ReLU(), nn.Linear(depth, 10))
        self.depth, self.steps = depth, 0

    def forward(self, x):
        self.steps += self.training and len(x) == 32
        if self.steps == 3 and self.depth == 9 and "MORTAL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == 3 and self.depth == 8 and "MORTAL" in os.environ:
            os._exit(3)
        return super().forward(x)
"""


@pytest.mark.soak
@linux_only
def test_a_worker_that_dies_fails_its_cell_only(images, tmp_path, monkeypatch):
    (tmp_path / "mortal.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MORTAL", "")
    options = {"data": f"cifar10:{images}", "models": ["mortal.py:Mortal"], "seeds": (0,), "epochs": 3}
    options |= {"out": tmp_path / "run.sqlite", "jobs": 1, "batch_size": 32}
    with pytest.raises(GradprobeError, match=r"Mortal-9 seed 0: the worker was killed by signal 9, .*\(2 of 4 tr"):
        sweep(**options, depths=(9, 8, 7, 6))
    with open_run(options["out"]) as run:
        cells = {cell.depth: cell for cell in run.cells()}
        assert {depth: len(run.epochs(cell.id)) for depth, cell in cells.items()} == {9: 2, 8: 2, 7: 4, 6: 4}
    assert {depth: cell.failure for depth, cell in cells.items()} == {
        9: "the worker was killed by signal 9, as happens when memory runs out",
        8: "the worker ended with exit code 3",
        7: "",
        6: "",
    }
    assert [cells[depth].status for depth in (9, 8, 7, 6)] == ["pending", "pending", "done", "done"]
    monkeypatch.delenv("MORTAL")
    sweep(**options, depths=(9, 8))
    with open_run(options["out"]) as run:
        assert [(cell.status, cell.failure) for cell in run.cells()] == [("done", "")] * 4


@linux_only
@SOAK
def test_a_worker_that_is_killed_from_outside_fails_its_cell_only(images, tmp_path):
    command = Command(tmp_path / "run.sqlite", images, epochs=16)
    process = command.start()
    assert wait_until(lambda: command.recorded_epochs() >= 2, 200)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 2
    assert b": the worker was killed by signal 9, as happens when memory runs out" in errors.splitlines()[-1]
    with open_run(command.out) as run:
        assert sorted(cell.status for cell in run.cells()) == ["done", "done", "done", "pending"]
    command.finish()
    assert contents(command.out) == command.undisturbed()
