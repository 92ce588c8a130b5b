"""Charts of one run: loss, gradient norms over depth and steps, updates, magnitudes, shortcuts and dead units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import altair as alt
import numpy as np

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.errors import ArgumentError
from gradprobe.report.chart_parts import (
    Chart,
    ChartData,
    Row,
    Size,
    concat,
    lines_panel,
    pdf,
    png,
    power_axis,
    svg,
    title_lines,
)
from gradprobe.report.heat_chart import NARROW_HEAT, WIDE_HEAT, heat_chart
from gradprobe.report.palette import BROKEN, FAINT, FIRST, INK, SECOND, THIRD
from gradprobe.report.run_view import Grid, RunView, middle, spread
from gradprobe.report.step_parts import MOST_POINTS, padded_domain, step_axis, step_notes
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.snapshot.records import FloatArray, IntArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.words import number

WIDE_RUN = Size(width=840, height=240, stacked=True)
NARROW_RUN = Size(width=270, height=200, stacked=True)

_MOST_LANES = 10
_LANE_PX = 30
_HEALTHY_RATIO = 1e-3


def loss_chart(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_RUN) -> Chart | None:
    """Draws the loss, and below it when each finding holds, on one time line.

    Args:
        view: The run.
        diagnosis: Its findings.
        size: Size of the panel with the loss.

    Returns:
        The chart, or None if there is no finite loss and no finding.
    """
    finite = [(step, loss) for step, loss in view.losses if math.isfinite(loss)]
    findings = sorted(diagnosis, key=lambda one: bool(one.follows))[:_MOST_LANES]
    if not finite and not findings:
        return None
    data = ChartData()
    steps = [one.step for one in view.snapshots] + [step for one in findings for step in one.steps]
    domain = (min(steps), max(max(steps), min(steps) + 1))
    panels: list[alt.LayerChart] = []
    if finite:
        panels.append(_loss_panel(finite, [one.steps[0] for one in findings if not one.follows], domain, size, data))
    if findings:
        rows: list[Row] = []
        for lane, one in enumerate(findings):
            first, last = one.steps
            is_late = (first - domain[0]) > 0.5 * (domain[1] - domain[0])
            label = f"{lane + 1}  {one.title}" if not one.follows else f"↳  {one.title}"
            when = f"step {first}" if first == last else f"steps {first} to {last}"
            rows.append(
                {
                    "first": first,
                    "last": last,
                    "anchor": last if is_late else first,
                    "late": is_late,
                    "lane": lane + 0.72,
                    "text": lane + 0.3,
                    "label": label,
                    "colour": FAINT if one.follows else BROKEN,
                    "note": f"{one.title}, {when}" + (f", explained by {one.follows}" if one.follows else ""),
                }
            )
        panels.append(_lanes_panel(rows, domain, Size(size.width, _LANE_PX * len(rows), stacked=True), data))
    return _described(
        concat(panels, Size(size.width, size.height, stacked=True), data),
        f"Loss over steps {domain[0]} to {domain[1]}, with {len(findings)} findings on the time line.",
    )


def norm_heatmap(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_HEAT) -> Chart | None:
    """Draws the gradient norm of each weight, from input at the top to output, over the steps; None without any.

    Findings are named above the step at which they begin and, on a wide chart, beside the rows that they concern.
    """
    return heat_chart(view.norms, "gradient norm", size, findings=tuple(diagnosis))


def update_chart(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_RUN) -> Chart | None:
    """Draws the ratio of update to weight over the steps: median, quartiles and range; None if not observed."""
    grid = view.update_ratios
    low, lower, centre, upper, high = spread(np.where(grid.values > 0, grid.values, np.nan))
    kept: IntArray = np.flatnonzero(np.isfinite(centre))
    if not len(kept):
        return None
    parts = np.array_split(kept, min(MOST_POINTS, len(kept)))
    rows: list[Row] = []
    for part in parts:
        edges = (low[part].min(), lower[part].min(), np.median(centre[part]), upper[part].max(), high[part].max())
        names = ("low", "lower", "value", "upper", "high")
        ratio = number(float(edges[2]))
        reach = f"{number(float(edges[0]))} to {number(float(edges[4]))}"
        logs = dict(zip(names, np.log10(edges).tolist(), strict=True))
        step = int(grid.steps[part[0]])
        rows.append({"step": step, **logs, "note": f"step {step}: median {ratio}, all weights {reach}"})
    healthy = math.log10(_HEALTHY_RATIO)
    y_domain = padded_domain([healthy, *(row[key] for row in rows for key in ("low", "high"))])
    data = ChartData()
    x_domain = (rows[0]["step"], max(rows[-1]["step"], rows[0]["step"] + 1))
    x = step_axis(x_domain, size)
    y_scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    y = alt.Y("value:Q", scale=y_scale, axis=power_axis(y_domain))
    base = alt.Chart(data.add(rows)).encode(x=x)
    colour = alt.value(FIRST)
    rule = [{"value": healthy, "label": "healthy", "step": x_domain[1]}]
    reference = alt.Chart(data.add(rule))
    layers = [
        base.mark_area(opacity=0.14, aria=False).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=colour),
        base.mark_area(opacity=0.3, aria=False).encode(y=alt.Y("lower:Q", scale=y_scale), y2="upper:Q", color=colour),
        reference.mark_rule(strokeDash=[5, 4], strokeWidth=1.2, aria=False).encode(y=y, color=alt.value(FAINT)),
        base.mark_line(strokeWidth=1.8, aria=False).encode(y=y, color=colour),
        reference.mark_text(align="left", baseline="middle", dx=6, fontSize=12, aria=False).encode(
            x=alt.X("step:Q", scale=alt.Scale(domain=list(x_domain), nice=False)),
            y=y,
            text="label:N",
            color=alt.value(FAINT),
        ),
        step_notes(rows, x, y, data),
    ]
    title = "Size of the update over size of the weight"
    panel = alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title_lines(title, size))
    return _described(concat([panel], size, data), f"{title}, over steps {x_domain[0]} to {x_domain[1]}.")


def magnitude_chart(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_RUN) -> Chart | None:
    """Draws root mean square and largest magnitude over depth, against the range of the dtype where it is known.

    The root mean square is the median over steps, the largest magnitude that of all steps. Gradients at outputs are
    shown as the dtype had to hold them, with loss scaling.

    Args:
        view: The run.
        diagnosis: Its findings, which are not drawn.
        size: Size of each panel.

    Returns:
        The chart, or None if nothing positive and finite was measured.
    """
    quantities = [
        ("Outputs of modules", "module", view.outputs("rms"), view.outputs("abs_max"), True),
        (
            "Gradients at these outputs",
            "module",
            view.outputs("rms", "activation_grad"),
            view.outputs("abs_max", "activation_grad"),
            True,
        ),
        ("Gradients of the weights", "weight", view.rms, view.largest, False),
    ]
    data = ChartData()
    panels: list[alt.LayerChart] = []
    for title, place, rms, largest, has_dtype in quantities:
        rows = [*_depth_rows("rms", FIRST, middle(rms.values), rms.names), *_largest_rows(largest)]
        if not rows:
            continue
        values = [row["value"] for row in rows]
        marks = _dtype_marks(view, values) if has_dtype else []
        y_domain = padded_domain([*values, *(mark["value"] for mark in marks)])
        panel = lines_panel(title, rows, len(rms.names), place, power_axis(y_domain), y_domain, size, data)
        if marks:
            rule = alt.Chart(data.add([{**mark, "position": 1} for mark in marks]))
            scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
            y = alt.Y("value:Q", scale=scale, axis=power_axis(y_domain))
            x = alt.X("position:Q")
            panel += rule.mark_rule(strokeDash=[5, 4], strokeWidth=1.4, aria=False).encode(y=y, color=alt.value(BROKEN))
            panel += rule.mark_text(align="left", dx=4, dy=-7, fontSize=12, aria=False).encode(
                x=x, y=y, text="label:N", color=alt.value(BROKEN)
            )
        panels.append(panel)
    if not panels:
        return None
    return _described(concat(panels, size, data), "Root mean square and largest magnitude over depth.")


def share_chart(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_RUN) -> Chart | None:
    """Draws the share of the gradient that arrives by the shortcut over depth, in thirds of the run; None without."""
    grid = view.shares
    if not np.isfinite(grid.values).any():
        return None
    n_parts = min(3, len(grid.steps))
    titles = {1: ("whole run",), 2: ("start", "end"), 3: ("start", "middle", "end")}[n_parts]
    rows: list[Row] = []
    for name, colour, part in zip(titles, (THIRD, FIRST, SECOND), np.array_split(grid.values, n_parts), strict=False):
        rows += _depth_rows(name, colour, middle(part), grid.names, as_share=True)
    axis = alt.Axis(title=None, values=[0, 0.25, 0.5, 0.75, 1], format=".0%")
    data = ChartData()
    title = "Share of the gradient that arrives by the shortcut"
    panel = lines_panel(title_lines(title, size), rows, len(grid.names), "residual add", axis, (0.0, 1.0), size, data)
    return _described(concat([panel], size, data), f"{title}, over depth, in each third of the run.")


def dead_chart(view: RunView, diagnosis: Diagnosis, size: Size = WIDE_HEAT) -> Chart | None:
    """Draws the share of zeros in the outputs of modules, from input at the top, over the steps; None without any."""
    return heat_chart(view.zero_shares, "share of zeros in the output", size, as_share=True)


Draw = Callable[[RunView, Diagnosis, Size], Chart | None]

KINDS: MappingProxyType[str, tuple[Draw, Size, Size]] = MappingProxyType(
    {
        "loss": (loss_chart, WIDE_RUN, NARROW_RUN),
        "heatmap": (norm_heatmap, WIDE_HEAT, NARROW_HEAT),
        "update_ratio": (update_chart, WIDE_RUN, NARROW_RUN),
        "magnitude": (magnitude_chart, WIDE_RUN, NARROW_RUN),
        "shortcut_share": (share_chart, WIDE_RUN, NARROW_RUN),
        "dead_units": (dead_chart, WIDE_HEAT, NARROW_HEAT),
    }
)
"""Each kind of chart: the function that draws it, its size on a wide screen and on a phone."""

NEEDS = MappingProxyType(
    {
        "loss": "a loss, by probe.step(loss), or a finding",
        "heatmap": "a measured gradient",
        "update_ratio": "attach(updates=True) and a step of the optimizer",
        "magnitude": "a measured gradient that is not zero",
        "shortcut_share": "residual adds whose branch and shortcut are both observed",
        "dead_units": "attach(activations=True) and a module whose output has zeros",
    }
)
"""What each kind of chart needs."""


def plot(snapshots: Sequence[Snapshot], diagnosis: Diagnosis, kind: str) -> Chart:
    """Draws one chart of a run.

    Args:
        snapshots: Steps in order.
        diagnosis: The findings of the run.
        kind: One of `KINDS`.

    Returns:
        An Altair chart; its `save` writes PNG, SVG, PDF or HTML.

    Raises:
        ArgumentError: The kind is unknown, or the run did not record what the chart shows.
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind: needed one of {', '.join(KINDS)}, got {kind!r}")
    draw, size, _ = KINDS[kind]
    chart = draw(RunView(snapshots), diagnosis, size)
    if chart is None:
        raise ArgumentError(f"kind: needed {NEEDS[kind]} for {kind!r}, got a run without")
    return chart


