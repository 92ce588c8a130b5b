"""A sweep of the user's own networks, data and optimizer: how they are called, resumed, and named when they fail."""

import io
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from helpers.older_runs import make_version_2
from rich.console import Console
from torch import nn

from gradprobe.cli import commands as cli
from gradprobe.errors import ArgumentError, GradprobeError, StoreError
from gradprobe.experiments import optimizers
from gradprobe.experiments.data import load
from gradprobe.experiments.models import build, trained_weights
from gradprobe.experiments.optimizers import defaults, parse
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.experiments.target import find
from gradprobe.experiments.train import Recipe, make_optimizer
from gradprobe.report import terminal

NETS = '''
import torch
from torch import nn

from gradprobe.nn import ResidualAdd


class net(nn.Module):
    """An MLP with residual adds, dropout, and two weights that are not trained."""

    def __init__(self, depth, in_features, n_classes, width=16):
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 2))
        self.joins = nn.ModuleList(ResidualAdd(relu=True) for _ in range(depth - 2))
        self.drop = nn.Dropout(0.2)
        self.unused, self.frozen = nn.Linear(width, width), nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, n_classes)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        for block, join in zip(self.blocks, self.joins):
            x = join(x, self.drop(block(x)))
        return self.last(self.frozen(x))


def conv(*, num_classes, in_channels, image_size, depth):
    return nn.Sequential(nn.Conv2d(in_channels, 4, image_size), nn.Flatten(), nn.Linear(4, num_classes))


def wrong_shape(depth):
    return nn.Sequential(nn.Flatten(), nn.Linear(36, depth))


def greedy(depth, words, num_classes):
    return nn.Linear(1, 1)


def nothing():
    return nn.Linear(1, 1)


def number(depth):
    return 3


def broken(depth):
    raise ValueError(f"no {depth} layers")


class Failing(net):
    """Fails in its second epoch."""

    def forward(self, x):
        if self.training and len(x) == 8:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps > 6:
                raise RuntimeError("too warm")
        return super().forward(x)


ready = nn.Linear(36, 2)
'''


@pytest.fixture
def folder(working_folder):
    """The working folder, with a module of networks."""
    (working_folder / "mynets.py").write_text(NETS)
    return working_folder


OPTIONS = {"data": "npz:f.npz", "seeds": [0], "epochs": 3, "batch_size": 8}


def errors(path):
    with open_run(path) as run:
        return {
            (cell.name, cell.seed): [(row.any_train_error_pct, row.test_error_pct) for row in run.epochs(cell.id)]
            for cell in run.cells()
        }


def printed(path):
    screen = io.StringIO()
    with open_run(path) as run:
        Console(file=screen, width=120).print(terminal.render(run))
    return " ".join(screen.getvalue().split())


def layers(path):
    with open_run(path) as run:
        return {cell.name: [row.site for row in run.layers(cell.id, 1)] for cell in run.cells()}


