"""Files of parts of a sweep become one file with the numbers of one sweep."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from helpers.older_runs import make_version_2
from helpers.sweep_commands import trained_here

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.merge import merge
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """A sweep of two seeds, and the same in two parts, of which the second was stopped after three of its epochs."""
    folder = tmp_path_factory.mktemp("parts")
    options = {"data": f"cifar10:{images}", "depths": (8,), "epochs": 2, "batch_size": 32}
    with trained_here():
        sweep(**options, seeds=(0, 1), out=folder / "whole.sqlite")
        sweep(**options, seeds=(0,), out=folder / "part-0.sqlite")
    with trained_here(stop_after=3), pytest.raises(KeyboardInterrupt):
        sweep(**options, seeds=(1,), out=folder / "part-1.sqlite")
    return folder, options


def numbers(path):
    with open_run(path) as run:
        return {
            (cell.name, cell.seed): (
                cell.status,
                [(row.epoch, row.any_train_error_pct, row.test_error_pct) for row in run.epochs(cell.id)],
                [run.layers(cell.id, epoch) for epoch in (0, 1, 2)],
                [run.junctions(cell.id, epoch) for epoch in (0, 1, 2)],
            )
            for cell in run.cells()
        }


def test_merged_parts_resume_to_the_numbers_of_one_sweep(files, tmp_path):
    folder, options = files
    out, parts = tmp_path / "run.sqlite", [folder / "part-0.sqlite", folder / "part-1.sqlite"]
    whole = numbers(folder / "whole.sqlite")
    merge(out, parts)
    merged = numbers(out)
    assert [status for status, *_ in merged.values()] == ["done", "done", "done", "pending"]
    assert {name: found for name, found in merged.items() if name != ("resnet-8", 1)} == {
        name: found for name, found in whole.items() if name != ("resnet-8", 1)
    }
    merge(out, [out, *parts])  # adds nothing
    assert numbers(out) == merged
    with trained_here() as trained:
        sweep(**options, seeds=(0, 1), out=out)
    assert trained == [("resnet-8", 1, 2)]
    assert numbers(out) == whole
    with open_run(out) as run:
        assert len(run.specs()) == 3  # of both parts, and of the sweep that resumed


def test_the_further_of_two_files_wins(files, tmp_path):
    folder, _ = files
    for order in (["part-1.sqlite", "whole.sqlite"], ["whole.sqlite", "part-1.sqlite"]):
        out = merge(tmp_path / order[0], [folder / name for name in order])
        assert numbers(out) == numbers(folder / "whole.sqlite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE meta SET value = '1.0' WHERE key = 'torch_version'", "written with torch 1.0, and .* with "),
        ("UPDATE cell SET parameters = 7", "plain-8 has 7 parameters, and 75,290 in"),
        (
            "UPDATE meta SET value = replace(value, '\"epochs\": 2', '\"epochs\": 9')",
            "epochs is 2 in the file and 9 now",
        ),
    ],
    ids=["torch", "network", "epochs"],
)
def test_parts_that_are_not_of_one_sweep_are_rejected(files, tmp_path, change, message):
    folder, _ = files
    other = changed(folder / "part-0.sqlite", tmp_path, change)
    with pytest.raises(StoreError, match=message):
        merge(tmp_path / "run.sqlite", [folder / "part-1.sqlite", folder / "part-0.sqlite", other])


@pytest.mark.parametrize("is_first", [True, False])
def test_a_file_of_a_version_without_devices_is_merged(files, tmp_path, is_first):
    folder, options = files
    with open_run(folder / "part-0.sqlite") as run:
        config = run.config
    for name in ("device", "precision", "norm", "init", "optimizer", "image_size", "per_class"):
        del config[name]
    older = changed(
        folder / "part-0.sqlite", tmp_path, f"UPDATE meta SET value = '{json.dumps(config)}' WHERE key = 'config'"
    )
    make_version_2(older)
    parts = [older, folder / "part-1.sqlite"]
    out = merge(tmp_path / "run.sqlite", parts if is_first else parts[::-1])
    with trained_here() as trained:
        sweep(**options, seeds=(0, 1), out=out)
    assert trained == [("resnet-8", 1, 2)]
    assert {key: found[0] for key, found in numbers(out).items()} == dict.fromkeys(numbers(out), "done")


def test_a_missing_part_is_named(files, tmp_path):
    folder, _ = files
    out = merge(tmp_path / "run.sqlite", [folder / "part-0.sqlite"])
    for target in (out, tmp_path / "new.sqlite"):
        with pytest.raises(StoreError, match=r"^missing.sqlite: no such file"):
            merge(target, ["missing.sqlite"])


def changed(path, folder, change):
    """Returns a copy of a file after a change."""
    other = folder / f"changed-{path.name}"
    other.write_bytes(path.read_bytes())
    with closing(sqlite3.connect(other)) as database, database:
        database.execute(change)
    return other


OF_RESNET = "WHERE cell = (SELECT id FROM cell WHERE family = 'resnet' AND seed = 1)"


@pytest.mark.parametrize(
    "change",
    [
        f"UPDATE epoch SET test_error_pct = test_error_pct + 6.25 {OF_RESNET} AND epoch = 1",
        f"UPDATE epoch SET running_loss = running_loss * 1.0001 {OF_RESNET} AND epoch = 1",
        f"UPDATE epoch SET running_loss = NULL {OF_RESNET} AND epoch = 1",
        f"UPDATE layer SET rms = rms * 1.0001 {OF_RESNET} AND epoch = 1 AND position = 3",
        f"UPDATE layer SET site = 'other' {OF_RESNET} AND epoch = 1 AND position = 3",
        f"DELETE FROM layer {OF_RESNET} AND epoch = 1 AND position = (SELECT max(position) FROM layer)",
    ],
    ids=["test error", "loss", "diverged", "gradient", "name", "fewer layers"],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_training_run_with_other_numbers_is_rejected(files, tmp_path, change, is_first):
    folder, _ = files
    other = changed(folder / "part-1.sqlite", tmp_path, change)
    parts = [other, folder / "whole.sqlite"] if is_first else [folder / "whole.sqlite", other]
    message = rf"{parts[1].name}: resnet-8 seed 1 has other numbers at epoch 1 than in .*run.sqlite"
    out = merge(tmp_path / "run.sqlite", parts[:1])
    before = numbers(out)
    with pytest.raises(StoreError, match=message):
        merge(out, parts[1:])
    assert numbers(out) == before


def test_times_and_what_one_file_did_not_measure_may_differ(files, tmp_path):
    folder, _ = files
    change = f"UPDATE epoch SET seconds = 1e6, train_loss = 1.0, train_error_pct = 50.0 {OF_RESNET} AND epoch = 1"
    other = changed(folder / "part-1.sqlite", tmp_path, change)
    with open_run(folder / "whole.sqlite") as run:
        assert run.epochs(4)[1].is_running
    out = merge(tmp_path / "run.sqlite", [folder / "whole.sqlite", other])
    assert numbers(out) == numbers(folder / "whole.sqlite")


def test_the_command_says_what_the_file_has(files, tmp_path):
    folder, _ = files
    command = [
        sys.executable,
        "-m",
        "gradprobe.cli",
        "merge",
        "run.sqlite",
        *map(str, sorted(folder.glob("part-*.sqlite"))),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "run.sqlite: 3 of 4 training runs done\n"


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("bash") is None, reason="runs a shell script")
def test_the_array_job_of_the_documentation_runs_without_slurm(images, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text(encoding="utf-8")
    section = page[page.index("### Without Ray") : page.index("## Spec files")]
    code = re.findall(r"^    (.*)$", section, flags=re.MULTILINE)
    job, after = "\n".join(code[: code.index('exit "$status"') + 1]), "\n".join(code[-2:])
    assert "#SBATCH --array=0-2" in job
    (tmp_path / "sweep.toml").write_text(f'data = "cifar10:{images}"\ndepths = [8]\nepochs = 1\nbatch_size = 32\n')
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in (("gradprobe", f'exec "{sys.executable}" -m gradprobe.cli "$@"'), ("scontrol", 'echo "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "2"}

    def run(script, task=0):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "17"}
        command = ["bash", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment | slurm, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert run(job.replace("3.5", "1e-9")) == (124, "requeue 17\n")
    for task in (0, 1):
        status, printed = run(job, task)
        assert (status, "2 of 2 training runs done" in printed) == (0, True)
    status, printed = run(after)
    assert status == 0
    assert printed.startswith("run.sqlite: 4 of 4 training runs done\n")
