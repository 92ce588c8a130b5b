"""Percentages with their spread, durations, and the state of a sweep as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gradprobe.report.records import Cell
from gradprobe.report.seed_statistics import Spread

_SEPARATOR = re.compile(r"[/\\]")
# From the root, a home folder or a drive, through at least one folder.
_PATH = re.compile(r"""(?<![\w./])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s'":,]+){2,}""")


RUNNING_NOTE = "* running training error: that of the epoch's steps, each before its update"
"""Explains the mark behind a running training error."""


def percent(spread: Spread | None) -> str:
    """Formats the mean and standard deviation of an error, without a percent sign; a dash if nothing is recorded.

    >>> percent(Spread((1.0, 2.0, 3.0))), percent(Spread((67.04,))), percent(None)
    ('2.0 ± 1.0', '67.0', '–')
    """
    if spread is None:
        return "–"
    mean = "NaN" if math.isnan(spread.mean) else f"{spread.mean:.1f}"
    return mean if spread.std is None or math.isnan(spread.std) else f"{mean} ± {spread.std:.1f}"


def short_source(source: str) -> str:
    """Shortens the path of a data set to its last part, so that a report tells nothing of its author's folders.

    >>> short_source("cifar10:/home/me/my data/cifar-10-batches-bin"), short_source("hf:user/name")
    ('cifar10:…/cifar-10-batches-bin', 'hf:user/name')
    """
    kind, colon, place = source.partition(":")
    return f"{kind}{colon}{short_path(place)}"


def short_path(path: str) -> str:
    """Shortens an absolute path to its last part, and leaves any other text as it is.

    >>> short_path("/home/me/net.py"), short_path("net.py")
    ('…/net.py', 'net.py')
    """
    return _shortened(path) if re.match(r"[/\\~]|[A-Za-z]:[/\\]", path) else path


def short_paths(text: str) -> str:
    """Shortens the absolute paths without spaces in a sentence, as `short_source` does.

    >>> short_paths("no file '/home/me/net.py' and/or /tmp"), short_paths("see https://a.org/b/c")
    ("no file '…/net.py' and/or /tmp", 'see https://a.org/b/c')
    """
    return _PATH.sub(lambda path: _shortened(path[0]), text)


def _shortened(path: str) -> str:
    return f"…/{_SEPARATOR.split(path)[-1]}"


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units.

    >>> duration(0.42), duration(71.8), duration(7384)
    ('0.4 s', '1 min 12 s', '2 h 3 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def runs_done(cells: Sequence[Cell]) -> str:
    """Counts the training runs of a sweep that have run all their epochs, diverged or failed.

    >>> runs_done([Cell(1, "plain", 8, 0, 75290, "done"), Cell(2, "plain", 8, 1, 75290, "diverged")])
    '1 of 2 training runs done, 1 diverged'
    """
    text = f"{sum(cell.status == 'done' for cell in cells)} of {len(cells)} training runs done"
    ends = {
        "diverged": sum(cell.status == "diverged" for cell in cells),
        "failed": sum(bool(cell.failure) for cell in cells),
    }
    return ", ".join([text, *(f"{count} {end}" for end, count in ends.items() if count)])
