"""Reading a sweep's file: rows and names are read as written, also while it is written."""

import math

import pytest
from helpers.names import NAMES
from helpers.store_cases import CELLS, CONFIG, STATE, epoch_row, junction_row, layer_row, write

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run


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


def test_a_run_is_read_while_it_is_written(path):
    with start_run(path, CONFIG, {}) as writer:
        writer.add_cells(CELLS)
        with open_run(path) as reader:
            assert reader.epochs(1) == []
            writer.save(1, [epoch_row(0), epoch_row(1)], [], [], STATE)
            assert len(reader.epochs(1)) == 2


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


def test_reading_a_missing_run_says_how_to_create_it(path):
    with pytest.raises(StoreError, match="no such file; gradprobe sweep --out"):
        open_run(path)
    assert not path.exists()
