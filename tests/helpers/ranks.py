"""Runs cases in several processes that talk to each other with gloo over the loopback device."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Case = Callable[[int, int], object]
"""Takes the rank and the number of ranks; both it and what it returns can be pickled."""

_COLLECTIVE_S = 60.0
_CASE_S = 120.0
_CASES_PER_COLLECTION = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank made of one case.

    Attributes:
        value: What the case returned, None if it failed.
        error: The traceback, or why the case was not run; None if it succeeded.
    """

    value: Any = None
    error: str | None = None


def run_ranks(
    n_ranks: int, cases: Mapping[str, Case], folder: Path, limit_s: float = 240.0
) -> dict[str, list[Outcome]]:
    """Runs cases one after another in the same processes, each with a process group of its own.

    A case that raises on some ranks ends on the others with an error of their next collective, and the next case starts
    afresh. After a case in which a process ends, the others run in new processes.

    Args:
        n_ranks: Number of processes.
        cases: Cases by name.
        folder: Folder for files of this run.
        limit_s: Processes that still run after this time are killed, and the cases left are not run.

    Returns:
        For each case, the outcome of each rank.
    """
    end = time.monotonic() + limit_s
    found: dict[str, list[Outcome]] = {}
    while len(found) < len(cases):
        left = {name: case for name, case in cases.items() if name not in found}
        ran = _run_until_one_ends(n_ranks, left, folder / f"{len(found)}", end)
        found.update(ran)
        if time.monotonic() > end:
            found.update({name: [Outcome(error="not run: out of time")] * n_ranks for name in left if name not in ran})
    return found


def _run_until_one_ends(n_ranks: int, cases: dict[str, Case], folder: Path, end: float) -> dict[str, list[Outcome]]:
    """Returns the outcomes of the cases up to the first that a process did not survive."""
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_rank, args=(rank, n_ranks, store.port, cases, folder), daemon=True)
        for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
        if any(process.exitcode for process in processes):
            store.set("over", "")
    killed = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    by_rank = [_read(_results(folder, rank)) for rank in range(n_ranks)]
    found = {}
    for name in cases:
        found[name] = [outcomes.get(name) for outcomes in by_rank]
        if None in found[name]:
            break
    return {
        name: [outcome or _lost(folder, rank, processes[rank], killed[rank]) for rank, outcome in enumerate(outcomes)]
        for name, outcomes in found.items()
    }


def _lost(folder: Path, rank: int, process: SpawnProcess, was_killed: bool) -> Outcome:
    log = _log(folder, rank).read_text(errors="replace")[-3000:] if _log(folder, rank).exists() else ""
    how = "was killed, out of time" if was_killed else f"ended with exit code {process.exitcode}"
    return Outcome(error=f"not run to its end: rank {rank} {how}\n{log}")


def _results(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pickle"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _read(path: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    if path.exists():
        with path.open("rb") as file:
            while True:
                try:
                    name, outcome = pickle.load(file)
                except (EOFError, pickle.UnpicklingError):
                    break
                found[name] = outcome
    return found


def _run_rank(rank: int, n_ranks: int, port: int, cases: dict[str, Case], folder: Path) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", GRADPROBE_MEET_TIMEOUT_S="10")
    torch.set_num_threads(1)
    log = _log(folder, rank).open("w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    gc.collect()
    gc.freeze()  # later collections pass over what the imports have made
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=_CASE_S))
    with _results(folder, rank).open("wb") as results:
        for n, (name, case) in enumerate(cases.items()):
            store.set(f"start/{name}/{rank}", "")
            while not store.check([f"start/{name}/{other}" for other in range(n_ranks)]):
                if store.check(["over"]):
                    print("another rank has ended", flush=True)
                    os._exit(1)
                time.sleep(0.005)
            faulthandler.dump_traceback_later(_CASE_S, exit=True, file=log)
            outcome = _run_case(case, rank, n_ranks, dist.PrefixStore(f"case/{name}", store))
            if outcome.error is not None or n % _CASES_PER_COLLECTION == 0:
                gc.collect()  # groups that a model or an error still holds keep their connections open
            faulthandler.cancel_dump_traceback_later()
            pickle.dump((name, outcome), results)
            results.flush()
    log.flush()
    os._exit(0)  # what a failed case left must not delay the end


def _run_case(case: Case, rank: int, n_ranks: int, store: dist.Store) -> Outcome:
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=n_ranks, timeout=timedelta(seconds=_COLLECTIVE_S)
        )
        value = case(rank, n_ranks)
        pickle.dumps(value)
        return Outcome(value)
    except Exception:  # noqa: BLE001
        return Outcome(error=traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch._dynamo.reset()
