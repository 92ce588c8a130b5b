"""Charts of two runs on one axis of steps: losses, gradient norms, and how far they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradprobe.report.chart_parts import Chart, ChartData, Size, concat
from gradprobe.report.comparison.compare import Comparison
from gradprobe.report.heat_chart import WIDE_HEAT, heat_chart
from gradprobe.report.palette import BROKEN, FAINT, FIRST, SECOND
from gradprobe.report.run_charts import WIDE_RUN
from gradprobe.report.run_view import Grid
from gradprobe.report.step_parts import Mark, StepLine, lines_over_steps

_UNDER = 3.4  # width of the lower line, which shows at both sides of the upper one where they agree


def both_chart(found: Comparison, size: Size = WIDE_RUN) -> Chart | None:
    """Draws the loss and the norm of all gradients of both runs; None if neither is finite."""
    data = ChartData()
    panels = []
    totals = [list(zip(found.steps, run.tolist(), strict=True)) for run in found.total_norms]
    for title, runs in (("Loss", found.losses), ("Norm of all gradients", totals)):
        lines = [
            StepLine(name, colour, run, width)
            for name, run, colour, width in zip(found.names, runs, (FIRST, SECOND), (_UNDER, 1.4), strict=True)
        ]
        panels.append(
            lines_over_steps(title, lines, marks_of(found), [], _domain(found), _spans_powers(runs), size, data)
        )
    drawn = [panel for panel in panels if panel is not None]
    return _described(concat(drawn, size, data), "Loss and gradient norm of both runs.") if drawn else None


def difference_chart(found: Comparison, size: Size = WIDE_RUN) -> Chart | None:
    """Draws the relative differences of loss, norm of all gradients and single gradients; None if there are none."""
    data = ChartData()
    steps = found.steps
    judged = np.isfinite(found.sizes) & ~found.course.negligible(found.rounding)
    sizes = np.where(judged, found.sizes, 0.0)
    largest = sizes.max(axis=1, initial=0.0)
    quantities = (
        ("one gradient", SECOND, largest),
        ("all gradients", FIRST, found.course.total_sizes),
        ("loss", FAINT, found.course.loss_sizes),
    )
    lines = [
        StepLine(name, colour, list(zip(steps, values.tolist(), strict=True))) for name, colour, values in quantities
    ]
    limits = [(found.rounding.whole, "limit, all"), (found.rounding.single, "limit, one")]
    title = "Relative difference"
    panel = lines_over_steps(title, lines, marks_of(found), limits, _domain(found), True, size, data)
    if panel is None:
        return None
    return _described(concat([panel], size, data), f"{title} of both runs over steps {steps[0]} to {steps[-1]}.")


def size_heatmap(found: Comparison, size: Size = WIDE_HEAT) -> Chart | None:
    """Draws the relative difference of each gradient over the steps; None if all are equal."""
    return heat_chart(size_grid(found), HEAT_QUANTITY, size) if found.first is not None else None


HEAT_QUANTITY = "relative difference of the norms"


def size_grid(found: Comparison) -> Grid:
    """Returns the relative differences of the norms of all gradients."""
    return Grid(np.array(found.steps, dtype=np.int64), found.course.names, found.sizes)


def marks_of(found: Comparison) -> list[Mark]:
    """Returns the first step that differs, and the first that differs by more than rounding."""
    marks = [] if found.first is None else [Mark(found.first.step, FAINT)]
    if found.first_beyond is not None:
        marks = [one for one in marks if one.step != found.first_beyond.step]
        marks.append(Mark(found.first_beyond.step, BROKEN))
    return marks


def _spans_powers(runs: Sequence[Sequence[tuple[int, float]]]) -> bool:
    """Whether a logarithmic scale suits these values."""
    values = [value for run in runs for _, value in run if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def _domain(found: Comparison) -> tuple[int, int]:
    first, last = (min(map(min, found.recorded)), max(map(max, found.recorded)))
    return first, max(last, first + 1)


def _described(chart: Chart, text: str) -> Chart:
    chart.description = text
    return chart
