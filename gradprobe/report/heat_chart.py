"""A heatmap of one quantity: places from input at the top to output at the bottom, steps from left to right."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import printable
from gradprobe.report.chart_parts import Chart, ChartData, Row, Size, concat, power_legend
from gradprobe.report.heat_marks import Onset, Span, onsets, spans
from gradprobe.report.palette import BROKEN, FAINT, INK, ZERO
from gradprobe.report.run_view import Cells, Grid, cells
from gradprobe.snapshot.records import FloatArray
from gradprobe.text.words import number

WIDE_HEAT = Size(width=760, height=440, stacked=True)
NARROW_HEAT = Size(width=240, height=330, stacked=True)

_MOST_ROWS = 150
_PX_PER_COLUMN = 5.0
_ROW_PX = (3, 22)  # least and greatest height of a row
_LABEL_PX = 15
_LONG, _SHORT = 26, 13  # characters of a name on a wide screen and on a phone
_MARK_PX = 6  # room for the names of findings above the heatmap
_MARK_FONT: dict[str, Any] = {"fontSize": 12, "fontWeight": 600, "baseline": "middle"}
_TAIL = 0.002  # share of the cells at each end of the scale that may be beyond it


def heat_chart(
    grid: Grid, quantity: str, size: Size, as_share: bool = False, findings: Sequence[Finding] = ()
) -> Chart | None:
    """Draws the heatmap.

    Args:
        grid: The quantity.
        quantity: Its name, the title of the colour scale.
        size: Width, and the height that many places take.
        as_share: The values are shares, on a linear scale; otherwise the scale is logarithmic.
        findings: Findings, causes first, to name at the edges of the heatmap.

    Returns:
        The chart, or None if nothing was measured.
    """
    if not grid.values.size or np.isnan(grid.values).all():
        return None
    drawn = _cells(grid, size, as_share)
    n_rows = len(drawn.names)
    # Whole pixels per cell: otherwise the background shows in fine lines between them.
    height = n_rows * max(_ROW_PX[0], min(size.height // n_rows, _ROW_PX[1]))
    n_columns = -(-(drawn.stop - drawn.first[0]) // (drawn.end[0] - drawn.first[0]))
    width = n_columns * (size.width // n_columns) if n_columns <= size.width else size.width
    data = ChartData()
    with np.errstate(divide="ignore", invalid="ignore"):
        values = drawn.values if as_share else np.log10(drawn.values)
    x_domain, x = [drawn.first[0], drawn.stop], "first:Q"
    x_axis = alt.Axis(title="step", format="d", grid=False, tickCount=max(3, size.width // 90), tickMinStep=1)
    x_encoding = alt.X(x, scale=alt.Scale(domain=x_domain, nice=False), axis=x_axis)
    y_scale = alt.Scale(domain=[n_rows, 0], nice=False, zero=False)
    y_axis = alt.Axis(labels=False, ticks=False, grid=False, title=None, domain=False)
    y_encoding = alt.Y("top:Q", scale=y_scale, axis=y_axis)
    rows: list[Row] = []
    special: list[Row] = []
    for row in range(n_rows):
        for column, value in enumerate(values[:, row].tolist()):
            place = {"first": drawn.first[column], "end": drawn.end[column], "top": row, "bottom": row + 1}
            shown = {"name": _name(drawn.names[row]), "steps": _steps(drawn, column)}
            if math.isfinite(value):
                rows.append({**place, "value": value, **shown, "shown": _shown(drawn.values[column, row], as_share)})
            elif not math.isnan(value):
                special.append({**place, "kind": "zero" if value < 0 else "NaN or infinite", **shown})
    tooltip = ["name:N", "steps:N"]
    # An empty rectangle that spans the plot: the page finds the cell under the pointer by it.
    corners = [{"first": x_domain[0], "end": x_domain[1], "top": 0, "bottom": n_rows}]
    frame = alt.Chart(data.add(corners), name="plot").mark_rect(fill="transparent", aria=False)
    place_of = {"x": x_encoding, "x2": "end:Q", "y": y_encoding, "y2": "bottom:Q"}
    layers: list[alt.Chart] = [frame.encode(**place_of)]
    begun = onsets(findings, drawn, width)
    if rows:
        domain = (0.0, 1.0) if as_share else _range(np.array([row["value"] for row in rows]))
        length = min(300, width)
        room = _MARK_PX if begun else 0
        title = f"{quantity}, input at the top" if size.width >= WIDE_HEAT.width else quantity
        legend = power_legend(domain, title, length, room)
        if as_share:
            legend = alt.Legend(title=quantity, orient="top", gradientLength=length, format=".0%", values=[0, 0.5, 1])
        scale = alt.Scale(scheme="plasma" if as_share else "viridis", domain=list(domain), clamp=True)
        colour = alt.Color("value:Q", scale=scale, legend=legend)
        heat = alt.Chart(data.add(rows)).mark_rect(aria=False)
        layers.append(heat.encode(**place_of, color=colour, tooltip=[*tooltip, alt.Tooltip("shown:N", title=quantity)]))
    if special:
        kinds = {"zero": ZERO, "NaN or infinite": BROKEN}
        known = [kind for kind in kinds if any(row["kind"] == kind for row in special)]
        scale = alt.Scale(domain=known, range=[kinds[kind] for kind in known])
        legend = alt.Legend(title=None, orient="top", symbolType="square", symbolSize=140, symbolStrokeWidth=0)
        odd = alt.Chart(data.add(special)).mark_rect(aria=False)
        fill = alt.Fill("kind:N", scale=scale, legend=legend)
        layers.append(odd.encode(**place_of, fill=fill, tooltip=[*tooltip, alt.Tooltip("kind:N", title=quantity)]))
    labels = _labels(drawn, height, size)
    names = alt.Chart(data.add(labels)).mark_text(align="right", baseline="middle", dx=-6, fontSize=11, aria=False)
    layers.append(names.encode(x=x_encoding, y=y_encoding, text="label:N", color=alt.value(FAINT)))
    layers += _begun(begun, x_encoding, y_encoding, data)
    if size.width >= WIDE_HEAT.width:
        layers += _concerned(spans(findings, grid.names, drawn, height / n_rows), drawn, x_encoding, y_encoding, data)
    panel = alt.LayerChart(layer=layers, width=width, height=height)
    description = (
        f"Heatmap of the {quantity} of {len(grid.names)} places, from input at the top to output at the bottom, "
    )
    description += f"over steps {drawn.first[0]} to {drawn.last[-1]}."
    described: Chart = concat([panel], size, data).properties(description=description)
    return described


def _begun(marks: Sequence[Onset], x: alt.X, y: alt.Y, data: ChartData) -> list[alt.Chart]:
    """Makes a triangle above each step at which a finding begins, and the finding's name beside it."""
    layers: list[alt.Chart] = []
    for is_left in (False, True):
        rows = [{"first": one.step, "top": 0, "label": one.label} for one in marks if one.is_left == is_left]
        if rows:
            base = alt.Chart(data.add(rows)).encode(x=x, y=y)
            triangle = base.mark_point(shape="triangle-down", filled=True, size=50, yOffset=-6, opacity=1, aria=False)
            side: dict[str, Any] = {"align": "right", "dx": -7} if is_left else {"align": "left", "dx": 7}
            text = base.mark_text(**side, **_MARK_FONT, dy=-8, aria=False)
            layers += [triangle.encode(color=alt.value(BROKEN)), text.encode(text="label:N", color=alt.value(INK))]
    return layers


