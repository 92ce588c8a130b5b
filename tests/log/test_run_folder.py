"""A run folder gives back the snapshots that were written, bit for bit, and other tools read its tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.diagnose_cases import FALLING, course, layers, passing, snapshot, with_outputs
from helpers.full_disk import full_disk
from helpers.names import NAMES

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.errors import ArgumentError, StoreError
from gradprobe.log import RunWriter, formats, read_run, writer
from gradprobe.snapshot import Measured, Provenance, SiteTable, Snapshot, Updates

either_format = pytest.mark.usefixtures("_format")


def rich(step: int, loss: float | None, seed: int = 0) -> Snapshot:
    """Returns a snapshot with everything that one can hold, and values that are easily lost."""
    generator = np.random.default_rng([seed, step])
    one = with_outputs(snapshot(step, [1.0] * 4, loss=loss), layers([1.0, 2.0, math.inf]))
    rows = generator.normal(size=one.rows.shape) * 10.0 ** generator.integers(-300, 300, one.rows.shape)
    rows[:, 4:] = generator.integers(0, 9, (len(rows), 2))  # counts
    rows[0, :4] = [math.nan, math.inf, -math.inf, -0.0]
    present = np.array([True, False, True, True])
    numels = np.array([3, 0, 2**40, 1])
    return replace(
        one,
        rows=rows,
        measured=Measured(present, numels),
        provenance=Provenance("unknown", "global", "clipped"),
        skipped=step % 2 == 1,
        scale=1 / 3,
        clip_factor=None if step % 3 == 0 else 0.1,
        differ=None if step % 2 == 0 else np.array([True, False, True, False]),
        parameter_updates=Updates(one.table.names, rows[:, ::-1].copy(), rows * 1e-3, Measured(~present, numels)),
        is_accumulated=step % 2 == 0,
        is_contested=step % 2 == 1,
    )


def values(one: Snapshot) -> dict[str, Any]:
    """Returns everything in a snapshot, comparable; arrays as bytes, so that NaN and -0.0 count."""
    signals, updates = one.signals, one.parameter_updates
    return {
        "head": (one.step, one.provenance, one.skipped, one.is_accumulated, one.is_contested),
        "numbers": repr((one.loss, one.scale, one.clip_factor)),
        "table": (one.table.names, one.table.kinds, one.table.ndims, dict(one.table.index)),
        "rows": one.rows.tobytes(),
        "measured": (one.measured.present.tobytes(), one.measured.numels.tobytes()),
        "differ": None if one.differ is None else one.differ.tolist(),
        "signals": signals
        and (
            signals.table,
            signals.rows.tobytes(),
            signals.events.sites,
            signals.events.measured.present.tobytes(),
            signals.events.measured.numels.tobytes(),
            signals.events.smallest_normal.tobytes(),
            signals.events.is_conditional,
            signals.scale,
            signals.reduction,
        ),
        "updates": updates
        and (
            updates.names,
            updates.weight_rows.tobytes(),
            updates.update_rows.tobytes(),
            updates.measured.present.tobytes(),
            updates.measured.numels.tobytes(),
        ),
    }


def write(folder: Path, *batches: list[Snapshot]) -> None:
    with RunWriter(folder) as run:
        for batch in batches:
            run.write(batch)


@either_format
def test_snapshots_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    losses = [1.0, None, math.nan, math.inf, 1 / 3, -0.0]
    plain = replace(rich(6, 0.1), signals=None, parameter_updates=None)
    history = [*(rich(step, loss) for step, loss in enumerate(losses)), plain]
    write(tmp_path / "run", history[:1], history[1:5], history[5:])
    read = read_run(tmp_path / "run").snapshots()
    assert [values(one) for one in read] == [values(one) for one in history]


@either_format
@pytest.mark.parametrize(
    "history",
    [course([2.3, 2.3, math.nan] + [math.nan] * 20), passing([2.3] * 40, layers([1, 1e3, 1e6, 1e9, 1e12, 1e15]))],
    ids=["NaN loss", "exploding outputs"],
)
def test_a_run_that_is_read_back_has_the_same_findings(tmp_path: Path, history: list[Snapshot]) -> None:
    with RunWriter(tmp_path / "run") as run:
        run.write(history)
        for finding in diagnose(history):
            run.tell(finding)
    read = read_run(tmp_path / "run")
    assert len(diagnose(history)) > 0
    assert repr(list(diagnose(read.snapshots()))) == repr(list(diagnose(history)))
    assert repr(sorted(read.findings, key=repr)) == repr(sorted(diagnose(history), key=repr))


@either_format
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_any_name_is_read_back(tmp_path: Path, name: str) -> None:
    one = snapshot(0, [1.0])
    one = replace(one, table=SiteTable((name,), ("parameter",), (2,), {name: 0, "tied": 0}))
    write(tmp_path / "run", [one])
    (read,) = read_run(tmp_path / "run").snapshots()
    assert read.table == one.table


@either_format
def test_a_model_that_changes_within_the_run_is_read_back(tmp_path: Path) -> None:
    history = [snapshot(0, [1.0, 2.0]), snapshot(1, [1.0, 2.0]), snapshot(2, [3.0]), snapshot(3, [1.0, 2.0])]
    write(tmp_path / "run", history)
    assert [list(one) for one in read_run(tmp_path / "run").snapshots()] == [list(one) for one in history]


@either_format
def test_a_run_that_resumes_adds_files_and_replaces_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, course([3.0, 2.0, 1.0, 0.5]))
    before = {path: path.read_bytes() for path in folder.rglob("*-*")}
    write(folder, course([1.1, 0.9], first=2))
    assert {path: path.read_bytes() for path in before} == before
    run = read_run(folder)
    assert [(one.step, one.loss) for one in run.snapshots()] == [(0, 3.0), (1, 2.0), (2, 1.1), (3, 0.9)]
    assert [one.loss for one in run.snapshots(session=0)] == [3.0, 2.0, 1.0, 0.5]
    assert [session["first_step"] for session in run.about["sessions"]] == [0, 2]


@either_format
def test_a_step_that_is_written_again_replaces_those_from_there_on(tmp_path: Path) -> None:
    write(tmp_path / "run", course([3.0, 2.0]), course([2.5, 1.5]))
    assert [one.loss for one in read_run(tmp_path / "run").snapshots()] == [2.5, 1.5]


@either_format
def test_a_full_disk_raises_and_leaves_what_was_stored(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunWriter(folder) as run:
        run.write([rich(0, 1.0)])
        size = max(path.stat().st_size for path in folder.rglob("*-*"))
        with full_disk(size + 100), pytest.raises(StoreError, match="cannot write this file"):
            run.write([rich(step, 1.0) for step in range(1, 60)])
        assert [one.step for one in read_run(folder).snapshots()] == [0]
        run.write([rich(1, 1.0)])
    assert [one.step for one in read_run(folder).snapshots()] == [0, 1]


@either_format
def test_files_stay_small_and_their_number_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PART_ROWS", 20)
    write(tmp_path / "run", *([one] for one in course(FALLING)))  # 40 steps of 3 parameters
    assert len(list((tmp_path / "run" / "parameters").iterdir())) == 6
    assert [one.loss for one in read_run(tmp_path / "run").snapshots()] == FALLING


def test_two_writers_cannot_share_a_folder(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run"), pytest.raises(StoreError, match="another probe is writing in this folder"):
        RunWriter(tmp_path / "run")
    RunWriter(tmp_path / "run").close()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"needed a run folder, found no about\.json"):
        read_run(tmp_path)
    for text in ('{"format": 99}', '{"format": 1}', "[1]"):
        (tmp_path / "about.json").write_text(text)
        for opened in (read_run, RunWriter):
            with pytest.raises(StoreError, match="needed a run folder of format 1"):
                opened(tmp_path)  # type: ignore[operator]


def test_the_draft_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    write(tmp_path / "run", course([1.0]))
    draft = tmp_path / "run" / "steps" / ".0123.unfinished"
    draft.write_text("half")
    write(tmp_path / "run", course([1.0], first=1))
    assert not draft.exists()


def test_parquet_without_pyarrow_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path / "run", course([1.0]))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ArgumentError, match=r"pip install 'gradprobe\[log\]'"):
        read_run(tmp_path / "run").snapshots()
    write(tmp_path / "other", course([1.0]))
    assert [one.loss for one in read_run(tmp_path / "other").snapshots()] == [1.0]


@pytest.fixture
def parquet_run(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    write(tmp_path / "run", [rich(step, 1 / (step + 1)) for step in range(3)])
    return tmp_path / "run"


def expected() -> list[tuple[int, str, float]]:
    history = [rich(step, 1 / (step + 1)) for step in range(3)]
    return [(one.step, name, stats.norm) for one in history for name, stats in one.sites.items()]


def test_pandas_reads_a_table(parquet_run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(parquet_run / "parameters").query("present")
    rows = list(zip(table.step.tolist(), table.parameter.tolist(), table.norm.tolist(), strict=True))
    assert repr(rows) == repr(expected())
    assert pandas.read_parquet(parquet_run / "steps").loss.tolist() == [1.0, 0.5, 1 / 3]


def test_polars_reads_a_table(parquet_run: Path) -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(parquet_run / "parameters" / "*.parquet").filter(polars.col("present"))
    assert repr(table.select("step", "parameter", "norm").rows()) == repr(expected())


def test_duckdb_reads_a_table(parquet_run: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"select step, parameter, norm from '{parquet_run}/parameters/*.parquet' where present"
    assert repr(duckdb.sql(query).fetchall()) == repr(expected())


def test_json_lines_are_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "best_format", formats.JsonLines)
    write(tmp_path / "run", [rich(0, math.nan)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (path,) = (tmp_path / "run" / "parameters").iterdir()
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["parameter"] for line in lines] == list(rich(0, 1.0).table.names)
    assert [line["norm"] is None for line in lines] == [False, True, False, False]
