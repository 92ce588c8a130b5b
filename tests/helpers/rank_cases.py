"""Small cases for processes, good ones and faulty ones."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist


def sums(rank: int, n_ranks: int) -> float:
    """Returns the sum of the ranks, counted from 1."""
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    return total.item()


def first_raises(rank: int, n_ranks: int) -> float:
    """Leaves the other ranks alone in a collective."""
    if rank == 0:
        raise ValueError("the first rank gives up")
    return sums(rank, n_ranks)


def last_dies(rank: int, n_ranks: int) -> float:
    """Kills a process while the others wait for it."""
    if rank == n_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(rank, n_ranks)
