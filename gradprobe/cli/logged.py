"""What a probe has logged of a training, for the commands that read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.running import RunningDiagnosis
from gradprobe.errors import ArgumentError, StoreError
from gradprobe.log.reader import read_run
from gradprobe.report.comparison.compare import compare
from gradprobe.report.comparison.output import ComparisonView
from gradprobe.report.comparison.sweeps import SweepComparison, compare_sweeps
from gradprobe.snapshot.snapshot import Snapshot


def run_kind(path: Path) -> Literal["training", "sweep"] | None:
    """Returns "training" for a folder, "sweep" for a file, and None if nothing is there.

    Raises:
        StoreError: The path cannot be used, e.g. because its name is too long.
    """
    try:
        return "training" if path.is_dir() else "sweep" if path.exists() else None
    except OSError as error:
        raise StoreError(f"{path}: cannot be used: {error.strerror}") from error


@dataclass(frozen=True)
class LoggedRun:
    """The steps of a run folder and their diagnosis.

    Attributes:
        snapshots: The steps in order, those since the model last got other parameters.
        diagnosis: The findings in all steps.
    """

    snapshots: list[Snapshot]
    diagnosis: Diagnosis

    @classmethod
    def read(cls, folder: Path) -> LoggedRun:
        """Reads and diagnoses a run folder.

        Args:
            folder: The folder given to `attach(log_dir=...)`.

        Raises:
            ArgumentError: The files are in Parquet, and pyarrow is not installed.
            StoreError: It is no run folder, or a file in it cannot be read.
        """
        snapshots, running = read_run(folder).snapshots(), RunningDiagnosis()
        for snapshot in snapshots:
            running.take(snapshot)
        names = snapshots[-1].table.names if snapshots else ()
        return cls([one for one in snapshots if one.table.names == names], running.read())


def compare_paths(a: Path, b: Path) -> ComparisonView | SweepComparison:
    """Reads and compares two run folders, or the files of two sweeps.

    Args:
        a: The folder given to `attach(log_dir=...)`, or a file written by `gradprobe sweep`.
        b: Another one of the same kind.

    Raises:
        ArgumentError: There is one of each, they have nothing in common, or pyarrow is not installed.
        StoreError: One cannot be read.
    """
    kinds = run_kind(a), run_kind(b)
    if {"training", "sweep"} == {*kinds}:
        file, other = (a, b) if kinds[0] == "sweep" else (b, a)
        raise ArgumentError(f"{file}: needed two run folders or the files of two sweeps, got this file and {other}")
    if "sweep" in kinds:
        from gradprobe.experiments.sweep.store import open_run

        with open_run(a) as one, open_run(b) as another:
            return compare_sweeps(one, another, (str(a), str(b)))
    found = compare(read_run(a).snapshots(), read_run(b).snapshots())
    return ComparisonView(found, (str(a), str(b)))
