"""The format of a sweep's file, and files of older versions."""

import math
import sqlite3
from dataclasses import replace

import pytest
from helpers.older_runs import make_version_1, make_version_2, make_version_3
from helpers.store_cases import CONFIG, STATE, epoch_row, junction_row, layer_row, write

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run


def test_the_file_has_the_application_id_and_wal_mode(path):
    write(path)
    database = sqlite3.connect(path)
    try:
        assert database.execute("PRAGMA application_id").fetchone() == (0x67725072,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        database.close()


@pytest.fixture
def path_of_version_2(path):
    """An unfinished run of schema version 2."""
    write(path)
    make_version_2(path)
    return path


@pytest.fixture
def old_path(path):
    """An unfinished run of schema version 1."""
    write(path)
    make_version_1(path)
    return path


def test_an_older_file_is_read_unchanged(old_path):
    before = old_path.read_bytes()
    with open_run(old_path) as run:
        assert run.epochs(1) == [epoch_row(0), epoch_row(1)]
        assert run.junctions(1, 0) == []
    assert old_path.read_bytes() == before


def test_an_older_file_is_resumed(old_path):
    with open_run(old_path) as reader:
        with start_run(old_path, CONFIG, {}) as run:
            assert run.checkpoint(1) == STATE
            run.save(1, [epoch_row(2)], [layer_row(2)], [junction_row(0, 1)], b"second")
        assert reader.junctions(1, 0) == []
        assert reader.junctions(1, 1) == [junction_row(0, 1)]
        assert reader.epochs(1) == [epoch_row(0), epoch_row(1), epoch_row(2)]


def test_a_file_without_running_errors_is_read_and_resumed(path_of_version_2):
    running = replace(epoch_row(2), train_loss=math.nan, train_error_pct=math.nan, running_loss=1.5)
    running = replace(running, running_error_pct=40.0)
    with open_run(path_of_version_2) as reader:
        assert reader.epochs(1) == [epoch_row(0), epoch_row(1)]
        with start_run(path_of_version_2, CONFIG, {}) as run:
            run.save(1, [running], [layer_row(2)], [], b"second")
        *before, last = reader.epochs(1)
    assert before == [epoch_row(0), epoch_row(1)]
    assert not before[-1].is_running
    assert (last.is_running, last.any_train_error_pct, last.running_loss) == (True, 40.0, 1.5)


@pytest.mark.parametrize("make_older", [make_version_1, make_version_2])
def test_an_older_file_records_failures_once_it_is_resumed(path, make_older):
    write(path)
    make_older(path)
    with open_run(path) as reader:
        assert [cell.failure for cell in reader.cells()] == ["", ""]
        for reason in ("ValueError: once", "ValueError: twice"):
            with start_run(path, CONFIG, {}) as run:
                run.record_failure(2, reason)
            assert [cell.failure for cell in reader.cells()] == ["", reason]


@pytest.mark.parametrize("make_older", [make_version_1, make_version_2, make_version_3])
def test_an_older_file_records_progress_once_it_is_resumed(path, make_older):
    write(path)
    make_older(path)
    with open_run(path) as reader:
        assert [cell.progress for cell in reader.cells()] == [0.0, 0.0]
        with start_run(path, CONFIG, {}) as run:
            run.record_progress(1, 0.25)
        assert [cell.progress for cell in reader.cells()] == [0.25, 0.0]


@pytest.mark.parametrize("has_progress", [False, True])
def test_the_reasons_of_failures_in_a_file_of_version_3_are_kept(path, has_progress):
    write(path)
    with start_run(path, CONFIG, {}) as run:
        run.record_failure(2, "ValueError: once")
    make_version_3(path)
    if has_progress:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE progress(cell INTEGER PRIMARY KEY, share REAL NOT NULL)")
        database.close()
    for _ in range(2):
        with open_run(path) as reader:
            assert [cell.failure for cell in reader.cells()] == ["", "ValueError: once"]
        start_run(path, CONFIG, {}).close()


def test_an_older_file_that_is_rejected_is_unchanged(old_path):
    before = old_path.read_bytes()
    with pytest.raises(StoreError, match="epochs is 3 in the file and 9 now"):
        start_run(old_path, {**CONFIG, "epochs": 9}, {})
    assert old_path.read_bytes() == before
