"""Trains the cells of a sweep in processes on this machine; `ray_engine` does on a cluster.

An engine only yields results. The caller alone writes the file, so no process that outlives it can write.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from gradprobe.experiments.readers.raw import DataSpec
from gradprobe.experiments.train import EpochProgress, EpochResult, Recipe
from gradprobe.report.records import Cell

if TYPE_CHECKING:
    from gradprobe.experiments.data import Dataset

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Job:
    """A cell to train, with its data and training settings.

    Attributes:
        cell: The cell.
        data_spec: Its data.
        recipe: Training settings.
        whole_train_error: Evaluate the whole training set after every epoch.
        progress_every_s: Seconds of an epoch after which its progress is yielded, again and again.
        device: Device to train on.
        graph: Capture the training step as a CUDA graph, on a GPU.
        until: When no further epoch begins, as a value of ``time.time()``.
    """

    cell: Cell
    data_spec: DataSpec
    recipe: Recipe
    whole_train_error: bool = False
    device: str = "cpu"
    graph: bool = True
    progress_every_s: float = math.inf
    until: float = math.inf

    def is_late(self) -> bool:
        """Whether no further epoch may begin."""
        return time.time() >= self.until

    def run(self, state: bytes | None, data: Dataset | None = None) -> Iterator[EpochResult | EpochProgress]:
        """Trains the cell on one thread.

        Args:
            state: Checkpoint to resume from; None to train from the start.
            data: The data of ``data_spec``; None to load them.

        Yields:
            One result per epoch, and the progress of the epochs, until the end of the cell or the last epoch that began
            in time.
        """
        if self.is_late():
            return
        import torch

        from gradprobe.experiments.data import load
        from gradprobe.experiments.train import train_cell

        torch.set_num_threads(1)  # on a cluster
        data = load(self.data_spec) if data is None else data
        cell = self.cell
        results = train_cell(
            cell.family,
            cell.depth,
            cell.seed,
            data,
            self.recipe,
            state,
            self.whole_train_error,
            self.progress_every_s,
            device=self.device,
            graph=self.graph,
        )
        for result in results:
            yield result
            if isinstance(result, EpochResult) and self.is_late():
                return


@dataclass(frozen=True)
class Failure:
    """An exception of a job, as text that can be sent between processes."""

    message: str
    trace: str


Result = EpochProgress | EpochResult | Failure


@dataclass
class _Worker:
    number: int  # which GPU it uses
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    has_failed: bool = False  # in this job


class Workers:
    """Processes on this machine that wait for jobs; they end with the ``with`` block, or with this process.

    They are forked now where that is safe, so that they need not import torch again and share the data in memory: on
    Linux, if this process has one Python thread and has not asked for CUDA. Otherwise `run` starts them anew. A forked
    worker inherits every open file, so make this before any file is opened that must be closed for good, such as a
    lock.

    OpenMP's threads do not survive a fork. A worker never needs them, since it computes on one thread.

    Args:
        count: Number of processes.
        data: Data of all jobs; None if each worker shall load them.
        device: Where they train. With several GPUs, worker k uses number k modulo their count, and so does a worker
            that replaces it.
    """

    def __init__(self, count: int, data: Dataset | None = None, device: str = "cpu") -> None:
        self._count = count
        self._data = data
        self._all: list[_Worker] = []
        if device == "cpu" and _can_fork():
            self._start("fork", range(count))

    def _start(self, method: str, numbers: Iterable[int]) -> None:
        context: Any = multiprocessing.get_context(method)
        try:
            for number in numbers:
                ours, theirs = context.Pipe()
                inherited = [*(worker.connection for worker in self._all), ours] if method == "fork" else []
                arguments = number, theirs, inherited, self._data if method == "fork" else None
                process = context.Process(target=_run_worker, args=arguments, daemon=True)
                self._all.append(_Worker(number, process, ours))
                process.start()
                theirs.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Ends all processes."""
        started = [worker.process for worker in self._all if worker.process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for worker in self._all:
            worker.connection.close()
        self._all = []

    def run(self, jobs: Sequence[Job], checkpoint: Callable[[int], bytes | None]) -> Iterator[tuple[Job, Result]]:
        """Runs jobs; see `run_local`."""
        waiting = list(reversed(jobs))
        running: dict[Connection, _Worker] = {}

        def assign(worker: _Worker) -> None:
            worker.job, worker.has_failed = waiting.pop(), False
            running[worker.connection] = worker
            state = checkpoint(worker.job.cell.id)
            with suppress(OSError):  # the worker is dead, as the next read will find
                worker.connection.send((worker.job, state))

        if not self._all:
            self._start("spawn", range(min(self._count, len(jobs))))
        for worker in self._all[: len(jobs)]:
            assign(worker)
        while running:
            for connection in wait(list(running)):
                worker = running[connection]  # type: ignore[index]
                assert worker.job is not None
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    del running[worker.connection]
                    death = self._bury(worker)
                    if not worker.has_failed:
                        yield worker.job, death
                    if waiting:
                        self._start("spawn", [worker.number])
                        assign(self._all[-1])
                    continue
                if isinstance(message, Result):
                    worker.has_failed = isinstance(message, Failure)
                    yield worker.job, message
                    continue
                del running[worker.connection]
                if waiting:
                    assign(worker)

    def _bury(self, worker: _Worker) -> Failure:
        """Forgets a worker that has died, and says how it did."""
        self._all.remove(worker)
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode
        if code is None or code >= 0:
            return Failure(f"the worker ended with exit code {code}", "")
        hint = ", as happens when memory runs out" if -code == signal.SIGKILL else ""
        return Failure(f"the worker was killed by signal {-code}{hint}", "")


def run_local(
    jobs: Sequence[Job], workers: Workers | int, checkpoint: Callable[[int], bytes | None]
) -> Iterator[tuple[Job, Result]]:
    """Runs jobs in processes on this machine.

    Args:
        jobs: The jobs in the order of their start.
        workers: The processes, or how many to start for these jobs.
        checkpoint: Returns the checkpoint of a cell by its id.

    Yields:
        Each job with the progress or the result of one of its epochs, or with what made it fail, in order of arrival.
    """
    if isinstance(workers, Workers):
        yield from workers.run(jobs, checkpoint)
        return
    with Workers(min(workers, len(jobs))) as started:
        yield from started.run(jobs, checkpoint)


def default_jobs(device: str) -> int:
    """Returns how many cells train in parallel unless the user says: one on each CPU or GPU that there is."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else cpus()


def cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_fork() -> bool:
    import torch

    return sys.platform == "linux" and threading.active_count() == 1 and not torch.cuda.is_initialized()


def _run_worker(number: int, connection: Connection, inherited: Sequence[Connection], data: Dataset | None) -> None:
    """Runs jobs in a worker process until the other end of the connection closes."""
    import torch

    from gradprobe.experiments.data import load
    from gradprobe.experiments.device import use

    @cache
    def placed(spec: DataSpec, device: str) -> Dataset:
        return (load(spec) if data is None else data).to(use(device, number))

    torch.set_num_threads(1)  # before anything is computed: a fork would wait for OpenMP threads that it does not have
    # Ctrl-C, and often SIGTERM, reach the whole process group; only the parent handles them, and it ends this process.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    for one in inherited:
        one.close()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            job, state = connection.recv()
        except EOFError:
            return
        try:
            for result in job.run(state, placed(job.data_spec, job.device)):
                connection.send(result)
        except Exception as error:  # noqa: BLE001  the parent records it
            connection.send(Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
            if job.device != "cpu":
                return  # an error can leave CUDA unusable in this process
        connection.send(None)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
