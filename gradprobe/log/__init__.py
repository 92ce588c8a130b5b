"""A run on disk: a folder of tidy tables that any reader of Parquet or JSON Lines opens. Needs no torch."""

from gradprobe.log.reader import Run, read_run
from gradprobe.log.writer import RunWriter

__all__ = ["Run", "RunWriter", "read_run"]
