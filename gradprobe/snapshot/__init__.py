"""One finished step as host data. Needs no torch."""

from gradprobe.snapshot.export import to_pandas
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.signals import Activation, Junction, Signals
from gradprobe.snapshot.snapshot import NonFinite, SiteTable, Snapshot
from gradprobe.snapshot.stats import COLUMNS, SiteStats
from gradprobe.snapshot.updates import Update, Updates

__all__ = [
    "COLUMNS",
    "Activation",
    "Junction",
    "Measured",
    "NonFinite",
    "Provenance",
    "Signals",
    "SiteStats",
    "SiteTable",
    "Snapshot",
    "Update",
    "Updates",
    "to_pandas",
]
