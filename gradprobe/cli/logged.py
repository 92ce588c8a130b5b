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


def needed_kind(path: Path) -> Literal["training", "sweep"]:
    """Returns what `run_kind` does.

    Raises:
        StoreError: Nothing is there, or the path cannot be used.
    """
    kind = run_kind(path)
    if kind is None:
        raise StoreError(f"{path}: needed a run folder or the file of a sweep, found nothing there")
    return kind


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
            StoreError: It is no run folder, nothing is there, or a file in it cannot be read.
        """
        kind = run_kind(folder)
        if kind != "training":
            found = "nothing there" if kind is None else "a file; gradprobe report shows that of a sweep"
            raise StoreError(f"{folder}: needed a run folder, found {found}")
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
    kinds = needed_kind(a), needed_kind(b)
    if kinds[0] != kinds[1]:
        file, other = (a, b) if kinds[0] == "sweep" else (b, a)
        raise ArgumentError(f"{file}: needed two run folders or the files of two sweeps, got this file and {other}")
    if kinds[0] == "sweep":
        from gradprobe.experiments.sweep.store import open_run

        with open_run(a) as one, open_run(b) as another:
            return compare_sweeps(one, another, (str(a), str(b)))
    found = compare(read_run(a).snapshots(), read_run(b).snapshots())
    return ComparisonView(found, (str(a), str(b)))