def write_images(
    snapshots: Sequence[Snapshot], diagnosis: Diagnosis, folder: str | Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Writes every chart that the run has data for, as `heatmap.png` and so on.

    Args:
        snapshots: Steps in order.
        diagnosis: The findings of the run.
        folder: Folder to write to; created if missing.
        formats: Of "png", "svg" and "pdf".

    Returns:
        The files written.

    Raises:
        ArgumentError: A format is unknown.
        StoreError: A file cannot be written; the old files are unchanged.
    """
    render: dict[str, Callable[[Chart], str | bytes]] = {"png": png, "svg": svg, "pdf": pdf}
    unknown = [one for one in formats if one not in render]
    if unknown:
        raise ArgumentError(f"formats: needed some of {', '.join(render)}, got {unknown[0]!r}")
    folder = Path(folder)
    create_folder(folder)
    view = RunView(snapshots)
    images: dict[Path, list[str | bytes]] = {}
    for kind, (draw, size, _) in KINDS.items():
        chart = draw(view, diagnosis, size)
        if chart is not None:
            images |= {folder / f"{kind}.{suffix}": [render[suffix](chart)] for suffix in formats}
    write_files(images)
    return list(images)


def _loss_panel(
    finite: Sequence[tuple[int, float]], starts: Sequence[int], domain: tuple[int, int], size: Size, data: ChartData
) -> alt.LayerChart:
    losses = np.array([loss for _, loss in finite])
    is_log = bool(losses.min() > 0 and losses.max() > 30 * losses.min())
    shown = np.log10(losses) if is_log else losses
    rows: list[Row] = []
    for part in np.array_split(np.arange(len(finite)), min(MOST_POINTS, len(finite))):
        step = finite[part[0]][0]
        note = f"step {step}: loss {number(float(np.median(losses[part])))}"
        edges = {"low": float(shown[part].min()), "high": float(shown[part].max())}
        rows.append({"step": step, "value": float(np.median(shown[part])), **edges, "note": note})
    y_domain = padded_domain([float(shown.min()), float(shown.max())])
    axis = power_axis(y_domain) if is_log else alt.Axis(title=None, tickCount=5)
    y_scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    x, y = step_axis(domain, size), alt.Y("value:Q", scale=y_scale, axis=axis)
    base = alt.Chart(data.add(rows)).encode(x=x)
    layers = [
        base.mark_area(opacity=0.25, aria=False).encode(
            y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=alt.value(FIRST)
        ),
        base.mark_line(strokeWidth=1.8, aria=False).encode(y=y, color=alt.value(FIRST)),
    ]
    if starts:
        marks = alt.Chart(data.add([{"step": step, "label": str(k)} for k, step in enumerate(starts, start=1)]))
        layers.insert(
            0, marks.mark_rule(strokeDash=[5, 4], strokeWidth=1.2, aria=False).encode(x=x, color=alt.value(BROKEN))
        )
    layers.append(step_notes(rows, x, y, data))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title="Loss")


def _lanes_panel(rows: Sequence[Row], domain: tuple[int, int], size: Size, data: ChartData) -> alt.LayerChart:
    x_scale = alt.Scale(domain=list(domain), nice=False)
    x = step_axis(domain, size, field="first")
    y_scale = alt.Scale(domain=[len(rows), 0], nice=False, zero=False)
    colour = alt.Color("colour:N", scale=None)
    hidden = alt.Axis(labels=False, grid=False, title=None, ticks=False, domain=False)
    y = alt.Y("lane:Q", scale=y_scale, axis=hidden)
    layers: list[alt.Chart] = []
    base = alt.Chart(data.add(rows))
    layers.append(
        base.mark_rule(strokeWidth=6, strokeCap="round", aria=False).encode(x=x, x2="last:Q", y=y, color=colour)
    )
    layers.append(
        base.mark_point(filled=True, size=60, opacity=1, shape="circle").encode(
            x=x, y=y, color=colour, description="note:N"
        )
    )
    for is_late in (False, True):
        these = [row for row in rows if row["late"] == is_late]
        if these:
            style: dict[str, Any] = {
                "align": "right" if is_late else "left",
                "fontSize": 12,
                "fontWeight": 600,
                "baseline": "middle",
            }
            layers.append(
                alt.Chart(data.add(these))
                .mark_text(**style, dx=3 if is_late else -3, color=INK, aria=False)
                .encode(
                    x=alt.X("anchor:Q", scale=x_scale),
                    y=alt.Y("text:Q", scale=y_scale, axis=hidden),
                    text="label:N",
                )
            )
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title="Findings")


def _depth_rows(name: str, colour: str, values: FloatArray, places: Sequence[str], as_share: bool = False) -> list[Row]:
    """Returns the rows of a line over depth for `lines_panel`."""
    rows: list[Row] = []
    gaps = 0
    for position, (value, place) in enumerate(zip(values.tolist(), places, strict=True), start=1):
        if not math.isfinite(value) or (value <= 0 and not as_share):
            gaps += 1
            continue
        shown = value if as_share else math.log10(value)
        text = f"{value:.0%}" if as_share else number(value)
        line = {"net": name, "segment": f"{name} {gaps}", "colour": colour, "label_colour": colour}
        note = f"{place}, {name}: {text}"
        rows.append({**line, "position": position, "value": shown, "low": shown, "high": shown, "note": note})
    return rows


def _largest_rows(grid: Grid) -> list[Row]:
    finite = np.where(np.isfinite(grid.values), grid.values, 0.0)
    return _depth_rows("largest", SECOND, finite.max(axis=0, initial=0.0), grid.names)


def _dtype_marks(view: RunView, values: Sequence[float]) -> list[Row]:
    """Returns the ends of the dtypes' ranges that are within six powers of ten of the values."""
    marks: list[Row] = []
    for one in view.dtype_ranges:
        ends = ((one.largest, "largest"), (one.smallest, "smallest normal"))
        for value, what in ends:
            log = math.log10(value)
            if min(values) - 6 < log < max(values) + 6:
                marks.append({"value": log, "label": f"{what} {one.name}: {number(value)}"})
    return marks


def _described(chart: Chart, text: str) -> Chart:
    chart.description = text
    return chart
