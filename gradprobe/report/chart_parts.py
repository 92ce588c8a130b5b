"""Parts shared by all charts: sizes, theme, lines over depth with labels at their ends, SVG, PNG and PDF output."""

from __future__ import annotations

import math
import struct
import textwrap
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import altair as alt
import vl_convert

from gradprobe.errors import printable
from gradprobe.report.label_places import Label, label_heights
from gradprobe.report.palette import BACKGROUND, FAINT, GRID, INK
from gradprobe.report.summary import NetSummary

FONT = "Inter, Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"

# Liberation Sans lacks most superscripts, which images would show in any other font that has them.
_POWER_FONT = FONT.replace("Liberation Sans", "DejaVu Sans, Liberation Sans").replace("Arial, ", "")

PNG_SCALE = 2.0
_LEGEND_OFFSET = 18.0  # Vega's default
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Room for a font wider than the one that the text was measured in.
_PADDING = {"left": 14, "top": 4, "right": 24, "bottom": 4}
_LABEL_LENGTH = 24  # characters; a longer name loses its middle, but the tooltips have all of it

Row = dict[str, Any]
Chart: TypeAlias = alt.HConcatChart | alt.VConcatChart


@dataclass(frozen=True)
class Size:
    """Size of each panel in pixels; `stacked` puts panels one above the other."""

    width: int
    height: int
    stacked: bool


WIDE = Size(width=370, height=270, stacked=False)
THIRDS = Size(width=205, height=220, stacked=False)
NARROW = Size(width=240, height=220, stacked=True)


