"""Other files, damaged ones and those of other sweeps are rejected, and never changed."""

import os
import sqlite3

import pytest
from helpers.store_cases import CONFIG, names_beside, write

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run


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


@pytest.mark.parametrize("use", [open_run, lambda path: start_run(path, CONFIG, {})], ids=["open", "start"])
def test_a_name_that_is_too_long_is_rejected(tmp_path, use):
    with pytest.raises(StoreError, match=r"^.*a{300}: cannot be used: File name too long$"):
        use(tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_rejected(tmp_path):
    for use in (lambda: start_run(tmp_path, CONFIG, {}), lambda: open_run(tmp_path)):
        with pytest.raises(StoreError, match="needed a file, found a folder"):
            use()
