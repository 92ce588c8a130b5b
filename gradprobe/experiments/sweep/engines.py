"""Engines that train the cells of a sweep: processes on this machine, or Ray.

An engine only yields results. The caller alone writes the file, so no process that outlives it can write.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from gradprobe.errors import BackendError, GradprobeError
from gradprobe.experiments.train import EpochResult, Recipe
from gradprobe.report.records import Cell

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Job:
    """A cell to train, with its data and training settings."""

    cell: Cell
    data_spec: str
    recipe: Recipe

    def run(self, state: bytes | None) -> Iterator[EpochResult]:
        """Trains the cell on one thread from a checkpoint (None: from the start); yields one result per epoch."""
        import torch

        from gradprobe.experiments.data import load
        from gradprobe.experiments.train import train_cell

        torch.set_num_threads(1)
        yield from train_cell(
            self.cell.family, self.cell.depth, self.cell.seed, load(self.data_spec), self.recipe, state
        )


Engine = Callable[[Sequence[Job], int, Callable[[int], bytes | None]], Iterator[tuple[Job, EpochResult]]]
"""An engine takes the jobs in order of their start, the largest number of jobs to run in parallel, and a function that
returns the checkpoint of a cell by its id. It yields each job with the result of one of its epochs, in order of
arrival, and raises `GradprobeError` if a job fails."""


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker, as text that can be sent between processes."""

    message: str
    trace: str


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job


def run_local(
    jobs: Sequence[Job], workers: int, checkpoint: Callable[[int], bytes | None]
) -> Iterator[tuple[Job, EpochResult]]:
    """Runs jobs in new processes on this machine; an `Engine`. The processes end with this one, however it ends."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, _Worker] = {}

    def assign(worker: _Worker, job: Job) -> None:
        worker.job = job
        worker.connection.send((job, checkpoint(job.cell.id)))

    started: list[SpawnProcess] = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            job = waiting.pop()
            running[ours] = _Worker(process, ours, job)
            assign(running[ours], job)
        while running:
            for connection in wait(list(running)):
                worker = running[connection]  # type: ignore[index]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError) as error:
                    worker.process.join()
                    raise GradprobeError(
                        f"{_title(worker.job)}: its process ended with exit code {worker.process.exitcode}; "
                        "run the same command again to resume from the last epoch"
                    ) from error
                if isinstance(message, EpochResult):
                    yield worker.job, message
                elif isinstance(message, _Failure):
                    raise GradprobeError(f"{_title(worker.job)}: {message.message}") from RuntimeError(message.trace)
                elif waiting:
                    assign(worker, waiting.pop())
                else:
                    worker.connection.close()
                    del running[worker.connection]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def run_ray(
    jobs: Sequence[Job], workers: int, checkpoint: Callable[[int], bytes | None]
) -> Iterator[tuple[Job, EpochResult]]:
    """Runs jobs as Ray tasks of one CPU each, on the connected cluster or else on this machine; an `Engine`.

    Raises:
        BackendError: Ray is not installed.
        GradprobeError: A task failed.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendError("engine: ray is not installed; pip install gradprobe[ray], or use engine local") from error
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1, num_returns="streaming")(Job.run)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}  # by the generator of their results
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop()
            running[task.remote(job, checkpoint(job.cell.id))] = job
        ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
        for results in ready:
            reference = next(results, None)
            if reference is None:
                del running[results]
                continue
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                raise GradprobeError(f"{_title(running[results])}: {lines[-1]}") from error
            yield running[results], result


def cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _title(job: Job) -> str:
    return f"{job.cell.name} seed {job.cell.seed}"


def _run_worker(connection: Connection) -> None:
    """Runs jobs in a worker process until the other end of the connection closes."""
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            job, state = connection.recv()
        except EOFError:
            return
        try:
            for result in job.run(state):
                connection.send(result)
        except Exception as error:  # noqa: BLE001  the parent raises it
            connection.send(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
            return
        connection.send(None)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