def title_lines(title: str, size: Size) -> list[str]:
    """Breaks the title of a panel so that it is no wider than the panel."""
    return textwrap.wrap(title, max(16, size.width // 8))


class ChartData:
    """The rows of one chart by name, so that the chart holds them once and altair does not copy them at each step.

    Texts are made printable.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}

    def add(self, rows: Sequence[Row]) -> alt.NamedData:
        """Adds rows and returns the reference to them for a layer of the chart."""
        name = f"rows-{len(self.rows)}"
        self.rows[name] = [
            {key: printable(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows
        ]
        return alt.NamedData(name=name)


def svg(chart: Chart) -> str:
    """Renders the chart as an SVG document, without network access."""
    drawn: str = vl_convert.vegalite_to_svg(_spec(chart))
    return drawn


def png(chart: Chart) -> bytes:
    """Renders the chart as a PNG image, without network access."""
    drawn: bytes = vl_convert.vegalite_to_png(_spec(chart), scale=PNG_SCALE)
    return _deflated(drawn)


def _deflated(image: bytes) -> bytes:
    """Compresses a PNG image as far as zlib can, which leaves about a quarter of a heatmap."""
    chunks: list[tuple[bytes, bytes]] = []
    place = len(_PNG_SIGNATURE)
    while place < len(image):
        length, kind = struct.unpack_from(">I4s", image, place)
        chunks.append((kind, image[place + 8 : place + 8 + length]))
        place += length + 12
    pixels = zlib.compress(zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT")), 9)
    others = [(kind, body) for kind, body in chunks if kind != b"IDAT"]
    written = [*others[:-1], (b"IDAT", pixels), others[-1]]
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in written
    )


def pdf(chart: Chart) -> bytes:
    """Renders the chart as a PDF document, without network access."""
    drawn: bytes = vl_convert.vegalite_to_pdf(_spec(chart))
    return drawn


def _spec(chart: Chart) -> dict[str, Any]:
    """Returns the chart for the renderer; neither the chart nor its rows, which may be many, are checked or copied."""
    bare = chart.copy(deep=False)
    rows, bare.datasets = bare.datasets, alt.Undefined
    return {**bare.to_dict(validate=False), "datasets": rows}


def concat(panels: Sequence[alt.LayerChart], size: Size, data: ChartData) -> Chart:
    """Joins panels, side by side or stacked, into a chart with the theme that all charts share."""
    chart: Chart
    if size.stacked:
        chart = alt.vconcat(*panels, spacing=28, datasets=data.rows)
    else:
        chart = alt.hconcat(*panels, spacing=44, datasets=data.rows)
    text = {"labelColor": FAINT, "titleColor": FAINT, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
    lines = {"gridColor": GRID, "domainColor": FAINT, "tickColor": FAINT, "domain": False, "ticks": False}
    styled: Chart = (
        chart.configure(font=FONT, background=BACKGROUND, padding=_PADDING)
        .configure_view(stroke=None)
        .configure_axis(**text, **lines, labelPadding=6, titlePadding=8)
        .configure_axisX(domain=True, ticks=True, tickSize=4, labelPadding=3)
        .configure_legend(**text, titleLimit=400, labelLimit=300)
        .configure_title(anchor="start", frame="group", fontSize=13, fontWeight=600, color=INK, offset=12)
    )
    return styled


def line_rows(
    net: NetSummary, colour: str, label_colour: str, places: Sequence[Row | None], first: int = 1
) -> list[Row]:
    """Makes the rows of one network's line.

    Args:
        net: The network.
        colour: Colour of the line.
        label_colour: Colour of its name.
        places: For each position, `value`, the `low` and `high` of its band, and `note`, the tooltip;
            None leaves a gap.
        first: The first position.

    Returns:
        Rows for `lines_panel`; `segment` changes at each gap.
    """
    rows: list[Row] = []
    gaps = 0
    for position, place in enumerate(places, start=first):
        if place is None:
            gaps += 1
            continue
        shared = {"net": net.name, "family": net.family, "depth": net.depth}
        colours = {"colour": colour, "label_colour": label_colour}
        rows.append({**shared, **colours, "position": position, "segment": f"{net.name} {gaps}", **place})
    return rows


def lines_panel(
    title: str | Sequence[str],
    rows: Sequence[Row],
    n_places: int,
    x_title: str,
    y_axis: alt.Axis,
    y_domain: tuple[float, float],
    size: Size,
    data: ChartData,
) -> alt.LayerChart:
    """Draws lines over a network's depth, from input to output, each with its band and its name.

    Args:
        title: Title of the panel.
        rows: Rows of all lines, from `line_rows`.
        n_places: Number of positions on the depth axis.
        x_title: What one position is, e.g. "weight layer".
        y_axis: Axis of the values.
        y_domain: Range of the values.
        size: Size of the panel.
        data: The chart's data, to which the rows are added.

    Returns:
        The panel.
    """
    axis = alt.Axis(values=_depth_ticks(n_places), format="d", grid=False, title=f"{x_title}, from input to output")
    return named_lines_panel(title, rows, (1, max(n_places, 2)), axis, y_axis, y_domain, size, data)


def named_lines_panel(
    title: str | Sequence[str],
    rows: Sequence[Row],
    x_domain: tuple[int, int],
    x_axis: alt.Axis,
    y_axis: alt.Axis,
    y_domain: tuple[float, float],
    size: Size,
    data: ChartData,
    note_every: int = 1,
    clip: bool = False,
) -> alt.LayerChart:
    """Draws lines, each with its band and with its name at its end.

    Args:
        title: Title of the panel.
        rows: Rows of all lines, from `line_rows`.
        x_domain: Range of the positions.
        x_axis: Axis of the positions.
        y_axis: Axis of the values.
        y_domain: Range of the values.
        size: Size of the panel.
        data: The chart's data, to which the rows are added.
        note_every: One of so many positions can be pointed at.
        clip: Cut what is above the range of the values.

    Returns:
        The panel.
    """
    low, high = y_domain

    def pixel(row: Row) -> tuple[float, float]:
        x_px = size.width * (row["position"] - x_domain[0]) / (x_domain[1] - x_domain[0])
        return x_px, size.height * (high - row["value"]) / (high - low)

    ends_of_lines = {row["net"]: row for row in rows}.values()
    labels = []
    for row in ends_of_lines:
        x_px, y_px = pixel(row)
        # A line that ends above the range of the values leaves the panel at its top.
        labels.append(Label(row["net"], row["label_colour"], row["position"], x_px, max(0.0, y_px)))
    x = alt.X("position:Q", scale=alt.Scale(domain=list(x_domain), nice=False), axis=x_axis)
    y_scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    y = alt.Y("value:Q", scale=y_scale, axis=y_axis)
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data.add(rows)).encode(x=x, color=colour, detail="segment:N")
    lengths = Counter(row["segment"] for row in rows)
    alone = [row for row in rows if lengths[row["segment"]] == 1 and row["value"] <= high]
    layers: list[alt.Chart] = []
    if any(row["low"] < row["high"] for row in rows):
        area = alt.Chart(base.data).mark_area(opacity=0.16, clip=clip, aria=False)
        band = area.encode(x=x, fill=alt.Fill("colour:N", scale=None))
        layers.append(band.encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q", detail="segment:N"))
    layers.append(base.mark_line(strokeWidth=1.8, clip=clip, aria=False).encode(y=y))
    # Invisible: they carry the text for tooltips and screen readers.
    points = base
    if note_every > 1 or clip:
        noted = [row for row in rows if row["position"] % note_every == 0 and row["value"] <= high]
        points = alt.Chart(data.add(noted)).encode(x=x, color=colour)
    layers.append(points.mark_point(filled=True, size=40, opacity=0).encode(y=y, description="note:N"))
    if alone:
        dots = alt.Chart(data.add(alone)).mark_point(filled=True, size=36, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour))
    layers.extend(label_layers(labels, x, y, y_domain, 6, size, data, [pixel(row) for row in rows]))
    return alt.LayerChart(
        layer=layers, width=size.width, height=size.height, title=title if isinstance(title, str) else list(title)
    )


def _depth_ticks(n_places: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if n_places / step <= 8)
    return [1, *range(step, n_places + 1, step)] if step > 1 else list(range(1, n_places + 1))


def label_layers(
    labels: Sequence[Label],
    x: alt.X,
    y: alt.Y,
    y_domain: tuple[float, float],
    gap_px: float,
    size: Size,
    data: ChartData,
    obstacles: Sequence[tuple[float, float]] = (),
) -> list[alt.Chart]:
    """Writes a label at the end of each line, over a halo in the background colour.

    Args:
        labels: The labels; each moves up or down until it is legible.
        x: Horizontal encoding of the lines.
        y: Vertical encoding of the lines.
        y_domain: Range of the vertical axis.
        gap_px: Distance from the end of a line to its label.
        size: Size of the panel.
        data: The chart's data, to which the labels are added.
        obstacles: Points of lines to keep clear of, in pixels from the panel's upper left corner.

    Returns:
        Layers for the panel.
    """
    x_field, y_field = (channel.shorthand.split(":")[0] for channel in (x, y))
    bottom, top = y_domain
    rows = [
        {
            x_field: label.x,
            y_field: top - y_px / size.height * (top - bottom),
            "label": printable(label.text, _LABEL_LENGTH),
            "colour": label.colour,
        }
        for label, y_px in zip(labels, label_heights(labels, size.height, obstacles), strict=True)
    ]
    base = alt.Chart(data.add(rows)).encode(x=x, y=y, text="label:N")
    style: dict[str, Any] = {"align": "left", "baseline": "middle", "dx": gap_px, "fontSize": 12, "fontWeight": 600}
    halo = base.mark_text(**style, stroke=BACKGROUND, strokeWidth=4, color=BACKGROUND, aria=False)
    return [halo, base.mark_text(**style).encode(color=alt.Color("colour:N", scale=None), description="label:N")]


def power_axis(domain: tuple[float, float]) -> alt.Axis:
    """Makes an axis of log10 values that is labelled with the powers, with at most seven ticks at whole powers.

    Args:
        domain: Range of the values.
    """
    first, last = math.ceil(domain[0]), math.floor(domain[1])
    factors = (1, 2, 5) if last - first < 2 else (1,)
    powers = range(first - (last - first < 2), last + 1, max(1, math.ceil((last - first + 1) / 7)))
    names = {math.log10(factor) + power: _power_name(factor, power) for power in powers for factor in factors}
    return alt.Axis(title=None, values=list(names), labelExpr=_spelled(names), labelFont=_POWER_FONT)


def power_legend(domain: tuple[float, float], title: str, length: int, room: float = 0.0) -> alt.Legend:
    """Makes a legend of log10 values above the chart, as a gradient that is labelled with powers.

    Args:
        domain: Range of the values.
        title: Title of the legend.
        length: Length in pixels.
        room: Pixels to leave free below, in addition to the usual ones.
    """
    first, last = math.ceil(domain[0]), math.floor(domain[1])
    powers = range(first, last + 1, max(1, math.ceil((last - first + 1) / max(2, length // 45))))
    names = {float(power): _power_name(1, power) for power in powers} or {domain[0]: f"{10 ** domain[0]:.2g}"}
    return alt.Legend(
        title=title,
        orient="top",
        gradientLength=length,
        offset=_LEGEND_OFFSET + room,
        values=list(names),
        labelExpr=_spelled(names),
        labelFont=_POWER_FONT,
    )


def _spelled(names: Mapping[float, str]) -> str:
    cases = " : ".join(f"abs(datum.value - ({value})) < 1e-6 ? '{name}'" for value, name in names.items())
    return f"{cases} : ''"


def _power_name(factor: int, power: int) -> str:
    if -2 <= power <= 3:
        return f"{factor * 10.0**power:g}"
    superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if factor == 1 else f'{factor}×'}10{superscript}"
