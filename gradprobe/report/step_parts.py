"""Parts of charts over steps: the axis, the points that can be pointed at, and a panel with a line per run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import altair as alt
import numpy as np

from gradprobe.report.chart_parts import ChartData, Row, Size, label_layers, power_axis, title_lines
from gradprobe.report.label_places import Label
from gradprobe.report.palette import FAINT
from gradprobe.text.words import number

MOST_POINTS = 400  # of a line over steps
_MOST_NOTES = 60  # points of a line that can be pointed at
Side: TypeAlias = Literal["left", "center", "right"]
_DASHED: dict[str, Any] = {"strokeDash": [5, 4], "strokeWidth": 1.2, "aria": False}


def step_axis(domain: tuple[int, int], size: Size, field: str = "step") -> alt.X:
    """Makes the axis of the steps."""
    axis = alt.Axis(title="step", format="d", grid=False, tickCount=max(3, size.width // 90), tickMinStep=1)
    return alt.X(f"{field}:Q", scale=alt.Scale(domain=list(domain), nice=False), axis=axis)


def step_notes(rows: Sequence[Row], x: alt.X, y: alt.Y, data: ChartData) -> alt.Chart:
    """Makes invisible points that carry the text for tooltips and screen readers."""
    pace = math.ceil(len(rows) / _MOST_NOTES)
    points = alt.Chart(data.add(rows[::pace])).mark_point(filled=True, size=90, opacity=0)
    noted: alt.Chart = points.encode(x=x, y=y, description="note:N")
    return noted


def padded_domain(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of values with a margin at both ends."""
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 1e-3 * max(abs(low), abs(high)), 0.02)
    return low - margin, high + 2 * margin


@dataclass(frozen=True)
class StepLine:
    """A line over steps.

    Attributes:
        name: Its name, shown at its end.
        colour: Its colour.
        points: Step and value; those that are not finite are left out.
        width: Width in pixels.
    """

    name: str
    colour: str
    points: Sequence[tuple[int, float]]
    width: float = 1.6


@dataclass(frozen=True)
class Mark:
    """A dashed line at a step, with the step's number above it."""

    step: int
    colour: str


def lines_over_steps(
    title: str,
    lines: Sequence[StepLine],
    marks: Sequence[Mark],
    limits: Sequence[tuple[float, str]],
    domain: tuple[int, int],
    log: bool,
    size: Size,
    data: ChartData,
) -> alt.LayerChart | None:
    """Draws lines over steps, each with its name and the range of the steps that share a point.

    Args:
        title: Title of the panel.
        lines: The lines.
        marks: Steps to mark, at most two, in order.
        limits: Values to mark, with their names.
        domain: First and last step.
        log: Draw logarithms; values that are not positive are left out.
        size: Size of the panel.
        data: The chart's data, to which the rows are added.

    Returns:
        The panel, or None if there is nothing to draw.
    """
    drawn = [(line, _rows(title, line, log)) for line in lines]
    drawn = [(line, rows) for line, rows in drawn if rows]
    if not drawn:
        return None
    scaled = [(math.log10(value) if log else value, name) for value, name in limits]
    ends = [row[end] for _, rows in drawn for row in rows for end in ("low", "high")]
    y_domain = padded_domain([*ends, *(value for value, _ in scaled)])
    axis = power_axis(y_domain) if log else alt.Axis(title=None, tickCount=5)
    scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    x, y = step_axis(domain, size), alt.Y("value:Q", scale=scale, axis=axis)
    layers: list[alt.Chart] = []
    for mark in marks:
        side: Side = "center" if len(marks) == 1 else "right" if mark is marks[0] else "left"
        rule = alt.Chart(data.add([{"step": mark.step, "label": f"step {mark.step}"}])).encode(
            x=x, color=alt.value(mark.colour)
        )
        layers.append(rule.mark_rule(**_DASHED))
        text = rule.mark_text(align=side, baseline="bottom", dy=-2, fontSize=12, aria=False)
        layers.append(text.encode(y=alt.value(0), text="label:N"))
    labels = []
    for value, name in scaled:
        rule = alt.Chart(data.add([{"value": value}]))
        layers.append(rule.mark_rule(**_DASHED).encode(y=y, color=alt.value(FAINT)))
        down = size.height * (y_domain[1] - value) / (y_domain[1] - y_domain[0])
        labels.append(Label(name, FAINT, domain[1], size.width, down))
    for line, rows in drawn:
        base = alt.Chart(data.add(rows)).encode(x=x)
        colour = alt.value(line.colour)
        area = base.mark_area(opacity=0.2, aria=False)
        layers.append(area.encode(y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colour))
        layers.append(base.mark_line(strokeWidth=line.width, aria=False).encode(y=y, color=colour))
        if len(rows) == 1:
            layers.append(base.mark_point(filled=True, size=36, aria=False).encode(y=y, color=colour))
        layers.append(step_notes(rows, x, y, data))
        last = rows[-1]
        across = size.width * (last["step"] - domain[0]) / (domain[1] - domain[0])
        down = size.height * (y_domain[1] - last["value"]) / (y_domain[1] - y_domain[0])
        labels.append(Label(line.name, line.colour, last["step"], across, down))
    layers.extend(label_layers(labels, x, y, y_domain, 6, size, data))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title_lines(title, size))


def _rows(title: str, line: StepLine, log: bool) -> list[Row]:
    """Joins the points of a line: median and range of the steps that share a point."""
    points = [(step, value) for step, value in line.points if math.isfinite(value) and (value > 0 or not log)]
    if not points:
        return []
    rows: list[Row] = []
    values = np.array([value for _, value in points])
    shown = np.log10(values) if log else values
    for part in np.array_split(np.arange(len(points)), min(MOST_POINTS, len(points))):
        step, middle = points[part[0]][0], float(np.median(shown[part]))
        edges = {"low": float(shown[part].min()), "high": float(shown[part].max())}
        note = f"step {step}, {line.name}: {title.lower()} {number(float(np.median(values[part])))}"
        rows.append({"step": step, "value": middle, **edges, "note": note})
    return rows
