"""Each tracker's own reader finds the numbers, profiles and findings that a sink has written, in the right run."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import wandb_file
from helpers.diagnose_cases import Out, snapshot, with_outputs
from helpers.full_disk import full_disk
from helpers.names import NAMES

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import ArgumentError, GradprobeWarning
from gradprobe.sinks import CSV, JSONL, Feed, MLflow, Sink, TensorBoard, Trackio, WandB
from gradprobe.snapshot.snapshot import Snapshot

WEIGHT = "layer0.weight"
FINDING = Finding(
    "vanishing", "backward", (WEIGHT,), (0, 4), {}, "the gradient vanishes", "", "", "depth", ("add shortcuts",)
)
TEXT = "The gradient vanishes. Usual cause: depth. Try first: add shortcuts."
ABOUT = {"every": 1, "versions": {"torch": "2.13"}, "parameters": [WEIGHT, "layer1.weight"]}
SHIFT = 1000  # the trainer's number of the first step
STEPS = [
    with_outputs(
        snapshot(step, [0.5 + step, 10.0, 0.25 if step else math.inf], loss=1 / (step + 1)),
        [Out("0", "Linear", 1.0), Out("1", "ReLU", 0.5)],
    )
    for step in range(30)
]
HOSTILE = replace(
    snapshot(0, [1.0] * len(NAMES)),
    table=replace(
        snapshot(0, [1.0] * len(NAMES)).table,
        names=tuple(NAMES.values()),
        index={name: k for k, name in enumerate(NAMES.values())},
    ),
)


def feed(sink: Sink, steps: list[Snapshot] = STEPS) -> None:
    """Hands steps and a finding to a sink, which takes them all without a warning and leaves random numbers alone."""
    before = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradprobeWarning)
        fed = Feed(sink, ABOUT)
        for one in steps:
            fed.put(one.step + SHIFT, one)
        fed.tell(SHIFT + 4, FINDING)
        fed.close(timeout_s=60)
    assert (fed.failure, fed.n_lost, fed.n_written) == ("", 0, len(steps) + 1)
    assert random.getstate() == before


def _fill(fed: Feed) -> None:
    for one in STEPS:
        fed.put(one.step, one)
    fed.close(timeout_s=60)


def _write(sink: Sink, n_steps: int) -> None:
    for step in range(n_steps):
        sink.write(step, STEPS[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every tracker stays in."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


class TestWandB:
    @pytest.fixture
    def wandb(self, folder: Path) -> Iterator[Any]:
        wandb = pytest.importorskip("wandb")
        wandb.teardown()  # it keeps the settings of its first use
        yield wandb
        wandb.teardown()

    def file(self, folder: Path) -> Path:
        import wandb

        wandb.teardown()  # waits for the process that writes the file
        (path,) = folder.rglob("*.wandb")
        return path

    def test_a_run_of_its_own_has_each_step_with_its_own_axis(self, wandb: Any, folder: Path) -> None:
        feed(WandB())
        assert wandb.run is None
        rows = wandb_file.rows(self.file(folder))
        assert [row["gradprobe/step"] for row in rows] == list(range(SHIFT, SHIFT + 30))
        for one, row in zip(STEPS, rows, strict=True):
            assert {name: row[name] for name in one.metrics()} == one.metrics()
        axes = {metric.glob_name: metric.step_metric for metric in wandb_file.records(self.file(folder), "metric")}
        assert axes["gradprobe/*"] == "gradprobe/step"
        (alert,) = wandb_file.records(self.file(folder), "alert")
        assert (alert.title, alert.text, alert.level) == ("vanishing (backward)", f"Step 1004: {TEXT}", "WARN")
        (table,) = folder.rglob("media/table/gradprobe/profile/grad_norm_table_*.json")
        assert json.loads(table.read_text())["data"] == [
            [0, WEIGHT, pytest.approx(math.log10(0.5)), 0.5],
            [1, "layer1.weight", 1.0, 10.0],
            [2, "layer2.weight", None, math.inf],
        ]

    @pytest.mark.parametrize("names_steps", [True, False])
    def test_an_open_run_keeps_every_row_of_its_trainer(self, wandb: Any, folder: Path, names_steps: bool) -> None:
        run = wandb.init(project="mine")
        sink = WandB()
        sink.open(ABOUT)
        for one in STEPS:
            for part in range(3):  # more steps of the probe than rows of the trainer
                sink.write(3 * one.step + part, one)
            run.log({"loss": one.loss}, step=one.step if names_steps else None)
        sink.close()
        run.log({"loss": 0.0}, step=30)
        run.finish()
        rows = wandb_file.rows(self.file(folder))
        assert [(row["_step"], row["loss"]) for row in rows] == [*((one.step, one.loss) for one in STEPS), (30, 0.0)]
        joined = [row.get("gradprobe/step") for row in rows]
        # a row with a named step stays open until the next
        newest = [3 * step + 2 for step in range(30)]
        assert joined == ([*newest[1:], None, None] if names_steps else [*newest, None])

    def test_an_open_run_can_get_a_row_for_each_step(self, wandb: Any, folder: Path) -> None:
        with wandb.init(project="mine") as run:
            feed(WandB(own_rows=True))
            assert wandb.run is run
            run.log({"loss": 1.0})
        rows = wandb_file.rows(self.file(folder))
        assert [row.get("gradprobe/step") for row in rows] == [*range(SHIFT, SHIFT + 30), None]

    def test_an_open_run_without_rows_of_its_trainer_is_told(self, wandb: Any, folder: Path) -> None:
        with wandb.init(project="mine"):
            sink = WandB(profile_every=0)
            sink.open({})
            with pytest.warns(GradprobeWarning, match=r"waits for a row of the trainer .*own_rows=True"):
                _write(sink, 300)

    def test_a_short_script_that_closes_at_exit_loses_nothing(self, wandb: Any, folder: Path) -> None:
        script = (
            "import atexit\n"
            "from helpers.diagnose_cases import snapshot\n"
            "from gradprobe.sinks import Feed, WandB\n"
            "feed = Feed(WandB())\n"
            "atexit.register(feed.close, 60)\n"
            "for step in range(5): feed.put(step, snapshot(step, [1.0]))\n"
        )
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment, timeout=250)
        assert [row["gradprobe/step"] for row in wandb_file.rows(self.file(folder))] == list(range(5))

    def test_hostile_names_are_taken(self, wandb: Any, folder: Path) -> None:
        feed(WandB(detail="all"), [HOSTILE])
        (row,) = wandb_file.rows(self.file(folder))
        assert len([name for name in row if name.startswith("gradprobe/grad_norm/")]) == len(NAMES)


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _tensorboard(self) -> None:
        pytest.importorskip("tensorboard")

    def read(self, folder: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(folder / "gradprobe"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
        read.Reload()
        return read

    def test_the_event_file_has_scalars_a_histogram_and_the_finding(self, tmp_path: Path) -> None:
        feed(TensorBoard(tmp_path / "a" / "b", profile_every=10))
        read = self.read(tmp_path / "a" / "b")
        assert set(read.Tags()["scalars"]) == {name for one in STEPS for name in one.metrics()}
        for name in (
            "gradprobe/total_norm",
            "gradprobe/loss",
            f"gradprobe/grad_norm/{WEIGHT}",
            "gradprobe/act_rms_max",
        ):
            assert [(event.step, event.value) for event in read.Scalars(name)] == [
                (one.step + SHIFT, pytest.approx(one.metrics()[name])) for one in STEPS
            ]
        profiles = read.Histograms("gradprobe/profile/grad_norm_log10")
        assert [event.step for event in profiles] == [1000, 1010, 1020]
        second = profiles[1].histogram_value
        assert (second.num, second.min, second.max) == (
            3,
            pytest.approx(math.log10(0.25)),
            pytest.approx(math.log10(10.5)),
        )
        assert sum(second.bucket) == 3
        (text,) = read.Tensors("gradprobe/findings/vanishing (backward)")
        assert (text.step, text.tensor_proto.string_val[0].decode()) == (1004, TEXT)

    def test_in_the_trainer_s_folder_both_grow_in_a_board_that_is_open(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
        from torch.utils.tensorboard import SummaryWriter

        sink, board = TensorBoard(tmp_path), EventMultiplexer()
        sink.open(ABOUT)
        with SummaryWriter(str(tmp_path)) as writer:
            for one in STEPS:
                writer.add_scalar("train/loss", one.loss, one.step)
                writer.flush()
                sink.write(one.step, one)
                board.AddRunsFromDirectory(str(tmp_path)).Reload()
                assert len(board.Scalars(".", "train/loss")) == one.step + 1
                assert len(board.Scalars("gradprobe", "gradprobe/total_norm")) == one.step + 1
        sink.close()

    def test_hostile_names_are_taken(self, tmp_path: Path) -> None:
        feed(TensorBoard(tmp_path, detail="all"), [HOSTILE])
        names = [name for name in self.read(tmp_path).Tags()["scalars"] if name.startswith("gradprobe/grad_norm/")]
        assert len(names) == len(NAMES)

    def test_a_full_disk_switches_it_off(self, tmp_path: Path) -> None:
        fed = Feed(TensorBoard(tmp_path))
        off = pytest.warns(GradprobeWarning, match=r"TensorBoard is switched off.*File too large.*not written")
        with off, full_disk(10_000):
            _fill(fed)
        assert 0 < fed.n_written < 30
        assert len(self.read(tmp_path).Scalars("gradprobe/total_norm")) == fed.n_written


class TestMLflow:
    @pytest.fixture
    def mlflow(self, folder: Path) -> Iterator[Any]:
        mlflow = pytest.importorskip("mlflow")
        mlflow.set_tracking_uri((folder / "mlruns").as_uri())
        yield mlflow
        mlflow.end_run()
        mlflow.set_tracking_uri(None)

    def check(self, mlflow: Any, run_id: str) -> None:
        client = mlflow.MlflowClient()
        for name in ("gradprobe/total_norm", f"gradprobe/grad_norm/{WEIGHT}"):
            found = {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
            assert set(found) == {one.step + SHIFT for one in STEPS}
            assert {step: value for step, value in found.items() if step > SHIFT} == {
                one.step + SHIFT: pytest.approx(one.metrics()[name]) for one in STEPS[1:]
            }
        tags = client.get_run(run_id).data.tags
        assert tags["gradprobe/finding/vanishing _backward_"] == f"Step 1004: {TEXT}"
        assert tags["gradprobe/versions/torch"] == "2.13"
        profile = mlflow.artifacts.load_dict(f"runs:/{run_id}/gradprobe/profile_00001000.json")
        assert profile["grad_norm"] == {WEIGHT: 0.5, "layer1.weight": 10.0, "layer2.weight": "inf"}

    def test_a_run_of_its_own_is_ended(self, mlflow: Any) -> None:
        feed(MLflow())
        assert mlflow.active_run() is None
        (run,) = mlflow.search_runs(output_format="list")
        assert run.info.status == "FINISHED"
        self.check(mlflow, run.info.run_id)

    def test_a_database_takes_the_same(self, mlflow: Any, folder: Path) -> None:
        pytest.importorskip("sqlalchemy")
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        self.test_a_run_of_its_own_is_ended(mlflow)

    def test_the_active_run_goes_on(self, mlflow: Any) -> None:
        run = mlflow.start_run()
        mlflow.log_metric("loss", 1.0, step=0)
        feed(MLflow())
        mlflow.log_metric("loss", 0.5, step=1)
        assert mlflow.active_run().info.run_id == run.info.run_id
        mlflow.end_run()
        self.check(mlflow, run.info.run_id)
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5)]

    def test_hostile_names_are_taken(self, mlflow: Any) -> None:
        feed(MLflow(detail="all"), [HOSTILE])
        (run,) = mlflow.search_runs(output_format="list")
        assert len([name for name in run.data.metrics if name.startswith("gradprobe/grad_norm/")]) > len(NAMES) - 6


class TestTrackio:
    @pytest.fixture(scope="class")
    @classmethod
    def trackio(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        with pytest.MonkeyPatch.context() as patch:  # read when it is imported
            patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
            return pytest.importorskip("trackio")

    def logs(self, project: str) -> list[dict[str, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        (run,) = SQLiteStorage.get_runs(project)
        return SQLiteStorage.get_logs(project, run)

    def test_a_run_of_its_own_has_each_step(self, trackio: Any) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        feed(Trackio(project="own"))
        logs = self.logs("own")
        assert [row["step"] for row in logs] == [one.step + SHIFT for one in STEPS]
        for one, row in zip(STEPS, logs, strict=True):
            assert {name: row[name] for name in one.metrics()} == one.metrics()
        assert logs[0]["gradprobe/profile/grad_norm"]["_value"][1] == {
            "depth": 1,
            "name": "layer1.weight",
            "grad_norm": 10.0,
        }
        (alert,) = SQLiteStorage.get_alerts("own")
        assert (alert["step"], alert["title"], alert["text"]) == (1004, "vanishing (backward)", TEXT)

    def test_the_open_run_goes_on(self, trackio: Any) -> None:
        trackio.init(project="mine", embed=False)
        feed(Trackio())
        trackio.log({"loss": 1.0}, step=SHIFT + 30)
        trackio.finish()
        logs = self.logs("mine")
        assert [row["step"] for row in logs] == [*(one.step + SHIFT for one in STEPS), SHIFT + 30]
        assert logs[-1]["loss"] == 1.0

    def test_hostile_names_are_taken(self, trackio: Any) -> None:
        feed(Trackio(project="hostile", detail="all"), [HOSTILE])
        (row,) = self.logs("hostile")
        assert len([name for name in row if name.startswith("gradprobe/grad_norm/")]) == len(NAMES)


class TestFiles:
    def test_json_lines_hold_steps_and_findings(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "steps.jsonl"
        feed(JSONL(path, profile_every=10))
        *steps, finding = map(json.loads, path.read_text().splitlines())
        assert finding == {"step": 1004, "finding": "vanishing (backward)", "text": TEXT}
        assert [line["step"] for line in steps] == [one.step + SHIFT for one in STEPS]
        assert steps[0]["gradprobe/total_norm"] == "inf"
        assert {"step": 1001, **STEPS[1].metrics()} == steps[1]
        assert {"step": 1010, **STEPS[10].metrics(), **STEPS[10].metrics("all")} == steps[10]

    def test_csv_has_a_row_per_number(self, tmp_path: Path) -> None:
        pandas = pytest.importorskip("pandas")
        path = tmp_path / "steps.csv"
        feed(CSV(path, detail="all"))
        table = pandas.read_csv(path)
        assert list(table.columns) == ["step", "name", "value", "text"]
        assert not table.duplicated(["step", "name"]).any()
        norms = table[table.name == f"gradprobe/grad_norm/{WEIGHT}"]
        assert dict(zip(norms.step, norms.value, strict=True)) == {one.step + SHIFT: 0.5 + one.step for one in STEPS}
        assert table[table.text.notna()].values.tolist() == [
            [1004, "gradprobe/finding/vanishing (backward)", pytest.approx(math.nan, nan_ok=True), TEXT]
        ]

    @pytest.mark.parametrize("kind", [JSONL, CSV])
    def test_a_resumed_run_is_appended_without_the_line_that_was_cut(
        self, tmp_path: Path, kind: type[JSONL] | type[CSV]
    ) -> None:
        path = tmp_path / "steps"
        feed(kind(path))
        whole = path.read_bytes()
        for n_cut in (1, 100, len(whole) - 3):
            path.write_bytes(whole[:-n_cut])
            feed(kind(path))
            kept = whole[: whole[:-n_cut].rfind(b"\n") + 1]
            assert path.read_bytes() == kept + (whole if kind is JSONL or not kept else whole.split(b"\n", 1)[1])

    @pytest.mark.parametrize("kind", [JSONL, CSV])
    def test_another_file_is_left_alone(self, tmp_path: Path, kind: type[JSONL] | type[CSV]) -> None:
        path = tmp_path / "thesis.tex"
        path.write_text("my only copy")
        fed = Feed(kind(path))
        with pytest.warns(GradprobeWarning, match=r"thesis\.tex: needed a file that this sink wrote, found another"):
            _fill(fed)
        assert path.read_text() == "my only copy"

    @pytest.mark.parametrize("kind", [JSONL, CSV])
    def test_hostile_names_stay_in_their_lines(self, tmp_path: Path, kind: type[JSONL] | type[CSV]) -> None:
        feed(kind(tmp_path / "steps", detail="all"), [HOSTILE])
        text = (tmp_path / "steps").read_bytes().decode()
        assert text.replace("\n", "").isprintable()
        if kind is JSONL:
            line = json.loads(text.split("\n")[0])
            assert {f"gradprobe/grad_norm/{name}" for name in NAMES.values()} <= set(line)
        else:
            rows = list(csv.reader(io.StringIO(text)))
            assert {len(row) for row in rows} == {4}

    def test_every_thins_out(self, tmp_path: Path) -> None:
        feed(JSONL(tmp_path / "steps.jsonl", every=7, profile_every=0))
        lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1000, 1007, 1014, 1021, 1028, 1004]


@pytest.mark.parametrize("kind", [WandB, MLflow, Trackio, lambda: TensorBoard("runs")])
def test_a_missing_library_is_told_when_the_sink_is_made(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in ("wandb", "mlflow", "trackio", "tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr("gradprobe.sinks.tracker.import_module", without)
    with pytest.raises(ArgumentError, match=r"needs (\w+); install it with: pip install 'gradprobe\[\1\]'"):
        kind()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detail": "some"}, "detail: needed 'summary' or 'all', got 'some'"),
        ({"every": 0}, "every: needed an integer of at least 1, got 0"),
        ({"every": True}, "every: needed an integer of at least 1, got True"),
        ({"profile_every": -1}, "profile_every: needed an integer of at least 0, got -1"),
    ],
)
def test_invalid_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        JSONL("steps.jsonl", **options)
