"""The command line: exit codes, one line per error, and JSON that matches the tables."""

import json
import os
import subprocess
import sys

import pytest

from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.store import open_run, start_run
from gradprobe.experiments.train import EpochResult
from gradprobe.report.records import EpochRow, LayerRow


@pytest.fixture
def run_file(tmp_path):
    """The file of a finished sweep of two networks, made without training."""
    path = tmp_path / "run.sqlite"
    with start_run(path, {"data": "digits", "epochs": 1}, {"torch_version": "2.13.0"}) as run:
        run.add_cells([("plain", 20, 0, 269_722), ("plain", 56, 0, 853_018)])
        for cell, error in ((1, 0.5), (2, 67.0)):
            epochs = [
                EpochRow(epoch, 2.3, error_pct, error_pct + 1, 3.0) for epoch, error_pct in ((0, 90.0), (1, error))
            ]
            layers = [
                LayerRow(epoch, position, f"convs.{position}.weight", 0.5, 0.1, 0.2, 0.0, 0, 25)
                for epoch in (0, 1)
                for position in (0, 1)
            ]
            run.save(cell, epochs, layers, [], b"", "done")
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's file of models in the working directory."""
    (tmp_path / "mymodels.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from helper import WIDTH\n"
        "ready = nn.Linear(4, 2)\n"
        "class Make:\n"
        "    @staticmethod\n"
        "    def net(width, deep=False):\n"
        "        layers = [nn.Linear(width, width) for _ in range(3 if deep else 1)]\n"
        "        return nn.Sequential(*layers)\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.words, self.fc = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, 2)\n"
        "    def forward(self, ids, x):\n"
        "        return self.fc(self.words(ids).mean(1) + x)\n"
        "def broken():\n"
        "    raise ValueError('first line\\nsecond line')\n"
        "def number():\n"
        "    return 3\n"
        "constant = 3\n"
        "class Loud(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return super().forward(x)\n"
        "class Crashing(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        raise KeyError('pixel_values')\n"
    )
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mymodels", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield "mymodels"
    for name in ("mymodels", "helper"):
        sys.modules.pop(name, None)


def test_check_finds_the_vanishing_gradient_of_the_lesson(gradprobe):
    code, out, _ = gradprobe("check", "gradprobe.networks:deep_cnn(50)", "--input", "3,16,16")
    assert code == 1
    assert "vanishing" in out
    assert "features.0.weight" in out


def test_check_finds_a_residual_network_healthy(gradprobe):
    code, out, _ = gradprobe(
        "check", "gradprobe.networks:resnet(20)", "--input", "3,16,16", "--batch-size", "8", "--json"
    )
    assert code == 0
    flow = json.loads(out)
    assert flow["verdict"] == "healthy"
    assert flow["findings"] == []
    assert {"name", "norm", "rms", "status"} <= set(flow["layers"][0])


def test_json_is_all_that_a_check_prints(gradprobe, module):
    code, out, err = gradprobe("check", f"{module}:Loud(4, 2)", "--input", "4", "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == "healthy"
    assert err == "hello\n"


def test_a_model_that_crashes_is_no_finding(gradprobe, module):
    code, out, err = gradprobe("check", f"{module}:Crashing(4, 2)", "--input", "4")
    assert (code, out) == (3, "")
    assert err.splitlines()[-1] == "gradprobe: raised: KeyError: 'pixel_values'"


def test_a_crash_of_its_own_is_no_finding(gradprobe, monkeypatch):
    monkeypatch.setattr("gradprobe.cli.commands.load_model", _crash)
    code, out, err = gradprobe("check", "torch.nn:Linear(4, 2)", "--input", "4")
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].endswith("ZeroDivisionError: division by zero")


