"""The chart of `gradprobe remedies`: the gradient's factor per layer for every remedy, compared with theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import altair as alt

from gradprobe.errors import ArgumentError
from gradprobe.report.chart_parts import Chart, ChartData, Row, Size, concat, png, svg
from gradprobe.report.page_template import document
from gradprobe.report.palette import FAINT, INK, shades
from gradprobe.report.records import RemedyCell
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.text.markup import escape
from gradprobe.text.words import number

SUFFIXES = (".html", ".svg", ".png")

_ROW_PX = 22
_TITLE = "Factor per layer on the gradient norm, towards the input, at initialisation"
_CAPTION = (
    "One point per depth: filled if the loss fell for every seed in a short training, open if not. Below 1 the "
    "gradient shrinks towards the input, above 1 it grows. A short line is the prediction for plain fully connected "
    "networks of wide layers and groups. A network without a point has a zero or non-finite norm, or too few layers "
    "to fit a line."
)


def remedy_chart(cells: Sequence[RemedyCell], n_seeds: int) -> Chart | None:
    """Draws the factor per layer: one panel per activation, one row per remedy, one shade per depth.

    Args:
        cells: The measured networks.
        n_seeds: Number of seeds of each.

    Returns:
        The chart, or None if no cell has a positive finite factor.
    """
    drawn = [cell for cell in cells if math.isfinite(cell.factor) and cell.factor > 0]
    if not drawn:
        return None
    remedies = list(dict.fromkeys(cell.remedy for cell in cells))
    depths = sorted({cell.depth for cell in cells})
    colours = dict(zip(depths, shades(len(depths)), strict=True))
    legend = alt.Legend(
        title="layers",
        orient="bottom",
        symbolType="circle",
        symbolFillColor="transparent",
        labelFontSize=12,
        titleFontSize=12,
    )
    shade = alt.Scale(domain=depths, range=list(colours.values()))
    factors = [value for cell in drawn for value in (cell.factor, cell.theory or 1.0)]
    domain = [0.9 * min(*factors, 1.0), 1.1 * max(*factors, 1.0)]
    size = Size(width=230, height=_ROW_PX * len(remedies), stacked=False)
    data = ChartData()
    panels: list[alt.LayerChart] = []
    for activation in dict.fromkeys(cell.activation for cell in drawn):
        rows: list[Row] = [
            {
                "remedy": cell.remedy,
                "factor": cell.factor,
                "theory": cell.theory,
                "depth": cell.depth,
                "fill": colours[cell.depth] if cell.n_fell == n_seeds else "transparent",
                "note": f"{cell.remedy}, {activation}, {cell.depth} layers: {number(cell.factor)} per layer; the loss "
                f"fell for {cell.n_fell} of {n_seeds} seeds",
            }
            for cell in drawn
            if cell.activation == activation
        ]
        x_scale = alt.Scale(type="log", domain=domain, nice=False)
        x_axis = alt.Axis(title=None, values=_ticks(domain), format="~g")
        y_axis = alt.Axis(title=None, grid=True, labelLimit=200, labels=not panels)
        y = alt.Y("remedy:N", sort=remedies, scale=alt.Scale(domain=remedies), axis=y_axis)
        x = alt.X("factor:Q", scale=x_scale, axis=x_axis)
        base = alt.Chart(data.add(rows)).encode(y=y)
        one = alt.Chart(data.add([{"factor": 1.0}])).mark_rule(color=FAINT, strokeWidth=1).encode(x=x)
        theory = [row for row in rows if row["theory"] is not None]
        tick = alt.Chart(data.add(theory)).mark_tick(color=INK, thickness=1.5, size=14)
        points = base.mark_point(size=60, strokeWidth=1.6, opacity=1).encode(
            x=x,
            stroke=alt.Stroke("depth:O", scale=shade, legend=legend),
            fill=alt.Fill("fill:N", scale=None),
            description="note:N",
        )
        layers = [one, tick.encode(x=alt.X("theory:Q", scale=x_scale, axis=x_axis), y=y), points]
        panels.append(alt.LayerChart(layer=layers, width=size.width, height=size.height, title=activation))
    meaning = "filled: the loss fell for every seed"
    if any(cell.theory is not None for cell in drawn):
        meaning += "; tick: theory"
    title = alt.TitleParams(_TITLE, subtitle=meaning, subtitleColor=FAINT)
    titled: Chart = concat(panels, size, data).properties(title=title)
    return titled


def check_suffix(path: Path) -> None:
    """Rejects a file name that `write_remedies` cannot write, before anything is measured.

    Raises:
        ArgumentError: The name ends in none of `SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"--chart: needed a file that ends in {', '.join(SUFFIXES)}, got {str(path)!r}")


def write_remedies(cells: Sequence[RemedyCell], n_seeds: int, conclusions: Sequence[str], path: Path) -> Path:
    """Writes the chart; as a page, with the conclusions.

    Args:
        cells: The measured networks.
        n_seeds: Number of seeds of each.
        conclusions: Sentences for the page.
        path: A file that ends in .html, .svg or .png; missing folders are created, an existing file is replaced.

    Returns:
        The path written.

    Raises:
        ArgumentError: The name ends in something else, or there is nothing to draw.
        StoreError: The file cannot be written.
    """
    check_suffix(path)
    chart = remedy_chart(cells, n_seeds)
    if chart is None:
        raise ArgumentError("--chart: needed at least one network with a finite factor per layer; use more layers")
    create_folder(path.parent)
    if path.suffix == ".png":
        write_files({path: [png(chart)]})
    else:
        write_files({path: [svg(chart) if path.suffix == ".svg" else _page(chart, conclusions)]})
    return path


def _page(chart: Chart, conclusions: Sequence[str]) -> str:
    sentences = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in conclusions)
    figure = f"<figure>{svg(chart)}\n<figcaption>{escape(_CAPTION)}</figcaption></figure>"
    return document("Remedies", ":root { color-scheme: light; }", f"{sentences}\n{figure}")


def _ticks(domain: Sequence[float]) -> list[float]:
    return [value for value in (1e-3, 1e-2, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100) if domain[0] <= value <= domain[1]]
