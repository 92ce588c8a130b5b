"""Where the cells of a sweep run: processes of this machine, or Ray. An engine yields results; it writes nothing.

Since only the caller writes the file, nothing that outlives it can write on.
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
    """A cell, and what it takes to train it from its last checkpoint to its end."""

    cell: Cell
    data_spec: str
    recipe: Recipe

    def run(self, state: bytes | None) -> Iterator[EpochResult]:
        """Trains the cell on one thread.

        Args:
            state: its checkpoint, None at its start.

        Yields:
            One result per epoch.
        """
        import torch

        from gradprobe.experiments.data import load
        from gradprobe.experiments.train import train_cell

        torch.set_num_threads(1)
        yield from train_cell(
            self.cell.family, self.cell.depth, self.cell.seed, load(self.data_spec), self.recipe, state
        )


Engine = Callable[[Sequence[Job], int, Callable[[int], bytes | None]], Iterator[tuple[Job, EpochResult]]]


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker, in words that travel between processes."""

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
    """Runs jobs in fresh processes of this machine, which end when this process does, however it ends.

    Args:
        jobs: what to run, in this order.
        workers: how many at a time.
        checkpoint: gives the state from which a cell (by id) goes on.

    Yields:
        A job and the result of one of its epochs, as they come.

    Raises:
        GradprobeError: a worker failed or was killed; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, _Worker] = {}

    def give(worker: _Worker, job: Job) -> None:
        worker.job = job
        worker.connection.send((job, checkpoint(job.cell.id)))

    started: list[SpawnProcess] = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            job = waiting.pop()
            running[ours] = _Worker(process, ours, job)
            give(running[ours], job)
        while running:
            for connection in wait(list(running)):
                worker = running[connection]  # type: ignore[index]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError) as error:
                    worker.process.join()
                    raise GradprobeError(
                        f"{_title(worker.job)}: its process ended with exit code {worker.process.exitcode}; "
                        "the same command goes on from the last epoch"
                    ) from error
                if isinstance(message, EpochResult):
                    yield worker.job, message
                elif isinstance(message, _Failure):
                    raise GradprobeError(f"{_title(worker.job)}: {message.message}") from RuntimeError(message.trace)
                elif waiting:
                    give(worker, waiting.pop())
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
    """Runs jobs as Ray tasks of one CPU each, on the cluster that Ray is connected to or else on this machine.

    Args:
        jobs: what to run, in this order.
        workers: how many at a time.
        checkpoint: gives the state from which a cell (by id) goes on.

    Yields:
        A job and the result of one of its epochs, as they come.

    Raises:
        BackendError: Ray is not installed.
        GradprobeError: a task failed.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendError("engine: ray is not installed; pip install gradprobe[ray], or use engine local") from error
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1, num_returns="streaming")(Job.run)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}  # by the generator of its results
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
    """Counts the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _title(job: Job) -> str:
    return f"{job.cell.name} seed {job.cell.seed}"


def _work(connection: Connection) -> None:
    """A worker process: runs jobs until the other end of the connection closes."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
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
