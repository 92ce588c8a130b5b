"""Sweeps for tests: small images, sweeps in this process, and the command in a process that may be killed."""

import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.experiments.train import EpochResult

TABLES = ("meta", "cell", "epoch", "layer", "junction", "checkpoint")


def write_images(folder):
    """Writes a small set in CIFAR-10's layout; classes differ in brightness, so that networks can learn them."""
    rng = np.random.default_rng(0)
    for name, count in {"data_batch_1.bin": 64, "test_batch.bin": 16}.items():
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        pixels = rng.integers(0, 100, (count, 3072), dtype=np.uint8) + 15 * labels[:, None]
        np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8).tofile(folder / name)


@contextmanager
def trained_here(stop_after=None):
    """Trains in this process, which is faster than starting others; yields the list of epochs trained.

    Args:
        stop_after: Number of epochs after which Ctrl-C interrupts a sweep.
    """
    trained = []

    def run(jobs, workers, checkpoint):
        for job in jobs:
            for result in job.run(checkpoint(job.cell.id)):
                if isinstance(result, EpochResult):
                    trained.append((job.cell.name, job.cell.seed, result.epochs[-1].epoch))
                yield job, result
                if len(trained) == stop_after:
                    raise KeyboardInterrupt

    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "run_local", run)
            yield trained
    finally:
        torch.set_num_threads(threads)


def numbers(results):
    """Returns everything in the results of a cell's epochs except times and checkpoints."""
    return [
        ([replace(row, seconds=0.0) for row in result.epochs], result.layers, result.junctions, result.status)
        for result in results
    ]


def contents(path):
    """Returns everything in the file except times."""
    database = sqlite3.connect(path)
    try:
        tables = {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall() for name in TABLES[1:]}
        tables["meta"] = database.execute("SELECT * FROM meta WHERE key != 'created' ORDER BY 1").fetchall()
    finally:
        database.close()
    tables["epoch"] = [row[:5] + row[6:] for row in tables["epoch"]]
    return tables


@dataclass
class Command:
    """A sweep in its own process group, as a shell starts it."""

    out: Path
    images: Path
    epochs: int = 4
    more: tuple[str, ...] = ()

    def start(self, **pipes):
        command = [sys.executable, "-m", "gradprobe.cli", "sweep", "--data", f"cifar10:{self.images}", "--depths", "8"]
        command += ["--seeds", "0,1", "--epochs", str(self.epochs), "--batch-size", "32", "--jobs", "2"]
        command += ["--out", str(self.out), *self.more]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | pipes
        return subprocess.Popen(command, start_new_session=True, **pipes)

    def undisturbed(self):
        """Runs the same sweep in this process, one cell after another, and returns the expected contents."""
        out = self.out.with_name("undisturbed.sqlite")
        with trained_here():
            sweep(out=out, data=f"cifar10:{self.images}", depths=[8], seeds=[0, 1], epochs=self.epochs, batch_size=32)
        return contents(out)

    def finish(self):
        process = self.start()
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors.decode()

    def recorded_epochs(self):
        if not self.out.exists():
            return 0
        with open_run(self.out) as run:
            return sum(len(run.epochs(cell.id)) for cell in run.cells())


def workers_of(process):
    """Returns the ids of all child processes of a sweep."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def none_runs(pids):
    return not any(map(is_running, pids))


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
