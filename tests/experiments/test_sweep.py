"""The sweep: it resumes to the same numbers after any kill, and names bad options, files and failed cells."""

import io
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gradprobe.errors import ArgumentError, BackendError, GradprobeError, StoreError
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run

TABLES = ("meta", "cell", "epoch", "layer", "junction", "checkpoint")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small set in CIFAR-10's layout; classes differ in brightness, so that networks can learn them."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for name, count in {"data_batch_1.bin": 64, "test_batch.bin": 16}.items():
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        pixels = rng.integers(0, 100, (count, 3072), dtype=np.uint8) + 15 * labels[:, None]
        np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8).tofile(folder / name)
    return folder


@contextmanager
def trained_here():
    """Trains in this process, which is faster than starting others; yields the list of epochs trained."""
    trained = []

    def run(jobs, workers, checkpoint):
        for job in jobs:
            for result in job.run(checkpoint(job.cell.id)):
                trained.append((job.cell.name, job.cell.seed, result.epochs[-1].epoch))
                yield job, result

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "run_local", run)
        yield trained
    torch.set_num_threads(threads)


@pytest.fixture
def in_process():
    with trained_here() as trained:
        yield trained


@pytest.fixture
def options(images, tmp_path):
    return {
        "out": tmp_path / "run.sqlite",
        "data": f"cifar10:{images}",
        "depths": (8,),
        "epochs": 2,
        "batch_size": 32,
        "jobs": 2,
    }


def contents(path):
    """Returns everything in the file except times."""
    database = sqlite3.connect(path)
    try:
        tables = {name: database.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3").fetchall() for name in TABLES[1:]}
        tables["meta"] = database.execute("SELECT * FROM meta WHERE key != 'created' ORDER BY 1").fetchall()
    finally:
        database.close()
    tables["epoch"] = [row[:-1] for row in tables["epoch"]]
    return tables


def test_every_cell_is_trained_and_recorded(in_process, options):
    sweep(**options, families=("plain", "resnet"), seeds=(0, 1))
    with open_run(options["out"]) as run:
        cells = run.cells()
        assert [(c.name, c.seed, c.status) for c in cells] == [
            ("plain-8", 0, "done"),
            ("plain-8", 1, "done"),
            ("resnet-8", 0, "done"),
            ("resnet-8", 1, "done"),
        ]
        assert {cell.parameters for cell in cells} == {75_290}
        assert all([row.epoch for row in run.epochs(cell.id)] == [0, 1, 2] for cell in cells)
        assert all(len(run.layers(cell.id, epoch)) == 8 for cell in cells for epoch in (0, 1, 2))
        joined = {cell.name: [len(run.junctions(cell.id, epoch)) for epoch in (0, 1, 2)] for cell in cells}
        assert joined == {"plain-8": [0, 0, 0], "resnet-8": [3, 3, 0]}
        assert (run.config["data"], run.config["epochs"], run.config["train_images"]) == ("cifar10", 2, 64)
        assert run.meta["torch_version"] == torch.__version__
    assert sorted(entry.name for entry in options["out"].parent.iterdir()) == ["run.sqlite", "run.sqlite.lock"]


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_a_batch_larger_than_the_training_set_is_recorded_with_its_real_size(in_process, options, batch_size):
    sweep(**{**options, "batch_size": batch_size, "epochs": 1}, families=["plain"])
    with open_run(options["out"]) as run:
        assert run.config["batch_size"] == run.config["train_images"] == 64


def test_the_same_sweep_again_trains_nothing(in_process, options):
    sweep(**options)
    before = contents(options["out"])
    in_process.clear()
    sweep(**options)
    assert in_process == []
    assert contents(options["out"]) == before


def test_a_later_sweep_trains_only_what_is_new(in_process, options):
    sweep(**options, families=["plain"])
    in_process.clear()
    sweep(**{**options, "depths": (8, 14)}, families=["plain", "resnet"], seeds=[0])
    assert {name for name, _, _ in in_process} == {"plain-14", "resnet-8", "resnet-14"}


def test_the_longest_jobs_start_first(in_process, options):
    sweep(**{**options, "depths": (8, 20, 14), "epochs": 1}, families=["plain"])
    assert [name for name, _, _ in in_process] == ["plain-20", "plain-14", "plain-8"]


def test_a_diverged_cell_is_recorded_and_not_trained_again(in_process, options, monkeypatch):
    monkeypatch.setattr("gradprobe.experiments.train.Recipe.learning_rate_at", lambda *_: 1e30)
    sweep(**options, families=["plain"])
    with open_run(options["out"]) as run:
        assert [(cell.name, cell.status) for cell in run.cells()] == [("plain-8", "diverged")]
    in_process.clear()
    sweep(**options, families=["plain"])
    assert in_process == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs is 2 in the file and 3 now"),
        ({"batch_size": 16}, "batch_size is 32 in the file and 16 now"),
        ({"data": "digits"}, "data is 'cifar10' in the file and 'digits' now"),
    ],
    ids=["epochs", "batch-size", "data"],
)
def test_other_options_for_the_same_file_are_rejected(in_process, options, change, message):
    sweep(**options, families=["plain"])
    before = contents(options["out"])
    with pytest.raises(StoreError, match=message):
        sweep(**{**options, **change}, families=["plain"])
    assert contents(options["out"]) == before


