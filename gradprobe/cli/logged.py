"""What a probe has logged of a training, for the commands that read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.running import RunningDiagnosis
from gradprobe.log.reader import read_run
from gradprobe.snapshot.snapshot import Snapshot


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
