"""Writes what is needed to look at a broken training, and to repeat its last step."""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.errors import StoreError
from gradprobe.log.writer import RunWriter
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.files import write_files
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.version import VERSION


def write_dump(
    folder: Path,
    snapshots: Sequence[Snapshot],
    diagnosis: Diagnosis,
    about: Mapping[str, object],
    given: Mapping[str, object],
) -> None:
    """Writes a run folder, with the states of the random number generators in random_states.pt.

    Args:
        folder: A new folder.
        snapshots: The steps.
        diagnosis: The findings.
        about: What describes the run.
        given: What else goes to about.json.

    Raises:
        StoreError: The folder is not empty or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: needed a folder that is new or empty")
    states = random_states()
    with RunWriter(folder, {**about, **given}) as run:
        run.write(snapshots)
        for finding in diagnosis:
            run.tell(finding)
    path = folder / "random_states.pt"
    try:
        torch.save(states, path)
    except (OSError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot write this file: {error}") from error
    write_files({folder / "diagnosis.json": [json.dumps(strict(diagnosis.to_dict()), indent=1) + "\n"]})


@cache
def versions() -> dict[str, str]:
    """Returns the versions of what computes the numbers."""
    return {
        "gradprobe": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def random_states() -> dict[str, object]:
    """Returns the states of the random number generators of torch, NumPy and Python, for `torch.save`."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    states: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        try:
            states["cuda"] = torch.cuda.get_rng_state_all()
        except RuntimeError as error:  # the device may be what broke
            states["cuda"] = str(error)
    return states
