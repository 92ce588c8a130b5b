"""One finished step as host data. Needs no torch."""

import warnings

from gradprobe.snapshot.export import to_pandas
from gradprobe.snapshot.magnitudes import ActivationMagnitudes, Bounds, GradientMagnitudes, Magnitudes
from gradprobe.snapshot.records import FloatArray, Measured, Provenance
from gradprobe.snapshot.signals import Activation, Junction, Signals
from gradprobe.snapshot.snapshot import NonFinite, SiteTable, Snapshot
from gradprobe.snapshot.stats import COLUMNS, SiteStats, finish_rows, site_stats
from gradprobe.snapshot.updates import Update, Updates

__all__ = [
    "COLUMNS",
    "Activation",
    "ActivationMagnitudes",
    "Bounds",
    "FloatArray",
    "GradientMagnitudes",
    "Junction",
    "Magnitudes",
    "Measured",
    "NonFinite",
    "Provenance",
    "Signals",
    "SiteStats",
    "SiteTable",
    "Snapshot",
    "Update",
    "Updates",
    "finish_rows",
    "site_stats",
    "to_pandas",
]


def __getattr__(name: str) -> object:
    if name == "Changes":
        warnings.warn("gradprobe.snapshot.Changes is deprecated; use Updates", DeprecationWarning, stacklevel=2)
        return Updates
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
