"""The progress bar of what trains for minutes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(console: Console | None) -> Progress:
    """Makes a bar with the share that is done, the time that passed and is left, and what was trained last.

    Args:
        console: where to draw it; None, or one that is no terminal, draws nothing.

    Returns:
        The bar, to be used in a ``with`` statement; it has no task yet.

    Example:
        >>> with bar(None) as progress:
        ...     task = progress.add_task("", total=2)
        ...     progress.update(task, advance=1, description="plain-20: epoch 1")
    """
    quiet = console is None or not console.is_terminal
    # The speed is taken over many epochs, since those of different nets take different times.
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(quiet=True) if quiet else console,
        disable=quiet,
        speed_estimate_period=600.0,
    )