def test_a_sweep_of_ones_own_network_data_and_optimizer(folder):
    """Runs the command, whose workers must find the module of the working folder."""
    command = "sweep --model mynets:net --depths 4,8 --data npz:f.npz --optimizer adamw --lr 1e-2 --epochs 3 --seeds 0"
    command = [sys.executable, "-m", "gradprobe.cli", *command.split(), "--jobs", "1", "--out", "run.sqlite"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "no gradient for 2 of 10 parameters: unused.weight, unused.bias" in ended.stderr
    assert "2 of 2 training runs done" in ended.stdout
    recorded = errors("run.sqlite")
    assert {name for name, _ in recorded} == {"mynets:net-4", "mynets:net-8"}
    assert all(epochs[-1][0] < epochs[0][0] for epochs in recorded.values())
    assert layers("run.sqlite")["mynets:net-4"] == ["first.weight", "blocks.0.weight", "blocks.1.weight", "last.weight"]
    with open_run("run.sqlite") as run:
        config = run.config
        assert {len(run.junctions(cell.id, 0)) for cell in run.cells()} == {2, 6}
    assert (config["optimizer"], config["learning_rate"], config["weight_decay"]) == ("adamw", 1e-2, 1e-2)
    assert "mynets:net-8" in printed("run.sqlite")


def test_an_interrupted_network_with_dropout_resumes_to_the_same_numbers(folder, in_process, monkeypatch):
    models = {"models": ["mynets:net"], "depths": [4], "optimizer": "adamw", "lr": 1e-2}
    sweep(**OPTIONS, **models, out="whole.sqlite")
    run_all = engines.run_local

    def run_one(jobs, workers, checkpoint):
        yield next(run_all(jobs, workers, checkpoint))
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run_local", run_one)
    with pytest.raises(KeyboardInterrupt):
        sweep(**OPTIONS, **models, out="parts.sqlite")
    monkeypatch.setattr(engines, "run_local", run_all)
    torch.manual_seed(99)
    sweep(**OPTIONS, **models, out="parts.sqlite")
    assert errors("parts.sqlite") == errors("whole.sqlite")


def test_networks_stand_side_by_side(folder, in_process):
    sweep(
        **{**OPTIONS, "epochs": 1},
        families=["plain"],
        models=["mynets:net(width=4)", "mynets.py:conv"],
        depths=[8],
        out="run.sqlite",
    )
    assert [name for name, _ in errors("run.sqlite")] == ["plain-8", "mynets:net(width=4)-8", "mynets.py:conv-8"]
    with open_run("run.sqlite") as run:
        parameters = {cell.family: cell.parameters for cell in run.cells()}
    assert parameters["mynets:net(width=4)"] == (36 + 1) * 4 + 6 * 20 + 20 + (4 + 1) * 2
    assert parameters["mynets.py:conv"] == 37 * 4 + 10


def test_a_failing_cell_is_recorded_and_the_others_are_trained(folder, in_process):
    options = {**OPTIONS, "models": ["mynets:Failing", "mynets:net"], "depths": [4], "seeds": [0, 1]}
    with pytest.raises(GradprobeError) as raised:
        sweep(**options, out="run.sqlite")
    reason = "RuntimeError: too warm"
    assert str(raised.value) == f"mynets:Failing-4 seed 0: {reason} (2 of 4 training runs failed)"
    with open_run("run.sqlite") as run:
        cells = {(cell.family, cell.seed): cell for cell in run.cells()}
        assert len(run.epochs(cells["mynets:Failing", 0].id)) == 2
    assert [(cell.status, cell.failure) for cell in cells.values()] == [("pending", reason)] * 2 + [("done", "")] * 2
    assert printed("run.sqlite").count("failed: RuntimeError: too warm.") == 2
    assert "2 failed" in printed("run.sqlite")
    (folder / "mynets.py").write_text(NETS.replace("self.steps > 6", "False"))
    sys.modules.pop("mynets")
    sweep(**options, out="run.sqlite")
    with open_run("run.sqlite") as run:
        assert [(cell.status, cell.failure) for cell in run.cells()] == [("done", "")] * 4


LINE_THAT_FAILS = 1 + NETS[: NETS.index("raise RuntimeError")].count("\n")


def test_the_command_shows_the_line_of_the_network_that_failed(folder, in_process, monkeypatch, capsys):
    command = "sweep --model mynets:Failing --depths 4 --data npz:f.npz --seeds 0 --batch-size 8 --epochs 2"
    monkeypatch.setattr(sys, "argv", ["gradprobe", *command.split(), "--out", "run.sqlite"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert f'mynets.py", line {LINE_THAT_FAILS}, in forward\n    raise RuntimeError("too warm")\n' in shown
    assert shown.splitlines()[-1] == "gradprobe: mynets:Failing-4 seed 0: RuntimeError: too warm"


@pytest.mark.soak
def test_a_failing_cell_in_a_process_leaves_the_worker_for_the_next(folder):
    models = ["mynets:Failing", "mynets:net(width=3)"]
    with pytest.raises(GradprobeError, match=r"^mynets:Failing-4 seed 0: RuntimeError: too warm$") as raised:
        sweep(**OPTIONS, models=models, depths=[4], out="run.sqlite", jobs=1)
    assert f'mynets.py", line {LINE_THAT_FAILS}, in forward' in str(raised.value.__cause__)
    with open_run("run.sqlite") as run:
        assert [cell.status for cell in run.cells()] == ["pending", "done"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mynets", "model: needed MODULE:CALLABLE or FILE.py:CALLABLE, got 'mynets'"),
        ("nowhere:net", "model: nowhere:net raised ModuleNotFoundError: No module named 'nowhere'"),
        ("mynets:nets", "model: mynets has no nets, got 'mynets:nets'"),
        ("mynets:broken", "model: mynets:broken of depth 4 raised ValueError: no 4 layers"),
        ("mynets:number", "model: needed a torch.nn.Module; mynets:number of depth 4 returned an object of type int"),
        ("mynets:ready", "model: needed a function or class that builds a network .* mynets:ready is of type Linear"),
        ("mynets:nothing", r"model: mynets:nothing needs a parameter for the depth, has \(\)"),
        ("mynets:net(16, 36, 2, 3, 4)", "model: mynets:net.* cannot be called with the arguments given: too many"),
        (
            "mynets:greedy",
            r"model: mynets:greedy needs words; the sweep gives depth, num_classes, n_classes, in_features, "
            r"in_channels, image_size; give the rest in the target, as in mynets:greedy\(words=…\)",
        ),
        (
            "mynets:wrong_shape",
            r"model: needed logits of shape \[2, 2\] for 2 examples; mynets:wrong_shape of depth 4 returned shape "
            r"\[2, 4\]",
        ),
    ],
)
def test_a_network_that_cannot_be_used_is_named_before_a_file_is_created(folder, model, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        sweep(**OPTIONS, models=[model], depths=[4], out="run.sqlite")
    assert not (folder / "run.sqlite").exists()


def test_a_file_on_a_drive_is_no_module_of_one_letter():
    with pytest.raises(ArgumentError, match=r"there is no file C:\\nets\\my\.py"):
        find("model", r"C:\nets\my.py:net(width=2)")


def test_changed_code_is_not_resumed(folder, in_process):
    options = {**OPTIONS, "models": ["mynets:net"], "depths": [4], "out": "run.sqlite"}
    sweep(**options)
    (folder / "mynets.py").write_text(NETS.replace("width=16", "width=8"))
    sys.modules.pop("mynets")
    with pytest.raises(StoreError, match=r"run\.sqlite: mynets:net-4 has [\d,]+ parameters in the file and \d+ now"):
        sweep(**options)


def test_a_file_of_an_older_version_resumes(folder, in_process):
    """Older files know neither the options nor the newest tables and columns."""
    options = {**OPTIONS, "families": ["plain"], "depths": [8], "out": "run.sqlite"}
    sweep(**{**options, "epochs": 1})
    new = ("image_size", "per_class", "optimizer", "norm", "init")
    make_version_2("run.sqlite")
    with closing(sqlite3.connect("run.sqlite")) as database, database:
        query = (
            f"SELECT json_remove(value, {', '.join(f''''$.{name}' ''' for name in new)}) FROM meta WHERE key = 'config'"
        )
        (config,) = database.execute(query).fetchone()
        database.execute("UPDATE meta SET value = ? WHERE key = 'config'", (config,))
    with open_run("run.sqlite") as run:
        assert "optimizer" not in run.config
        assert [cell.failure for cell in run.cells()] == [""]
    sweep(**{**options, "epochs": 1, "seeds": [0, 1]})
    assert len(errors("run.sqlite")) == 2
    with pytest.raises(StoreError, match="optimizer is 'sgd' in the file and 'adamw' now"):
        sweep(**{**options, "epochs": 1}, optimizer="adamw")


def test_weights_that_the_loss_does_not_reach_are_left_out(folder):
    data = load("npz:f.npz")
    model = build("mynets:net", 4, data)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    assert set(names) - set(trained_weights("mynets:net", model, data)) == {"unused.weight", "frozen.weight"}


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}),
        ("SGD(nesterov=True, momentum=0.8)", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adamw", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
        ("Adam(betas=(0.9, 0.95))", torch.optim.Adam, {"betas": (0.9, 0.95), "weight_decay": 0}),
        ("rmsprop(momentum=0.5)", torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    ],
)
def test_an_optimizer_has_its_own_defaults_and_sgd_those_of_the_paper(optimizer, kind, expected):
    usual = defaults(optimizer)
    recipe = Recipe(1, 1, usual.learning_rate, usual.momentum, usual.weight_decay, optimizer=optimizer)
    made = make_optimizer(nn.Linear(2, 2), recipe)
    assert isinstance(made, kind)
    assert {name: made.defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: needed one of .*adamw, .* sgd, got 'lion'"),
        ({"optimizer": "lbfgs"}, "optimizer: needed one of"),
        ({"optimizer": "adamw(lr=1)"}, r"optimizer: needed the learning rate in --lr, got 'adamw\(lr=1\)'"),
        ({"optimizer": "adamw(beta=1)"}, "optimizer: needed keyword arguments among betas, .*, got"),
        ({"optimizer": "adamw(0.1)"}, "optimizer: needed keyword arguments among betas"),
        ({"optimizer": "adamw(betas=(2, 2))"}, r"optimizer: adamw\(betas=\(2, 2\)\) raised ValueError: Invalid beta"),
        (
            {"optimizer": "sgd(momentum='high')"},
            r"optimizer: needed a number for momentum, got 'high' in \"sgd\(momentum='high'\)\"",
        ),
        ({"optimizer": "adamw(weight_decay=None)"}, "optimizer: needed a number for weight_decay, got None in 'adamw"),
        ({"optimizer": "adamw(weight_decay=True)"}, "optimizer: needed a number for weight_decay, got True in 'adamw"),
        ({"optimizer": "sgd(nesterov=1, dampening='a')"}, r"optimizer: sgd\(.*\) raised "),
        ({"optimizer": "adamw(open('x'))"}, "optimizer: needed a name, with literal arguments if any"),
        ({"lr": 0.0}, "lr: needed a number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr: needed a number above 0, got nan"),
        ({"norm": "layer"}, "norm: needed one of batch, none, got 'layer'"),
        ({"init": "zero"}, "init: needed one of he, xavier, orthogonal, default, got 'zero'"),
        ({"norm": "none", "models": ["a:b"]}, "norm: needed plain or resnet among the families, got a:b only"),
        ({"families": ["mynets:net"]}, "families: needed one or more of plain, resnet, fixup, .*, got 'mynets:net'"),
    ],
    ids=lambda value: "-".join(f"{name}={one}" for name, one in value.items()) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_used_is_named(folder, options, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        sweep(**{**OPTIONS, "depths": [8], "out": "run.sqlite", **options})
    assert not (folder / "run.sqlite").exists()


def test_norm_and_init_reach_the_families(folder, in_process):
    first_losses = []
    for init in ("he", "xavier"):
        out = f"{init}.sqlite"
        sweep(**{**OPTIONS, "epochs": 1}, families=["plain"], depths=[8], norm="none", init=init, out=out)
        with open_run(out) as run:
            assert (run.config["norm"], run.config["init"]) == ("none", init)
            (cell,) = run.cells()
            first, *_ = run.epochs(cell.id)
            first_losses.append(first.train_loss)
    assert abs(first_losses[0] - first_losses[1]) > 1e-3
    n_parameters = {
        norm: sum(p.numel() for p in build("plain", 8, load("npz:f.npz"), norm).parameters())
        for norm in ("none", "batch")
    }
    assert cell.parameters == n_parameters["none"] < n_parameters["batch"]


def test_features_need_a_network_for_features(folder):
    np.savez("flat.npz", x=np.zeros((8, 5), np.float32), y=np.arange(8) % 2)
    with pytest.raises(
        ArgumentError, match=r"families: plain needs images, got features of shape \[6, 5\]; use --model"
    ):
        sweep(data="npz:flat.npz", out="run.sqlite")
    assert build("mynets:net", 4, load("npz:flat.npz"))(torch.zeros(3, 5)).shape == (3, 2)


def test_every_optimizer_on_offer_can_be_made():
    for name in optimizers._classes():
        usual = defaults(name)
        parameters = [nn.Parameter(torch.zeros(2, 2))]
        made = optimizers.make(name, parameters, usual.learning_rate, usual.momentum, usual.weight_decay)
        parameters[0].grad = torch.ones(2, 2)
        made.step()
        assert isinstance(made, parse(name)[0])
