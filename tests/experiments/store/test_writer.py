"""Writing a sweep's file: epochs are atomic, and cells keep their last checkpoint."""

from pathlib import Path

import pytest
from helpers.full_disk import full_disk
from helpers.store_cases import CELLS, CONFIG, STATE, epoch_row, junction_row, layer_row, names_beside, write

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run


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


def test_the_metadata_are_those_of_the_first_sweep(path):
    write(path)
    with start_run(path, CONFIG, {"torch_version": "9.9"}) as run:
        assert run.meta["torch_version"] == "2.13.0"


def test_a_full_disk_leaves_no_run_and_the_retry_works(path):
    with full_disk(8_000), pytest.raises(StoreError, match=r"run\.sqlite: disk I/O error"):
        start_run(path, CONFIG, {})
    assert names_beside(path) == [f"{path.name}.lock"]
    write(path)


def test_an_empty_file_is_a_new_run(path):
    path.touch()
    write(path)
    with open_run(path) as run:
        assert len(run.cells()) == 2


def test_missing_folders_are_created(tmp_path):
    write(tmp_path / "a" / "b" / "run.sqlite")
    assert (tmp_path / "a" / "b" / "run.sqlite").stat().st_size


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=ro", "ä b#%?.sqlite", "-", "x\n"])
def test_a_name_that_sqlite_treats_specially_is_a_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path(name))
    with start_run(name, CONFIG, {}) as run:
        assert run.checkpoint(1) == STATE
    with open_run(name) as run:
        assert len(run.cells()) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name, f"{name}.lock"]


def test_a_file_in_place_of_a_folder_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot create its folder"):
        start_run(tmp_path / "file" / "run.sqlite", CONFIG, {})