def _crash(_: str) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.mark.soak
def test_a_terminal_without_box_characters(module):
    command = [sys.executable, "-m", "gradprobe.cli", "check", "torch.nn:Linear(4, 2)", "--input", "4"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"weight" in done.stdout


def test_a_check_can_be_repeated(gradprobe):
    command = ("check", "gradprobe.networks:deep_cnn(5)", "--input", "3,8,8", "--json")
    assert gradprobe(*command)[1] == gradprobe(*command)[1]


@pytest.mark.parametrize(
    ("target", "inputs", "layers"),
    [
        ("mymodels:ready", ["4"], 2),
        ("mymodels:Make.net(4)", ["4"], 2),
        ("mymodels:Make.net(width=4, deep=True)", ["4"], 6),
        ("mymodels.py:Make.net( 4 )", ["4"], 2),
        ("./mymodels.py:ready", ["4"], 2),
        ("mymodels:Two", ["int64[0:100]:5", "8"], 3),
        ("mymodels:Two()", ["int64[0:100]:5", "8"], 3),
    ],
)
def test_check_accepts_models_classes_and_functions(gradprobe, module, target, inputs, layers):
    options = [word for text in inputs for word in ("--input", text)]
    code, out, err = gradprobe("check", target, *options, "--json")
    assert code in (0, 1), err
    assert len(json.loads(out)["layers"]) == layers


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mymodels", "target: needed MODULE:CALLABLE or FILE.py:CALLABLE, got 'mymodels'"),
        ("mymodels:", "target: needed MODULE:CALLABLE or FILE.py:CALLABLE, got 'mymodels:'"),
        (":ready", "target: needed MODULE:CALLABLE or FILE.py:CALLABLE, got ':ready'"),
        ("nowhere:net", "target: nowhere:net raised ModuleNotFoundError: No module named 'nowhere'"),
        ("nowhere.py:net", "target: there is no file nowhere.py"),
        ("mymodels:nothing", "target: mymodels has no nothing, got 'mymodels:nothing'"),
        ("mymodels:broken", "target: mymodels:broken raised ValueError: first line second line"),
        ("mymodels:number", "target: needed a torch.nn.Module; mymodels:number returned an object of type int"),
        (
            "mymodels:constant",
            "target: needed a model or a callable that returns one; mymodels:constant is of type int",
        ),
        ("mymodels:Make.net(4", "target: needed a name, with literal arguments if any, got 'Make.net(4'"),
        ("mymodels:Make.net(*[4])", "target: needed a name, with literal arguments if any"),
        ("mymodels:Make.net(**{'width': 4})", "target: needed a name, with literal arguments if any"),
        ("mymodels:1 + 1", "target: needed a name, with literal arguments if any"),
        ("gradprobe.networks:resnet(21)", "depth: needed 6n+2"),
    ],
)
def test_a_wrong_target_is_one_line(gradprobe, module, target, message):
    code, out, err = gradprobe("check", target, "--input", "4")
    assert (code, out) == (2, "")
    assert err.startswith(f"gradprobe: {message}")
    assert err.count("\n") == 1


def test_arguments_of_a_target_are_never_executed(gradprobe, module, tmp_path):
    trap = tmp_path / "trap"
    code, _, err = gradprobe(
        "check", f"mymodels:Make.net(__import__('pathlib').Path({str(trap)!r}).touch())", "--input", "4"
    )
    assert code == 2
    assert "literal" in err
    assert not trap.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check", "gradprobe.networks:resnet(20)"],
        ["check", "gradprobe.networks:resnet(20)", "--input", "3,a"],
        ["check", "gradprobe.networks:resnet(20)", "--input", "3,8,8", "--batch-size", "0"],
        ["check", "gradprobe.networks:resnet(20)", "--input", "5,8,8"],
        ["sweep", "--depths", "20,x"],
        ["sweep", "--depths", "21"],
        ["sweep", "--depths", ","],
        ["sweep", "--families", "vgg"],
        ["sweep", "--seeds", "-1"],
        ["sweep", "--epochs", "many"],
        ["sweep", "--epochs", "0"],
        ["sweep", "--data", "imagefolder:nowhere"],
        ["sweep", "--data", "cifar10:nowhere"],
        ["sweep", "--engine", "slurm"],
        ["sweep", "--colour", "red"],
        ["report"],
        ["report", "nowhere.sqlite"],
        ["remember"],
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_2_and_no_traceback(gradprobe, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = gradprobe(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["report"], pytest.param(["sweep", "--out"], marks=pytest.mark.soak)])
def test_a_foreign_file_is_one_line_and_stays_as_it_is(tmp_path, command):
    """Runs the command line in its own process, where an uncaught exception would show."""
    path = tmp_path / "thesis.sqlite"
    path.write_text("not a database at all")
    ended = subprocess.run([sys.executable, "-m", "gradprobe.cli", *command, path], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"gradprobe: {path}: needed a file written by gradprobe sweep, found one that is not an SQLite database\n"
    )
    assert path.read_text() == "not a database at all"


