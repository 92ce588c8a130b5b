"""Helpers shared by the experiments: progress bar, seed check, single-threaded block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gradprobe.errors import ArgumentError


def progress_bar(console: Console | None, left: ProgressColumn | None = None) -> Progress:
    """Makes a bar with the share completed, the time elapsed and remaining, and the network trained last.

    Args:
        console: Console to draw on; None, or a console that is not a terminal, draws nothing.
        left: Column with the time remaining; by default by the speed of the bar.

    Returns:
        The bar, for a ``with`` statement; it has no task yet.

    Example:
        >>> with progress_bar(None) as progress:
        ...     task = progress.add_task("", total=2)
        ...     progress.update(task, advance=1, description="plain-20: epoch 1")
    """
    quiet = console is None or not console.is_terminal
    # The speed is averaged over many epochs, since those of different networks take different times.
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if left is None else (left,)),
        TextColumn("{task.description}", markup=False),
        console=Console(quiet=True) if quiet else console,
        disable=quiet,
        speed_estimate_period=600.0,
    )


def check_seeds(name: str, seeds: Iterable[int]) -> None:
    """Checks that each seed is a whole number from 0 to 2^32 - 1.

    Args:
        name: Name of the argument, for the message.
        seeds: The seeds.

    Raises:
        ArgumentError: A seed is not such a number.

    Example:
        >>> check_seeds("seeds", [0, 2**32 - 1])
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"{name}: needed a whole number from 0 to 2^32 - 1, got {seed!r}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch compute on one thread inside the block, and restores the number of threads at the end.

    Example:
        >>> before = torch.get_num_threads()
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
