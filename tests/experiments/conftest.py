"""Images, a working folder, and a way to train, that the tests of the experiments share."""

import sys
import traceback

import numpy as np
import pytest
import torch
from helpers.sweep_commands import write_images

from gradprobe.experiments.sweep import engines


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of small images in CIFAR-10's layout."""
    folder = tmp_path_factory.mktemp("cifar")
    write_images(folder)
    return folder


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """A working folder with f.npz, images that differ in brightness by class. Forgets modules imported from it."""
    rng = np.random.default_rng(0)
    y = np.arange(64) % 2
    np.savez(tmp_path / "f.npz", x=(rng.random((64, 6, 6)) + y[:, None, None]).astype(np.float32), y=y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def in_process(monkeypatch):
    """Trains in this process, which is faster than starting others."""

    def run_one(job, state):
        try:
            yield from job.run(state)
        except RuntimeError as error:
            yield engines.Failure(f"{type(error).__name__}: {error}", traceback.format_exc())

    def run(jobs, workers, checkpoint):
        for job in jobs:
            for result in run_one(job, checkpoint(job.cell.id)):
                yield job, result

    monkeypatch.setattr(engines, "run_local", run)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