def test_report_prints_the_table(gradprobe, run_file):
    code, out, err = gradprobe("report", run_file)
    assert (code, err) == (0, "")
    for text in ("plain-20", "plain-56", "67.0"):
        assert text in out


def test_report_json_has_the_same_content(gradprobe, run_file):
    code, out, _ = gradprobe("report", run_file, "--json")
    assert code == 0
    assert "plain-56" in out
    assert json.loads(out)["config"]["data"] == "digits"


def test_report_writes_the_requested_files(gradprobe, run_file, tmp_path):
    pytest.importorskip("altair", reason="needs altair, which gradprobe[report] installs")
    pytest.importorskip("vl_convert", reason="needs vl-convert, which gradprobe[report] installs")
    page, tables, charts = tmp_path / "page.html", tmp_path / "tables", tmp_path / "charts"
    code, _, err = gradprobe("report", run_file, "--html", page, "--csv", tables, "--png", charts)
    assert code == 0
    assert "plain-56" in page.read_text()
    assert list(tables.glob("*.csv"))
    assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts.iterdir())
    assert err.count("wrote ") == 1 + len(list(tables.iterdir())) + len(list(charts.iterdir()))


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_missing_drawing_library_is_named(gradprobe, run_file, tmp_path, monkeypatch, option):
    for name in ("gradprobe.report.html", "gradprobe.report.sweep_charts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("altair", "vl_convert"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = gradprobe("report", run_file, option, tmp_path / "out")
    assert code == 2
    assert f"{option}: " in err
    assert "pip install 'gradprobe[report]'" in err


def test_doctor_says_which_parts_are_ready(gradprobe):
    code, out, _ = gradprobe("doctor", "--json")
    assert code == 0
    state = json.loads(out)
    assert state["parts"]["reference"] == "ready"
    code, table, _ = gradprobe("doctor")
    assert code == 0
    assert state["versions"]["torch"] in table


@pytest.fixture
def no_training(monkeypatch):
    """Records the jobs of a sweep instead of training them."""
    noted = []

    def run(jobs, workers, checkpoint):
        noted.extend(
            (job.cell.name, job.cell.seed, job.recipe.epochs, job.recipe.batch_size, len(workers)) for job in jobs
        )
        return iter(())

    monkeypatch.setattr(engines, "run_local", run)
    return noted


def test_sweep_applies_its_options(gradprobe, no_training, tmp_path):
    out = tmp_path / "new" / "run.sqlite"
    options = ["--families", "resnet, plain", "--depths", "8,14", "--seeds", "3,1", "--epochs", "7", "--jobs", "2"]
    code, printed, _ = gradprobe("sweep", *options, "--out", out)
    assert code == 0
    assert "0 of 8 training runs done" in printed
    assert set(no_training) == {
        (f"{family}-{depth}", seed, 7, 64, 2) for family in ("plain", "resnet") for depth in (8, 14) for seed in (1, 3)
    }
    with open_run(out) as run:
        assert (run.config["data"], run.config["epochs"], run.config["batch_size"]) == ("digits", 7, 64)


def test_sweep_json_is_the_reports(gradprobe, no_training, tmp_path):
    out = tmp_path / "run.sqlite"
    code, printed, _ = gradprobe("sweep", "--depths", "8", "--out", out, "--json")
    assert code == 0
    assert json.loads(printed) == json.loads(gradprobe("report", out, "--json")[1])


def test_ctrl_c_says_how_to_resume(gradprobe, monkeypatch, tmp_path):
    def interrupted(jobs, workers, checkpoint):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(engines, "run_local", interrupted)
    code, _, err = gradprobe("sweep", "--depths", "8", "--out", tmp_path / "run.sqlite")
    assert code == 130
    assert "stopped; run the same command again to resume" in err


def test_merge_counts_a_diverged_run_and_a_failed_one_apart(gradprobe, tmp_path):
    part = tmp_path / "part.sqlite"
    with start_run(part, {"data": "digits", "epochs": 1}, {"torch_version": "2.13.0"}) as run:
        run.add_cells([("plain", 8, seed, 75290) for seed in range(4)])
        for cell_id, status in ((1, "done"), (2, "diverged")):
            run.save(cell_id, [EpochRow(1, 2.3, 90.0, 90.0, 1.0)], [], [], b"", status)
        run.record_failure(3, "ValueError: no such layer")
    code, printed, _ = gradprobe("merge", tmp_path / "run.sqlite", part)
    assert (code, printed) == (0, f"{tmp_path / 'run.sqlite'}: 1 of 4 training runs done, 1 diverged, 1 failed\n")


def test_a_sweep_that_runs_out_of_time_says_how_to_resume(gradprobe, no_training, tmp_path):
    out = tmp_path / "run.sqlite"
    code, _, err = gradprobe("sweep", "--depths", "8", "--out", out, "--max-hours", "1e-9")
    assert (code, err) == (124, f"stopped by --max-hours; run the same command again to resume {out}\n")
    code, _, err = gradprobe("sweep", "--depths", "8", "--out", out, "--max-hours", "0")
    assert (code, err) == (2, "gradprobe: --max-hours: needed a number above 0, got 0.0\n")


@pytest.fixture
def half_training(monkeypatch):
    """Trains cells of depth 8 without training, fails those of depth 14, and has no time for deeper ones."""

    def run(jobs, workers, checkpoint):
        for job in jobs:
            if job.cell.depth == 14:
                yield job, engines.Failure(f"ValueError: {job.cell.family}", "Traceback: in a worker")
            elif job.cell.depth == 8:
                yield job, EpochResult((EpochRow(1, 2.3, 90.0, 90.0, 1.0),), (), (), b"", "done")

    monkeypatch.setattr(engines, "run_local", run)


@pytest.mark.usefixtures("half_training")
def test_a_failed_training_run_does_not_hide_that_time_is_over(gradprobe, tmp_path):
    options = ["--families", "plain", "--seeds", "0", "--max-hours", "1e-9"]
    failed = "gradprobe: plain-14 seed 0: ValueError: plain\n"
    out = tmp_path / "run.sqlite"
    for depths, status in (("8", 0), ("20", 124), ("8,14", 2), ("8,14,20", 124), ("8", 0), ("14", 2), ("8,20", 124)):
        code, printed, err = gradprobe("sweep", *options, "--depths", depths, "--out", out)
        assert (code, failed in err) == (status, "14" in depths), depths
        assert err.endswith(f"stopped by --max-hours; run the same command again to resume {out}\n") == (status == 124)
        assert bool(printed) == (status == 0)
    with open_run(out) as run:
        assert {cell.depth: (cell.status, cell.failure) for cell in run.cells()} == {
            8: ("done", ""),
            14: ("pending", "ValueError: plain"),
            20: ("pending", ""),
        }


@pytest.mark.usefixtures("half_training")
def test_a_failed_training_run_does_not_end_a_spec_of_several_grids(gradprobe, tmp_path):
    spec, out = tmp_path / "run.sqlite", tmp_path / "again.sqlite"
    for options in (["--families", "plain", "--depths", "14,8"], ["--families", "resnet", "--depths", "8,14"]):
        gradprobe("sweep", *options, "--seeds", "0", "--out", spec)
    code, _, err = gradprobe("sweep", "--spec", spec, "--out", out)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith(("gradprobe: ", "Traceback"))]
    trace = "Traceback: in a worker"
    assert errors == [
        trace,
        "gradprobe: plain-14 seed 0: ValueError: plain",
        trace,
        "gradprobe: resnet-14 seed 0: ValueError: resnet",
    ]
    with open_run(out) as run:
        assert {(cell.name, cell.status) for cell in run.cells()} == {
            ("plain-8", "done"),
            ("plain-14", "pending"),
            ("resnet-8", "done"),
            ("resnet-14", "pending"),
        }


@pytest.mark.parametrize("command", [["--help"], ["sweep", "--help"], ["explain"], ["report"]], ids=" ".join)
def test_commands_that_compute_nothing_do_not_import_torch(run_file, command):
    arguments = [*command, str(run_file)] if command == ["report"] else command
    program = (
        "import sys\n"
        "from gradprobe.cli.commands import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
