"""Trains the cells of a sweep as tasks of Ray, on a cluster or on this machine."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from types import ModuleType
from typing import Any

import torch

from gradprobe.errors import BackendError
from gradprobe.experiments.data import Dataset
from gradprobe.experiments.sweep.engines import Failure, Job, Result
from gradprobe.experiments.train import EpochProgress, EpochResult

_RETRIES = 3  # of an epoch whose worker was lost


class Cluster:
    """Ray's cluster for a sweep; its tasks end with the ``with`` block.

    It is the one that this process is connected to, or else the one that ``RAY_ADDRESS`` names or that runs on this
    machine, or else a new one. Each cell is a task of one CPU. The data are sent to the workers, code is not:
    gradprobe, the same version of torch, and the modules of users' networks must be there.

    A cell whose worker is lost starts again elsewhere from its last epoch, up to three times in the same epoch.

    Args:
        count: Largest number of cells in parallel; by default as many as the cluster has room for.
        data: Data of all jobs.
        num_gpus: GPUs that Ray reserves for each cell.
    """

    def __init__(self, count: int | None, data: Dataset, num_gpus: float = 0.0) -> None:
        self._asked = count
        self._data = data
        self._num_gpus = num_gpus
        self._running: dict[Any, Job] = {}  # by the generator of their results

    def __enter__(self) -> Cluster:
        try:
            import ray
        except ImportError as error:
            raise BackendError(
                "engine: ray is not installed; pip install gradprobe[ray], or use engine local"
            ) from error
        self._ray: ModuleType = ray
        with ExitStack() as stack:
            # Ray prints on stdout that a worker is lost.
            stack.enter_context(redirect_stdout(sys.stderr))
            if not ray.is_initialized():
                _connect(ray)
                stack.callback(ray.shutdown)
            room = self._room()
            self._count = self._asked or room
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        for results in self._running:
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(results, force=True)
        self._running = {}
        self._stack.close()

    def __len__(self) -> int:
        return self._count

    def run(self, jobs: Sequence[Job], checkpoint: Callable[[int], bytes | None]) -> Iterator[tuple[Job, Result]]:
        """Runs jobs, as `gradprobe.experiments.sweep.engines.run_local` does."""
        ray = self._ray
        data = ray.put(self._data)
        # Ray would start a lost task from its old checkpoint.
        task = ray.remote(num_cpus=1, num_gpus=self._num_gpus, num_returns="streaming", max_retries=0)(_train)
        lost = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
        )
        losses: Counter[int] = Counter()
        waiting = list(reversed(jobs))
        while waiting or self._running:
            while waiting and len(self._running) < self._count:
                job = waiting.pop()
                self._running[task.remote(job, checkpoint(job.cell.id), data, torch.__version__)] = job
            ready, _ = ray.wait(list(self._running), num_returns=1, fetch_local=False)
            for results in ready:
                job = self._running[results]
                try:
                    reference = next(results, None)
                    result = None if reference is None else ray.get(reference)
                except lost as error:
                    del self._running[results]
                    losses[job.cell.id] += 1
                    if losses[job.cell.id] <= _RETRIES:
                        waiting.append(job)
                    else:
                        text = f"its worker was lost {_RETRIES + 1} times in one epoch: {_last_line(error)}"
                        yield job, Failure(text, str(error))
                except ray.exceptions.RayError as error:
                    del self._running[results]
                    cause = getattr(error, "cause", None)
                    text = _last_line(error) if cause is None else f"{type(cause).__name__}: {cause}"
                    yield job, Failure(text, str(error))
                else:
                    if result is None:
                        del self._running[results]
                        continue
                    if isinstance(result, EpochResult):
                        losses[job.cell.id] = 0
                    yield job, result

    def _room(self) -> int:
        """Returns the number of cells that the cluster can train at the same time."""
        needed = {"CPU": 1.0, "GPU": self._num_gpus}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        each = [min(int(has.get(name, 0.0) / n) for name, n in needed.items() if n) for has in machines]
        if not any(each):
            gpus = f" and {self._num_gpus:g} GPUs" if self._num_gpus else ""
            raise BackendError(f"engine: no machine of the Ray cluster has 1 CPU{gpus} for a training run")
        return sum(each)


def _connect(ray: ModuleType) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise BackendError(
            f"engine: needed RAY_ADDRESS=HOST:PORT of the cluster, from one of its machines, got {address}, which is "
            "for Ray's client"
        )
    try:
        with _sigterm_held():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    except Exception as error:  # Ray raises errors of many kinds, and Exception itself
        raise BackendError(f"engine: cannot connect to Ray{' at ' + address if address else ''}: {error}") from error


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Holds SIGTERM back and keeps its handler, which Ray replaces.

    It stays held in the processes that Ray starts here: a signal to the whole group would end them before this process
    has stopped the sweep.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _train(job: Job, state: bytes | None, data: Dataset, torch_version: str) -> Iterator[EpochProgress | EpochResult]:
    if torch.__version__ != torch_version:
        raise BackendError(
            f"torch is {torch.__version__} on {platform.node()} and {torch_version} where the sweep runs"
        )
    yield from job.run(state, data)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
