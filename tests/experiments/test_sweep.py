"""The sweep: it resumes to the same numbers after any kill, and names bad options, files and failed cells."""

import io
import re
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from itertools import islice

import pytest
import torch
from helpers.older_runs import make_version_3
from helpers.sweep_commands import contents, trained_here
from rich.console import Console

from gradprobe.errors import ArgumentError, BackendError, GradprobeError, StoreError
from gradprobe.experiments import train
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep import run as run_module
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.report.live_sweep import LiveSweep


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
        "seeds": (0,),
        "epochs": 2,
        "batch_size": 32,
        "jobs": 2,
    }


def test_every_cell_is_trained_and_recorded(in_process, options):
    sweep(**{**options, "seeds": (0, 1)}, families=("plain", "resnet"))
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


def test_the_whole_training_set_is_evaluated_on_request(in_process, options):
    sweep(**options, families=["plain"])
    sweep(**options, families=["resnet"], whole_train_error=True)
    with open_run(options["out"]) as run:
        running = {cell.name: [row.is_running for row in run.epochs(cell.id)] for cell in run.cells()}
    assert running == {"plain-8": [False, True, False], "resnet-8": [False, False, False]}


def test_a_later_sweep_trains_only_what_is_new(in_process, options):
    sweep(**options, families=["plain"])
    in_process.clear()
    sweep(**{**options, "depths": (8, 14)}, families=["plain", "resnet"])
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
        ({"families": ["vgg"]}, "families: needed one or more of plain, resnet, fixup, .*, got 'vgg'"),
        ({"families": []}, "families: needed at least one, got none"),
        ({"depths": [21]}, r"depth: needed 6n\+2 .* or one of 18, 34, 50, 101, 152, got 21"),
        ({"seeds": [-1]}, r"seeds: needed a whole number from 0 to 2\^32 - 1, got -1"),
        ({"seeds": [0, 10**20]}, r"seeds: needed a whole number from 0 to 2\^32 - 1, got 10{20}"),
        ({"epochs": 0}, "epochs: needed at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: needed at least 1, got 0"),
        ({"jobs": 0}, "jobs: needed at least 1, got 0"),
        ({"num_gpus": 1}, "num_gpus: needed engine ray, which reserves them, got engine local"),
        ({"num_gpus": 1.5, "engine": "ray"}, "num_gpus: needed a number from 0 to 1, or a whole number, got 1.5"),
        ({"engine": "slurm"}, "engine: needed one of local, ray, got 'slurm'"),
        ({"data": "imagenet"}, "data: needed one of digits, cifar10:DIR, .*npz:FILE, got 'imagenet'"),
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


def test_progress_is_a_bar_on_a_terminal(in_process, options):
    screen = io.StringIO()
    sweep(**options, console=Console(file=screen, force_terminal=True, width=120))
    assert "100%" in screen.getvalue()
    assert "resnet-8 seed 0: epoch 2/2, train error" in screen.getvalue()
    assert re.search(r"about [\d.]+ s left", screen.getvalue())


def test_progress_is_a_line_per_epoch_elsewhere(in_process, options):
    out = io.StringIO()
    sweep(**options, console=Console(file=out))
    lines = out.getvalue().splitlines()
    assert [re.sub(r"[\d.]+ (%|s\b)", r"_ \1", line) for line in lines] == [
        "plain-8 seed 0: epoch 1/2, train error _ %, about _ s left",
        "plain-8 seed 0: epoch 2/2, train error _ %, about _ s left",
        "resnet-8 seed 0: epoch 1/2, train error _ %, about _ s left",
        "resnet-8 seed 0: epoch 2/2, train error _ %",
    ]


def test_progress_moves_within_an_epoch(in_process, options, monkeypatch):
    monkeypatch.setattr(run_module, "_PROGRESS_EVERY_S", 0.0)
    train_all, seen = engines.run_local, []

    def look(jobs, workers, checkpoint):
        for pair in train_all(jobs, workers, checkpoint):
            yield pair
            with open_run(options["out"]) as run:
                view = LiveSweep("run.sqlite")
                view.take(run, time.time())
                seen.append((run.cells()[0].progress, re.findall(r"epoch ([\d.]+)/2", view.line())))

    monkeypatch.setattr(engines, "run_local", look)
    screen = io.StringIO()
    sweep(**options, families=["plain"], console=Console(file=screen, force_terminal=True, width=120))
    half, whole = [(0.5, ["0.5"]), (1.0, ["0.9"])], [(0.5, ["1.5"]), (1.0, ["1.9"])]
    assert seen == [*half, (0.0, ["1"]), *whole, (0.0, [])]
    with closing(sqlite3.connect(options["out"])) as database:
        assert database.execute("SELECT * FROM progress").fetchall() == []


def test_a_file_without_progress_is_read_and_resumed(in_process, options):
    sweep(**options, families=["plain"])
    make_version_3(options["out"])
    with open_run(options["out"]) as run:
        assert [cell.progress for cell in run.cells()] == [0.0]
    sweep(**options)
    with open_run(options["out"]) as run:
        assert [cell.status for cell in run.cells()] == ["done", "done"]


def test_a_sweep_that_runs_out_of_time_resumes_to_the_same_numbers(in_process, options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engines.Job, "is_late", lambda _: len(in_process) >= 1)
        sweep(**options)
    assert in_process == [("plain-8", 0, 1)]
    sweep(**options)
    assert len(in_process) == 4
    undisturbed = tmp_path / "undisturbed.sqlite"
    sweep(**{**options, "out": undisturbed})
    assert contents(options["out"]) == contents(undisturbed)


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


def test_a_failing_cell_is_named_in_one_line(options, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such weight")
        yield

    monkeypatch.setattr(engines, "_can_fork", lambda: True)  # a worker that is forked has the patch
    monkeypatch.setattr(train, "train_cell", fail)
    with pytest.raises(GradprobeError, match=r"^plain-8 seed 0: ValueError: no such weight$") as raised:
        sweep(**{**options, "jobs": 1}, families=["plain"])
    assert 'raise ValueError("no such weight")' in str(raised.value.__cause__)
    with open_run(options["out"]) as run:
        assert run.cells()[0].status == "pending"


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.soak)])
def test_workers_give_the_numbers_of_one_process(options, tmp_path, monkeypatch, method):
    with trained_here():
        sweep(**{**options, "out": tmp_path / "here.sqlite", "epochs": 1})
    torch.ones(300, 300) @ torch.ones(300, 300)  # starts OpenMP's threads, which a forked worker lacks
    monkeypatch.setattr(engines, "_can_fork", lambda: method == "fork")
    sweep(**{**options, "epochs": 1})
    assert contents(options["out"]) == contents(tmp_path / "here.sqlite")


def test_a_process_with_threads_does_not_fork():
    script = """
        import sys, threading
        from gradprobe.experiments.sweep import engines
        assert engines._can_fork() == (sys.platform == "linux")
        end = threading.Event()
        threading.Thread(target=end.wait).start()
        assert not engines._can_fork()
        assert "torch._dynamo" not in sys.modules
        end.set()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
