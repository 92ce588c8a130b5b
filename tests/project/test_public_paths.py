"""The paths that users may import export what they exported before the package was divided into folders."""

import importlib

import pytest

EXPORTS = {
    "gradprobe.networks": "FAMILIES ResidualAdd count_parameters deep_cnn initialise plain resnet",
    "gradprobe.nn": "ResidualAdd residual_add residual_add_",
    "gradprobe.ops": (
        "FLOAT_DTYPES STATS Backend backends counting_if dense_values grad_stats grad_stats_into merge_rows norms "
        "resolve scale_ true_rows"
    ),
    "gradprobe.probe": "Options Probe Selection When attach",
    "gradprobe.snapshot": (
        "COLUMNS Activation Changes FloatArray Junction Measured NonFinite Provenance Signals SiteStats SiteTable "
        "Snapshot Update finish_rows site_stats to_pandas"
    ),
}


@pytest.mark.filterwarnings("ignore:gradprobe.snapshot.Changes is deprecated:DeprecationWarning")
@pytest.mark.parametrize("path", EXPORTS)
def test_path_still_exports(path: str) -> None:
    module = importlib.import_module(path)

    assert [name for name in EXPORTS[path].split() if not hasattr(module, name)] == []
