"""One SQLite file per sweep: its configuration, its measurements, and the checkpoints from which it resumes.

The file is in WAL mode and is written by one process, one transaction per epoch of a cell, so it contains both the
measurements of an epoch and the checkpoint for the next one, or neither. SQLite has no NaN: it is stored as NULL.

| file | job |
|---|---|
| `schema.py` | the tables, and what older versions of the file lack |
| `checks.py` | whether a file is a sweep's and undamaged |
| `reader.py` | `open_run`, `Run` |
| `lock.py` | one writer at a time |
| `writer.py` | `start_run`, `RunWriter` |
"""

from gradprobe.experiments.sweep.store.reader import Run, open_run
from gradprobe.experiments.sweep.store.writer import RunWriter, start_run

__all__ = ["Run", "RunWriter", "open_run", "start_run"]
