"""Names of findings at the edges of a heatmap: above the step at which one begins, and beside the rows it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradprobe.diagnosis.finding import Finding
from gradprobe.report.run_view import Cells

_CHARACTER_PX = 6.5
_LABEL_PX = 15.0
_MOST = 4  # at either edge


@dataclass(frozen=True)
class Onset:
    """A finding above the step at which it begins.

    Attributes:
        step: The step.
        label: Its name.
        is_left: The name stands to the left of the step, where the right has no room.
    """

    step: int
    label: str
    is_left: bool


@dataclass(frozen=True)
class Span:
    """A finding beside the rows that it concerns.

    Attributes:
        top: First row.
        bottom: Row after the last one.
        label: Its name.
    """

    top: int
    bottom: int
    label: str


def onsets(findings: Iterable[Finding], drawn: Cells, width: float) -> list[Onset]:
    """Returns the findings that begin in the course of the run, those that matter most first, as far as they have room.

    Args:
        findings: Findings, causes first.
        drawn: The cells of the heatmap.
        width: Width of the heatmap in pixels.
    """
    placed: list[Onset] = []
    taken: list[tuple[float, float]] = []
    px_per_step = width / (drawn.stop - drawn.first[0])
    for finding in _roots_first(findings):
        step = finding.steps[0]
        if not drawn.first[0] < step <= drawn.last[-1]:
            continue
        x_px, label_px = (step - drawn.first[0]) * px_per_step, 12 + _CHARACTER_PX * len(finding.rule)
        is_left = x_px + label_px > width
        left, right = (x_px - label_px, x_px + 6) if is_left else (x_px - 6, x_px + label_px)
        if (is_left and left < 0) or any(left < end and start < right for start, end in taken):
            continue
        placed.append(Onset(step, finding.rule, is_left))
        taken.append((left, right))
    return placed[:_MOST]


def spans(findings: Iterable[Finding], places: Sequence[str], drawn: Cells, row_px: float) -> list[Span]:
    """Returns the findings on a part of the rows, each beside the longest run of its rows, as far as they have room.

    Args:
        findings: Findings, causes first.
        places: Name of each place, which may share rows.
        drawn: The cells of the heatmap.
        row_px: Height of a row in pixels.
    """
    number = {name: k for k, name in enumerate(places)}
    ends = [(number[names[0]], number[names[-1]]) for names in drawn.names]
    placed: list[Span] = []
    for finding in _roots_first(findings):
        concerned = {number[name] for name in finding.sites if name in number}
        rows = [row for row, (first, last) in enumerate(ends) if concerned & set(range(first, last + 1))]
        if not rows or len(rows) == len(ends):
            continue
        span = Span(*_longest_run(rows), finding.rule)
        gaps = ((span.top + span.bottom - one.top - one.bottom) / 2 * row_px for one in placed)
        is_apart = all(abs(gap) >= _LABEL_PX for gap in gaps)
        if is_apart and not any(span.top < one.bottom and one.top < span.bottom for one in placed):
            placed.append(span)
    return placed[:_MOST]


def _roots_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: bool(finding.follows))


def _longest_run(rows: Sequence[int]) -> tuple[int, int]:
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return max(runs, key=lambda run: run[1] - run[0])
