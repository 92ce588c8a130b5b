"""Spec files and dry runs: the whole grid in a file, stored with the results, and the same numbers again."""

import itertools
import json
import sqlite3
import time
from contextlib import closing

import pytest
import torch

from gradprobe.errors import ArgumentError, StoreError
from gradprobe.experiments.sweep.run import plan, sweep
from gradprobe.experiments.sweep.spec import Settings, read_specs, to_toml
from gradprobe.experiments.sweep.store import open_run

SPEC = """
# Two kinds of networks on a small file.
data = "npz:f.npz"
per_class = 20
families = ["plain"]
models = ["sides:net(width=4)"]
depths = [8]
seeds = [0, 3]
epochs = 2
batch_size = 8
optimizer = "adamw(weight_decay=0.1)"
lr = 2e-3
init = "xavier"
"""


@pytest.fixture
def folder(working_folder):
    """The working folder, with a spec file and a module of networks."""
    (working_folder / "sweep.toml").write_text(SPEC)
    (working_folder / "sides.py").write_text(
        "from torch import nn\n"
        "def net(depth, in_features, num_classes, width):\n"
        "    sizes = [in_features] + [width] * (depth - 1)\n"
        "    inner = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]\n"
        "    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(width, num_classes))\n"
    )
    return working_folder


def contents(path):
    """Returns the numbers and the configuration of a sweep."""
    with open_run(path) as run:
        rows = {
            (cell.name, cell.seed): (
                [(row.any_train_error_pct, row.test_error_pct) for row in run.epochs(cell.id)],
                [run.layers(cell.id, epoch) for epoch in (0, 1, 2)],
            )
            for cell in run.cells()
        }
        return run.config, rows


def test_a_spec_is_stored_and_gives_the_same_numbers_again(folder, in_process, gradprobe):
    code, _, err = gradprobe("sweep", "--spec", "sweep.toml", "--out", "a.sqlite")
    assert code == 0, err
    config, rows = contents("a.sqlite")
    assert set(rows) == {(f"{net}-8", seed) for net in ("plain", "sides:net(width=4)") for seed in (0, 3)}
    assert (config["optimizer"], config["weight_decay"]) == ("adamw(weight_decay=0.1)", 0.1)
    assert (config["learning_rate"], config["init"], config["per_class"], config["train_images"]) == (
        2e-3,
        "xavier",
        20,
        40,
    )
    assert gradprobe("sweep", "--spec", "a.sqlite", "--out", "b.sqlite")[0] == 0
    assert contents("b.sqlite") == (config, rows)


def test_options_replace_those_of_the_file(folder, in_process, gradprobe):
    options = ["--families", "plain", "--seeds", "1", "--epochs", "1"]
    assert gradprobe("sweep", "--spec", "sweep.toml", *options, "--out", "a.sqlite")[0] == 0
    config, rows = contents("a.sqlite")
    assert {seed for _, seed in rows} == {1}
    assert (config["epochs"], config["learning_rate"]) == (1, 2e-3)


def test_another_optimizer_has_its_own_learning_rate(folder, in_process, gradprobe):
    first = ["--data", "npz:f.npz", "--families", "plain", "--depths", "8", "--seeds", "0", "--epochs", "1"]
    assert gradprobe("sweep", *first, "--out", "a.sqlite")[0] == 0
    for number, (options, rate) in enumerate(
        [
            (["--optimizer", "adamw"], 1e-3),
            (["--optimizer", "adamw", "--lr", "0.02"], 0.02),
            (["--optimizer", "SGD(nesterov=True)"], 0.1),
        ]
    ):
        assert gradprobe("sweep", "--spec", "a.sqlite", *options, "--out", f"{number}.sqlite")[0] == 0
        assert contents(f"{number}.sqlite")[0]["learning_rate"] == rate


def test_other_options_of_the_same_optimizer_keep_the_learning_rate(folder, in_process, gradprobe):
    options = ["--optimizer", "AdamW", "--families", "plain", "--seeds", "0", "--epochs", "1"]
    assert gradprobe("sweep", "--spec", "sweep.toml", *options, "--out", "a.sqlite")[0] == 0
    config, _ = contents("a.sqlite")
    assert (config["learning_rate"], config["weight_decay"]) == (2e-3, 1e-2)


def test_results_of_several_commands_hold_them_all(folder, in_process, gradprobe):
    sweep(out="a.sqlite", data="npz:f.npz", families=["plain"], depths=[8], seeds=[0], epochs=1, batch_size=8)
    for _ in range(2):
        sweep(out="a.sqlite", data="npz:f.npz", families=["resnet"], depths=[8, 14], seeds=[0], epochs=1, batch_size=8)
    specs = read_specs("a.sqlite")
    assert [(one["families"], one["depths"]) for one in specs] == [(["plain"], [8]), (["resnet"], [8, 14])]
    assert gradprobe("sweep", "--spec", "a.sqlite", "--out", "b.sqlite")[0] == 0
    assert contents("b.sqlite") == contents("a.sqlite")