def _concerned(marks: Sequence[Span], drawn: Cells, x: alt.X, y: alt.Y, data: ChartData) -> list[alt.Chart]:
    """Makes a line beside the rows of each finding on a part of them, and the finding's name beside it."""
    if not marks:
        return []
    shared = [{"first": drawn.stop, "label": one.label} for one in marks]
    rows = [{**row, "top": one.top + 0.1, "bottom": one.bottom - 0.1} for row, one in zip(shared, marks, strict=True)]
    middles = [{**row, "top": (one.top + one.bottom) / 2} for row, one in zip(shared, marks, strict=True)]
    line = alt.Chart(data.add(rows)).mark_rule(strokeWidth=3, xOffset=6, aria=False)
    text = alt.Chart(data.add(middles)).mark_text(**_MARK_FONT, align="left", dx=13, aria=False)
    return [
        line.encode(x=x, y=y, y2="bottom:Q", color=alt.value(BROKEN)),
        text.encode(x=x, y=y, text="label:N", color=alt.value(INK)),
    ]


def cell_texts(grid: Grid, quantity: str, as_share: bool = False) -> str:
    """Returns the names, steps and values of the cells as an inert script element, which the page shows on demand.

    Args:
        grid: The quantity.
        quantity: Its name.
        as_share: As for `heat_chart`.
    """
    if not grid.values.size or np.isnan(grid.values).all():
        return ""
    drawn = _cells(grid, WIDE_HEAT, as_share)
    first, whole = drawn.first[0], drawn.stop - drawn.first[0]
    texts = {
        "names": [printable(_name(names)) for names in drawn.names],
        "steps": [_steps(drawn, column) for column in range(len(drawn.first))],
        "edges": [
            [round((left - first) / whole, 5), round((right - first) / whole, 5)]
            for left, right in zip(drawn.first, drawn.end, strict=True)
        ],
        "values": [[_shown(value, as_share) for value in row] for row in drawn.values.T.tolist()],
    }
    text = json.dumps(texts, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    return f'<script type="application/json" class="cells">{text}</script>\n'


def _cells(grid: Grid, size: Size, as_share: bool) -> Cells:
    return cells(grid, int(size.width / _PX_PER_COLUMN), _MOST_ROWS, linear=as_share)


def _shown(value: float, as_share: bool) -> str:
    if math.isnan(value):
        return "none"
    if not math.isfinite(value):
        return "NaN or infinite"
    return f"{value:.0%}" if as_share else number(value)


def _name(names: tuple[str, ...]) -> str:
    return " to ".join(names)


def _steps(drawn: Cells, column: int) -> str:
    first, last = drawn.first[column], drawn.last[column]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _labels(drawn: Cells, height: float, size: Size) -> list[Row]:
    """Names every row, or every second and so on, as there is room."""
    n_rows = len(drawn.names)
    pace = math.ceil(n_rows * _LABEL_PX / height)
    width = _LONG if size.width >= WIDE_HEAT.width else _SHORT
    return [
        {"first": drawn.first[0], "top": row + 0.5, "label": printable(_name(drawn.names[row][:1]), width)}
        for row in range(0, n_rows, pace)
    ]


def _range(values: FloatArray) -> tuple[float, float]:
    """Returns the range of the colour scale, without the very few cells at both ends."""
    low, high = np.quantile(values, [_TAIL, 1 - _TAIL]).tolist()
    return (low, high) if high - low > 0.1 else (low - 0.5, high + 0.5)
