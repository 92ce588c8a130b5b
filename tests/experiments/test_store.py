"""The sweep's file: rows are read as written, epochs are atomic, and other programs' files are never changed."""

import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.full_disk import full_disk
from helpers.names import NAMES
from helpers.older_runs import make_version_1, make_version_2, make_version_3

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow

CONFIG = {"data": "digits", "epochs": 3, "learning_rate": 0.1}
CELLS = [("plain", 8, 0, 75_002), ("resnet", 8, 0, 75_002)]
STATE = bytes(range(256)) * 4096


def names_beside(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def epoch_row(epoch, **changes):
    return replace(EpochRow(epoch, 2.3, 90.0, 89.5, 1.25), **changes)


def layer_row(epoch, position=0, **changes):
    return replace(LayerRow(epoch, position, f"layer{position}.weight", 0.5, 0.01, 0.2, 0.0, 0, 144), **changes)


def junction_row(position=0, epoch=0, **changes):
    return replace(JunctionRow(epoch, position, f"stages.{position}.join", 0.5, 0.25, -0.1, 2 / 3), **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.sqlite"


def write(path, config=CONFIG, cells=CELLS):
    """Writes a run whose first cell has two of its epochs."""
    with start_run(path, config, {"torch_version": "2.13.0"}) as run:
        run.add_cells(cells)
        layers = [layer_row(0), layer_row(1), layer_row(1, 1)]
        run.save(1, [epoch_row(0), epoch_row(1)], layers, [junction_row(), junction_row(1)], STATE)


def test_rows_are_read_as_written(path):
    write(path)
    with open_run(path) as run:
        assert run.config == CONFIG
        assert run.meta["torch_version"] == "2.13.0"
        assert run.meta["schema_version"] == "4"
        assert [(c.id, c.name, c.seed, c.parameters, c.status) for c in run.cells()] == [
            (1, "plain-8", 0, 75_002, "pending"),
            (2, "resnet-8", 0, 75_002, "pending"),
        ]
        assert run.epochs(1) == [epoch_row(0), epoch_row(1)]
        assert run.epochs(2) == []
        assert run.layers(1, 1) == [layer_row(1), layer_row(1, 1)]
        assert run.layers(1, 7) == []
        assert run.junctions(1, 0) == [junction_row(), junction_row(1)]
        assert run.junctions(1, 1) == run.junctions(2, 0) == []


def test_the_file_has_the_application_id_and_wal_mode(path):
    write(path)
    database = sqlite3.connect(path)
    try:
        assert database.execute("PRAGMA application_id").fetchone() == (0x67725072,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        database.close()


def test_non_finite_values_are_read_as_written(path):
    with start_run(path, CONFIG, {}) as run:
        run.add_cells(CELLS)
        row = epoch_row(1, train_loss=math.nan, test_error_pct=math.inf)
        layer = layer_row(1, norm_l2=math.nan, abs_max=math.inf, rms=1e-300, nonfinite=144)
        junction = junction_row(shortcut_norm_l2=math.inf, branch_norm_l2=math.nan)
        run.save(1, [row], [layer], [junction], b"", "diverged")
    with open_run(path) as run:
        (epoch,), (layer,), (junction,) = run.epochs(1), run.layers(1, 1), run.junctions(1, 0)
        assert run.cells()[0].status == "diverged"
    assert math.isnan(epoch.train_loss)
    assert epoch.test_error_pct == math.inf
    assert math.isnan(layer.norm_l2)
    assert (layer.abs_max, layer.rms, layer.nonfinite) == (math.inf, 1e-300, 144)
    assert junction.shortcut_norm_l2 == math.inf
    assert math.isnan(junction.branch_norm_l2)


def test_a_cell_keeps_only_its_last_checkpoint(path):
    write(path)
    with start_run(path, CONFIG, {}) as run:
        assert run.checkpoint(1) == STATE
        assert run.checkpoint(2) is None
        run.save(1, [epoch_row(2)], [layer_row(2)], [], b"second")
        assert run.checkpoint(1) == b"second"


def test_a_finished_cell_leaves_no_checkpoint_and_frees_its_space(path):
    write(path)
    with_checkpoint = path.stat().st_size
    with start_run(path, CONFIG, {}) as run:
        run.save(1, [epoch_row(2)], [layer_row(2)], [], b"last", "done")
        assert run.checkpoint(1) is None
        assert [cell.status for cell in run.cells()] == ["done", "pending"]
    assert path.stat().st_size < with_checkpoint - len(STATE) // 2


def test_an_epoch_is_recorded_completely_or_not_at_all(path):
    write(path)
    with start_run(path, CONFIG, {}) as run:
        with pytest.raises(StoreError, match="UNIQUE constraint"):
            run.save(1, [epoch_row(2)], [layer_row(2)], [junction_row(0, 1), junction_row(0, 1)], b"second", "done")
        assert [row.epoch for row in run.epochs(1)] == [0, 1]
        assert run.layers(1, 2) == run.junctions(1, 1) == []
        assert run.checkpoint(1) == STATE
        assert run.cells()[0].status == "pending"


def test_cells_can_be_added_and_keep_their_id(path):
    write(path)
    with start_run(path, CONFIG, {}) as run:
        run.add_cells([("plain", 20, 1, 269_722), *CELLS])
        assert [(cell.id, cell.name) for cell in run.cells()] == [(1, "plain-8"), (2, "resnet-8"), (3, "plain-20")]
        assert len(run.epochs(1)) == 2


def test_another_configuration_is_rejected_with_the_options_that_differ(path):
    write(path)
    before = path.read_bytes()
    with pytest.raises(StoreError) as raised:
        start_run(path, {**CONFIG, "epochs": 4, "momentum": 0.9}, {})
    assert "epochs is 3 in the file and 4 now" in str(raised.value)
    assert "momentum is None in the file and 0.9 now" in str(raised.value)
    assert "learning_rate" not in str(raised.value)
    assert path.read_bytes() == before
    start_run(path, CONFIG, {}).close()


def test_the_metadata_are_those_of_the_first_sweep(path):
    write(path)
    with start_run(path, CONFIG, {"torch_version": "9.9"}) as run:
        assert run.meta["torch_version"] == "2.13.0"


def test_a_run_is_read_while_it_is_written(path):
    with start_run(path, CONFIG, {}) as writer:
        writer.add_cells(CELLS)
        with open_run(path) as reader:
            assert reader.epochs(1) == []
            writer.save(1, [epoch_row(0), epoch_row(1)], [], [], STATE)
            assert len(reader.epochs(1)) == 2


def test_a_second_writer_is_rejected_until_the_first_closes(path):
    with start_run(path, CONFIG, {}), pytest.raises(StoreError, match="another sweep is writing this file"):
        start_run(path, CONFIG, {})
    start_run(path, CONFIG, {}).close()
    assert names_beside(path) == [path.name, f"{path.name}.lock"]


def take_and_release(path, start, taken, double):
    """Takes the lock again and again, 30 times together with others; a marker file shows two holders at once."""
    marker = path.with_name("held")
    start.wait()
    end = time.monotonic() + 60.0
    while taken.value < 30 and time.monotonic() < end:
        try:
            run = start_run(path, CONFIG, {})
        except StoreError:
            continue
        with taken:
            taken.value += 1
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            with double:
                double.value += 1
        else:
            time.sleep(0.0005)
            marker.unlink()
        run.close()


def test_the_lock_has_one_holder_at_a_time_under_contention(path):
    write(path)
    context = multiprocessing.get_context("spawn")
    start, taken, double = context.Barrier(3), context.Value("i", 0), context.Value("i", 0)
    processes = [context.Process(target=take_and_release, args=(path, start, taken, double)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert taken.value >= 30
    assert double.value == 0


def test_a_link_to_the_file_does_not_open_a_second_writer(path):
    write(path)
    (path.parent / "link.sqlite").symlink_to(path.name)
    with start_run(path, CONFIG, {}), pytest.raises(StoreError, match="another sweep is writing this file"):
        start_run(path.parent / "link.sqlite", CONFIG, {})


def test_a_full_disk_leaves_no_run_and_the_retry_works(path):
    with full_disk(8_000), pytest.raises(StoreError, match=r"run\.sqlite: disk I/O error"):
        start_run(path, CONFIG, {})
    assert names_beside(path) == [f"{path.name}.lock"]
    write(path)


def test_the_lock_is_released_when_its_holder_is_killed(path):
    script = (
        "import sys, time; from gradprobe.experiments.sweep.store import start_run;"
        f"run = start_run({str(path)!r}, {CONFIG!r}, {{}}); run.add_cells({CELLS!r});"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another sweep"):
            start_run(path, CONFIG, {})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run(path) as run:
        assert len(run.cells()) == 2
    start_run(path, CONFIG, {}).close()


def test_an_empty_file_is_a_new_run(path):
    path.touch()
    write(path)
    with open_run(path) as run:
        assert len(run.cells()) == 2


def test_missing_folders_are_created(tmp_path):
    write(tmp_path / "a" / "b" / "run.sqlite")
    assert (tmp_path / "a" / "b" / "run.sqlite").stat().st_size


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


def foreign_text(path):
    path.write_text("the notes of somebody else\n" * 200)


def foreign_short(path):
    path.write_text("x")


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs(x)")
    database.close()


def foreign_empty_database(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA application_id = 77")
    database.close()


def newer_schema(path):
    write(path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = '5' WHERE key = 'schema_version'")
    database.close()


def damaged_pages(path):
    write(path)
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def cut_short(path):
    write(path)
    path.write_bytes(path.read_bytes()[:6000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_text, "found one that is not an SQLite database"),
        (foreign_short, "found one that is not an SQLite database"),
        (foreign_database, "found another SQLite database"),
        (foreign_empty_database, "found another SQLite database"),
        (newer_schema, "schema version 5; this gradprobe reads versions 1 to 4"),
        (damaged_pages, "malformed|damaged"),
        (cut_short, "malformed|damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_foreign_or_damaged_file_is_rejected_and_left_unchanged(path, make, message):
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=message):
        start_run(path, CONFIG, {})
    with pytest.raises(StoreError), open_run(path) as run:
        run.cells(), run.epochs(1), run.layers(1, 1)
    assert path.read_bytes() == before
    assert set(names_beside(path)) <= {path.name, f"{path.name}.lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE cell SET depth = -8", "depth is -8 in a row of table cell"),
        ("UPDATE cell SET family = x'ff00' WHERE id = 1", r"family is b'\\xff\\x00' in a row of table cell"),
        ("UPDATE cell SET status = 'lost'", "status is 'lost' in a row of table cell"),
        ("UPDATE epoch SET train_loss = 'low'", "train_loss is 'low' in a row of table epoch"),
        ("UPDATE epoch SET test_error_pct = 250.0", "test_error_pct is 250.0 in a row of table epoch"),
        ("UPDATE epoch SET seconds = 1e308", r"seconds is 1e\+308 in a row of table epoch"),
        ("UPDATE layer SET norm_l2 = x'00'", r"norm_l2 is b'\\x00' in a row of table layer"),
        ("UPDATE layer SET site = zeroblob(100000)", r"site is b'\\x00.{,60}' in a row of table layer"),
        (
            "DELETE FROM layer WHERE epoch = 1 AND position = 0",
            "rows of table layer are missing for plain-8 at epoch 1",
        ),
        ("DELETE FROM junction WHERE position = 0", "rows of table junction are missing for plain-8 at epoch 0"),
        ("DROP TABLE epoch", "no such table: epoch"),
        ("DELETE FROM meta WHERE key = 'config'", "the metadata have no 'config'"),
        ("DELETE FROM meta", "the metadata have no 'schema_version'"),
        ("UPDATE meta SET value = x'00' WHERE key = 'torch_version'", "the metadata hold .* for 'torch_version'"),
        ("UPDATE meta SET value = '{' WHERE key = 'config'", "the configuration is not JSON"),
        ("UPDATE meta SET value = '[3]' WHERE key = 'config'", r"the configuration is \[3\]"),
        ("""UPDATE meta SET value = '{"epochs": "3"}' WHERE key = 'config'""", "epochs is '3' in the configuration"),
    ],
)
def test_a_file_with_impossible_contents_is_called_damaged(path, change, message):
    write(path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA ignore_check_constraints = 1")
        database.execute(change)
    database.close()
    with pytest.raises(StoreError, match=message) as raised, open_run(path) as run:
        run.config, run.cells(), run.epochs(1), run.layers(1, 1), run.junctions(1, 0)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_checkpoint_that_is_not_binary_is_called_damaged(path):
    write(path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE checkpoint SET state = 'text'")
    database.close()
    with start_run(path, CONFIG, {}) as run, pytest.raises(StoreError, match="damaged: a checkpoint is 'text'"):
        run.checkpoint(1)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if "\ud800" not in name])
def test_names_are_read_as_written(path, name):
    with start_run(path, {"data": name}, {"data_spec": name}) as run:
        run.add_cells([(name, 8, 0, 1)])
        run.save(1, [epoch_row(0)], [layer_row(0, site=name)], [junction_row(site=name)], b"")
    with open_run(path) as run:
        assert (run.config["data"], run.meta["data_spec"], run.cells()[0].family) == (name, name, name)
        assert (run.layers(1, 0)[0].site, run.junctions(1, 0)[0].site) == (name, name)


def test_metadata_that_utf8_cannot_represent_are_spelled_out(path):
    start_run(path, CONFIG, {"data_spec": "cifar10:/a\udcff"}).close()
    with open_run(path) as run:
        assert run.meta["data_spec"] == "cifar10:/a\\udcff"


@pytest.mark.parametrize("use", [open_run, lambda path: start_run(path, CONFIG, {})], ids=["open", "start"])
def test_a_name_that_is_too_long_is_rejected(tmp_path, use):
    with pytest.raises(StoreError, match=r"^.*a{300}: cannot be used: File name too long$"):
        use(tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=ro", "ä b#%?.sqlite", "-", "x\n"])
def test_a_name_that_sqlite_treats_specially_is_a_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(name))
    with start_run(name, CONFIG, {}) as run:
        assert run.checkpoint(1) == STATE
    with open_run(name) as run:
        assert len(run.cells()) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name, f"{name}.lock"]


def test_a_folder_is_rejected(tmp_path):
    for use in (lambda: start_run(tmp_path, CONFIG, {}), lambda: open_run(tmp_path)):
        with pytest.raises(StoreError, match="needed a file, found a folder"):
            use()


def test_a_file_in_place_of_a_folder_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot create its folder"):
        start_run(tmp_path / "file" / "run.sqlite", CONFIG, {})


def test_reading_a_missing_run_says_how_to_create_it(path):
    with pytest.raises(StoreError, match="no such file; gradprobe sweep --out"):
        open_run(path)
    assert not path.exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder that nobody can write to")
def test_an_unwritable_folder_is_rejected():
    with pytest.raises(StoreError, match=r"/proc/run\.sqlite: cannot write in its folder"):
        start_run("/proc/run.sqlite", CONFIG, {})


def test_a_read_only_file_is_rejected_for_writing_and_still_read(path):
    write(path)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    if os.access(path.parent, os.W_OK):
        pytest.skip("this user can write everywhere")
    try:
        with pytest.raises(StoreError, match="cannot write in its folder"):
            start_run(path, CONFIG, {})
        with open_run(path) as run:
            assert len(run.cells()) == 2
    finally:
        path.parent.chmod(0o755)