def test_changed_images_in_the_same_folder_are_rejected(in_process, options, images, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in images.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    options["data"] = f"cifar10:{copy}"
    sweep(**options, families=["plain"])
    content = bytearray((copy / "test_batch.bin").read_bytes())
    content[5] ^= 1
    (copy / "test_batch.bin").write_bytes(content)
    with pytest.raises(StoreError, match="data_sha256 is"):
        sweep(**options, families=["plain"])


def test_another_torch_version_is_rejected(in_process, options, monkeypatch):
    sweep(**options, families=["plain"])
    monkeypatch.setattr(torch, "__version__", "1.0")
    with pytest.raises(StoreError, match=r"written with torch .*; torch 1\.0 would"):
        sweep(**options, families=["plain"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ["vgg"]}, "families: needed one or more of plain, resnet, got 'vgg'"),
        ({"families": []}, "families: needed at least one, got none"),
        ({"depths": [21]}, r"depth: needed 6n\+2 .* or one of 18, 34, 50, 101, 152, got 21"),
        ({"seeds": [-1]}, r"seeds: needed a whole number from 0 to 2\^32 - 1, got -1"),
        ({"seeds": [0, 10**20]}, r"seeds: needed a whole number from 0 to 2\^32 - 1, got 10{20}"),
        ({"epochs": 0}, "epochs: needed at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: needed at least 1, got 0"),
        ({"jobs": 0}, "jobs: needed at least 1, got 0"),
        ({"engine": "slurm"}, "engine: needed one of local, ray, got 'slurm'"),
        ({"data": "imagenet"}, "data: needed one of digits, cifar10:DIR, got 'imagenet'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_rejected_before_a_file_is_created(options, change, message):
    with pytest.raises(ArgumentError, match=message):
        sweep(**{**options, **change})
    assert not options["out"].exists()


def test_a_missing_ray_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match="engine: ray is not installed; pip install"):
        sweep(**options, engine="ray")


def test_ray_gives_the_numbers_of_local_processes(in_process, options, tmp_path):
    pytest.importorskip("ray", reason="needs ray, which gradprobe[ray] installs")
    sweep(**options)
    sweep(**{**options, "out": tmp_path / "ray.sqlite"}, engine="ray")
    assert contents(tmp_path / "ray.sqlite") == contents(options["out"])


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_progress_is_shown_on_a_terminal_only(in_process, options, terminal):
    screen = io.StringIO()
    sweep(**options, console=Console(file=screen, force_terminal=terminal, width=120))
    if terminal:
        assert "100%" in screen.getvalue()
        assert "resnet-8 seed 0: epoch 2/2, train error" in screen.getvalue()
        assert "left" in screen.getvalue()
    else:
        assert screen.getvalue() == ""


def test_progress_of_a_resumed_sweep_starts_where_it_stopped(in_process, options, monkeypatch):
    run_all = engines.run_local

    def run_three(jobs, workers, checkpoint):
        for count, pair in enumerate(run_all(jobs, workers, checkpoint)):
            yield pair
            if count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run_local", run_three)
    with pytest.raises(KeyboardInterrupt):
        sweep(**options)
    monkeypatch.setattr(engines, "run_local", lambda *_: iter(()))
    screen = io.StringIO()
    sweep(**options, console=Console(file=screen, force_terminal=True, width=120))
    assert "75%" in screen.getvalue()


@dataclass
class Command:
    """A sweep in its own process group, as a shell starts it."""

    out: Path
    images: Path
    epochs: int = 4

    def start(self):
        command = [sys.executable, "-m", "gradprobe.cli", "sweep", "--data", f"cifar10:{self.images}", "--depths", "8"]
        command += [
            "--seeds",
            "0,1",
            "--epochs",
            str(self.epochs),
            "--batch-size",
            "32",
            "--jobs",
            "2",
            "--out",
            str(self.out),
        ]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    def undisturbed(self):
        """Runs the same sweep in this process, one cell after another, and returns the expected contents."""
        out = self.out.with_name("undisturbed.sqlite")
        with trained_here():
            sweep(out=out, data=f"cifar10:{self.images}", depths=[8], seeds=[0, 1], epochs=self.epochs, batch_size=32)
        return contents(out)

    def finish(self):
        process = self.start()
        _, errors = process.communicate(timeout=200)
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


def kill_at_random(command, moments, whole_group):
    """Kills a sweep at a random time after it has recorded a random number of epochs."""
    before = command.recorded_epochs()
    process = command.start()
    epochs, delay_s = moments.randrange(4), moments.uniform(0, 0.4)
    wait_until(lambda: process.poll() is not None or command.recorded_epochs() >= before + epochs, 100)
    time.sleep(delay_s)
    assert process.poll() is None, "the sweep ended before it could be killed: train for more epochs"
    workers = workers_of(process)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
    return workers


def check_kills(command, count, seed):
    moments = random.Random(seed)
    for number in range(count):
        workers = kill_at_random(command, moments, whole_group=number % 2 == 1)
        assert wait_until(partial(none_runs, workers), 30), "a worker outlived its sweep"
    command.finish()
    names = sorted(entry.name for entry in command.out.parent.iterdir())
    assert names == [command.out.name, f"{command.out.name}.lock"]
    assert contents(command.out) == command.undisturbed()


linux_only = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads process states from Linux's /proc")


@linux_only
def test_a_kill_changes_nothing(images, tmp_path):
    check_kills(Command(tmp_path / "run.sqlite", images), count=1, seed=4)


@linux_only
@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_change_nothing(images, tmp_path, seed):
    check_kills(Command(tmp_path / "run.sqlite", images, epochs=16), count=10, seed=seed)


@linux_only
@pytest.mark.soak
def test_a_killed_worker_is_an_error_that_keeps_recorded_epochs(images, tmp_path):
    command = Command(tmp_path / "run.sqlite", images)
    process = command.start()
    assert wait_until(lambda: command.recorded_epochs() >= 2, 100)
    # The first child may be multiprocessing's resource tracker, so select a worker.
    workers = [pid for pid in workers_of(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"its process ended with exit code -9; run the same command again to resume" in errors
    assert errors.count(b"\n") == 1
    assert command.recorded_epochs() >= 2


def test_a_damaged_checkpoint_is_rejected_instead_of_trained_on(in_process, options, monkeypatch):
    run_all = engines.run_local
    monkeypatch.setattr(engines, "run_local", lambda *arguments: islice(run_all(*arguments), 1))
    sweep(**options, families=["plain"])
    monkeypatch.setattr(engines, "run_local", run_all)
    with closing(sqlite3.connect(options["out"])) as database, database:
        (state,) = database.execute("SELECT state FROM checkpoint").fetchone()
        middle = len(state) // 2
        changed = state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]
        database.execute("UPDATE checkpoint SET state = ?", (changed,))
    with pytest.raises(StoreError, match=r"run\.sqlite: the file is damaged: the checkpoint of cell 1 is not as"):
        sweep(**options, families=["plain"])
    assert in_process == [("plain-8", 0, 1)]
    with closing(sqlite3.connect(options["out"])) as database, database:
        database.execute("UPDATE checkpoint SET state = ?", (state,))
        database.execute("DELETE FROM meta WHERE key = 'torch_version'")
    with pytest.raises(StoreError, match=r"run\.sqlite: written with torch of an unknown version; torch"):
        sweep(**options, families=["plain"])


def test_a_failing_cell_is_named_in_one_line(options, monkeypatch, images):
    batch = images / "data_batch_1.bin"
    content = batch.read_bytes()
    run_local = engines.run_local

    def damage_then_run(jobs, workers, checkpoint):
        batch.write_bytes(content[:-1])
        yield from run_local(jobs, workers, checkpoint)

    monkeypatch.setattr(engines, "run_local", damage_then_run)
    try:
        with pytest.raises(GradprobeError, match=r"^plain-8 seed 0: ArgumentError: .*damaged or truncated"):
            sweep(**{**options, "jobs": 1}, families=["plain"])
    finally:
        batch.write_bytes(content)
    with open_run(options["out"]) as run:
        assert run.cells()[0].status == "pending"