def test_results_of_an_older_version_have_no_spec(folder, in_process):
    options = {"out": "a.sqlite", "data": "npz:f.npz", "families": ["plain"], "depths": [8], "seeds": [0], "epochs": 1}
    sweep(**options)
    with closing(sqlite3.connect("a.sqlite")) as database, database:
        database.execute("DELETE FROM meta WHERE key = 'spec'")
    sweep(**{**options, "seeds": [1]})  # the spec of this command alone would not be that of the file
    with pytest.raises(StoreError, match=r"a\.sqlite: has no spec; it was written by an older version"):
        read_specs("a.sqlite")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = [8]", r"spec: .*s\.toml: needed keys among data, .*, precision, got 'depth'"),
        ("depths = 8", r"spec: .*s\.toml: needed a list of whole numbers for depths, got 8"),
        ("depths = [8, '14']", r"needed a list of whole numbers for depths, got \[8, '14'\]"),
        ("epochs = true", "needed a whole number for epochs, got True"),
        ("epochs = 2.0", "needed a whole number for epochs, got 2.0"),
        ("lr = 'high'", "needed a number for lr, got 'high'"),
        ("augment = 1", "needed true or false for augment, got 1"),
        ("epochs = ", r"spec: .*s\.toml is no TOML file: Invalid value \(at"),
        (b"\xff\xfe", r"s\.toml is no TOML file: .*can't decode"),
        (None, r"spec: .*s\.toml cannot be read: No such file"),
    ],
)
def test_a_spec_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "s.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArgumentError, match=message):
        read_specs(path)


def test_every_setting_can_be_written_and_read(tmp_path):
    settings = {
        "data": 'npz:/a "b"\\ü\x7f\n.npz',
        "image_size": 4,
        "per_class": 2,
        "augment": False,
        "families": ["plain"],
        "models": ["a:b('c')"],
        "depths": [8],
        "seeds": [0],
        "epochs": 1,
        "batch_size": 5,
        "optimizer": "sgd(nesterov=True)",
        "lr": 1e-05,
        "norm": "none",
        "init": "he",
        "precision": "bfloat16",
    }
    assert set(settings) == set(Settings.__annotations__)
    path = tmp_path / "s.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert read_specs(path) == [settings]


def test_the_settings_are_those_of_a_plan():
    assert set(Settings.__annotations__) == set(plan.__kwdefaults__)


def test_a_dry_run_lists_the_runs_and_trains_nothing(folder, gradprobe):
    code, out, err = gradprobe("sweep", "--spec", "sweep.toml", "--dry-run", "--jobs", "2", "--out", "a.sqlite")
    assert (code, err) == (0, "")
    assert not (folder / "a.sqlite").exists()
    assert "4 training runs, 2 in parallel: about" in " ".join(out.split())
    shown = json.loads(gradprobe("sweep", "--spec", "sweep.toml", "--dry-run", "--jobs", "9", "--json")[1])
    assert {net["net"]: net["parameters"] for net in shown["nets"]} == {
        "plain-8": 74_482,
        "sides:net(width=4)-8": 36 * 4 + 4 + 6 * 20 + 4 * 2 + 2,
    }
    assert (shown["runs"], shown["jobs"]) == (4, 4)
    assert shown["seconds"] == max(net["seconds"] for net in shown["nets"])
    # Weights, gradients and two states of AdamW, 40 images, and activations.
    deep = shown["nets"][0]
    assert deep["megabytes"] > 4 * 4 * deep["parameters"] / 1e6
    assert shown["megabytes"] == pytest.approx(sum(2 * net["megabytes"] for net in shown["nets"]))


def test_a_dry_run_counts_the_evaluations(folder, gradprobe, monkeypatch):
    """With a clock that makes a step, and the evaluation of a batch, take a second."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    command = ("sweep", "--spec", "sweep.toml", "--epochs", "10", "--dry-run", "--json")
    usual, whole = (json.loads(gradprobe(*command, *more)[1]) for more in ((), ("--whole-train-error",)))
    n_train, n_test = 40, 16
    for shown, n_evaluations in ((usual, 2), (whole, 11)):
        seconds = 10 * (n_train // 8) + (n_evaluations * n_train + 11 * n_test) / n_train
        assert [net["seconds"] for net in shown["nets"]] == [pytest.approx(seconds)] * 2


@pytest.mark.parametrize(
    ("device", "code", "message"),
    [
        ("cuda", 2, "gradprobe: --device: cuda was asked for, but torch sees no CUDA device; use --device cpu\n"),
        ("tpu", 2, "gradprobe: --device: needed one of auto, cpu, cuda, got 'tpu'\n"),
        ("auto", 0, None),
        ("cpu", 0, None),
    ],
)
def test_a_missing_device_is_one_line(folder, in_process, gradprobe, monkeypatch, device, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [
        "--data",
        "npz:f.npz",
        "--depths",
        "8",
        "--families",
        "plain",
        "--seeds",
        "0",
        "--epochs",
        "1",
        "--device",
        device,
    ]
    ended = gradprobe("sweep", *options, "--out", "a.sqlite")
    assert ended[0] == code
    assert "cuda" not in ended[2] if message is None else ended[2] == message
    assert (folder / "a.sqlite").exists() == (code == 0)
