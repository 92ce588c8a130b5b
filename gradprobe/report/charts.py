"""The two pictures of a sweep: error against depth, and the gradient's norm layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import vl_convert

from gradprobe.errors import StoreError
from gradprobe.report.palette import FAINT, GRID, INK, PAPER, Palette
from gradprobe.report.rows import SweepRun
from gradprobe.report.summary import Moment, NetSummary, Spread, Summary, median, summarise
from gradprobe.report.words import number

FONT = "Inter, Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"

PNG_SCALE = 2.0
_LABEL_PX = 13.0  # Vertical room of one direct label.
_LABEL_WIDTH_PX = 66.0

Row = dict[str, Any]
Chart: TypeAlias = alt.HConcatChart | alt.VConcatChart


@dataclass(frozen=True)
class Size:
    """Size of a chart's two panels in pixels; `stacked` puts them one above the other."""

    width: int
    height: int
    stacked: bool


WIDE = Size(width=370, height=270, stacked=False)
NARROW = Size(width=240, height=220, stacked=True)


@dataclass(frozen=True)
class _Label:
    """A direct label, to stand right of its line's end (x_px, y_px); pixels from the panel's upper left corner."""

    text: str
    colour: str
    x: float
    x_px: float
    y_px: float


class ChartData:
    """The rows of one chart by name: they are in the chart once, and altair does not copy them at each step."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}

    def add(self, rows: Sequence[Row]) -> alt.NamedData:
        """Keeps rows, and gives what a layer of the chart finds them by."""
        name = f"rows-{len(self.rows)}"
        self.rows[name] = list(rows)
        return alt.NamedData(name=name)


def error_chart(summary: Summary, size: Size = WIDE) -> Chart | None:
    """Draws training and test error against depth, a line for each family.

    Each seed is a faint point, the line joins the means, a bar spans one standard deviation to each side.

    Args:
        summary: The sweep.
        size: Size of each of the two panels.

    Returns:
        The chart, or None where no finite error is recorded.
    """
    palette = Palette(summary)
    splits = [
        ("Training error, %", [(net, net.train_error_pct) for net in summary.nets]),
        ("Test error, %", [(net, net.test_error_pct) for net in summary.nets]),
    ]
    drawn = [(title, [(net, s) for net, s in points if s and math.isfinite(s.mean)]) for title, points in splits]
    spreads = [spread for _, points in drawn for _, spread in points]
    if not spreads:
        return None
    # One scale for both panels: the distance from training to test error is part of the story.
    top = max(max(*spread.values, spread.mean + (spread.std or 0.0)) for spread in spreads)
    y_domain = (0.0, min(100.0, 1.08 * top) if top > 0 else 1.0)
    data = ChartData()
    panels = [_error_panel(title, points, y_domain, palette, size, data) for title, points in drawn]
    return concat(panels, size, data)


def gradient_chart(summary: Summary, size: Size = WIDE) -> Chart | None:
    """Draws the gradient's norm over depth, at the first step and at the end, a line for each net, on a log scale.

    The line is the median over seeds and the band their range. A layer whose norm is zero, NaN or infinite is a gap.

    Args:
        summary: The sweep.
        size: Size of each of the two panels.

    Returns:
        The chart, or None where no positive finite norm is recorded.
    """
    palette = Palette(summary)
    ends = sorted({net.end.epoch for net in summary.nets if net.end is not None})
    at_end = "at the end" if len(ends) != 1 else f"at epoch {ends[0]}"
    sides = [
        ("Gradient norm at the first step", [(net, net.initial) for net in summary.nets]),
        (f"Gradient norm {at_end}", [(net, net.end) for net in summary.nets]),
    ]
    panels = [(title, [_profile(net, moment) for net, moment in nets if moment is not None]) for title, nets in sides]
    exponents = [row[key] for _, nets in panels for rows in nets for row in rows for key in ("low", "high")]
    if not exponents:
        return None
    low, high = min(exponents), max(exponents)
    # More room below than above: labels of shallow nets go under the deeper nets' lines.
    y_domain = (low - max(0.14 * (high - low), 0.3), high + max(0.05 * (high - low), 0.15))
    layers = max(row["position"] for _, nets in panels for rows in nets for row in rows)
    data = ChartData()
    drawn = [_gradient_panel(title, nets, layers, y_domain, palette, size, data) for title, nets in panels if any(nets)]
    return concat(drawn, size, data)


def hidden_layers(summary: Summary) -> list[str]:
    """Names what `gradient_chart` cannot show, by net and moment, as in "plain-56 at epoch 3: 4 layers".

    Args:
        summary: The sweep.

    Returns:
        The phrases; empty when every layer of every net is drawn.
    """
    phrases: list[str] = []
    for net in summary.nets:
        for moment in (net.initial, net.end):
            if moment is not None:
                hidden = len(moment.profiles[0]) - len(_profile(net, moment))
                if hidden:
                    phrases.append(f"{net.name} at {moment.when}: {hidden} layer{'s' if hidden > 1 else ''}")
    return phrases


def svg(chart: Chart) -> str:
    """The chart as an SVG document, drawn without network access."""
    drawn: str = vl_convert.vegalite_to_svg(chart.to_dict())
    return drawn


def png(chart: Chart) -> bytes:
    """The chart as a picture, drawn without network access."""
    drawn: bytes = vl_convert.vegalite_to_png(chart.to_dict(), scale=PNG_SCALE)
    return drawn


def write_png(run: SweepRun, folder: str | Path) -> list[Path]:
    """Draws both charts as pictures, `error.png` and `gradient.png`.

    Args:
        run: The recorded sweep, finished or not.
        folder: Where to; made if missing.

    Returns:
        The files written: a chart with nothing to draw yet is left out.

    Raises:
        StoreError: The folder or a file in it cannot be written.
    """
    summary = summarise(run)
    folder = Path(folder)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, chart in (("error.png", error_chart(summary)), ("gradient.png", gradient_chart(summary))):
            if chart is not None:
                (folder / name).write_bytes(png(chart))
                written.append(folder / name)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write the charts: {error}") from error
    return written


def _error_panel(
    title: str,
    points: Sequence[tuple[NetSummary, Spread]],
    y_domain: tuple[float, float],
    palette: Palette,
    size: Size,
    data: ChartData,
) -> alt.LayerChart:
    depths = sorted({net.depth for net, _ in points})
    logarithmic = bool(depths) and depths[-1] > 8 * depths[0]
    margin = 1.15 if logarithmic else max(0.06 * (depths[-1] - depths[0]), 1) if depths else 0
    ends = (min(depths, default=0), max(depths, default=1))
    x_domain = (ends[0] / margin, ends[1] * margin) if logarithmic else (ends[0] - margin, ends[1] + margin)
    means: list[Row] = []
    seeds: list[Row] = []
    for net, spread in points:
        shared = {"family": net.family, "depth": net.depth, "colour": palette.family(net.family)}
        std = spread.std or 0.0
        note = f"{net.name}: {spread.mean:.2f} %" + (f" ± {std:.2f} ({len(spread.values)} seeds)" if spread.std else "")
        reach = {"low": max(0.0, spread.mean - std), "high": min(100.0, spread.mean + std)}
        means.append({**shared, "error": spread.mean, **reach, "note": note})
        if len(spread.values) > 1:
            for result, value in zip(net.counted, spread.values, strict=True):
                seed = f"{net.name}, seed {result.cell.seed}: {value:.2f} %"
                seeds.append({**shared, "error": value, "note": seed})
    labels: list[_Label] = []
    for row in {row["family"]: row for row in means}.values():
        left, here, right = (math.log(v) if logarithmic else v for v in (x_domain[0], row["depth"], x_domain[1]))
        pixel = (size.width * (here - left) / (right - left), size.height * (1 - row["error"] / y_domain[1]))
        labels.append(_Label(row["family"], row["colour"], row["depth"], *pixel))
    axis = alt.Axis(values=depths, format="d", grid=False, title="depth, weight layers", labelOverlap="greedy")
    x_scale = alt.Scale(type="log" if logarithmic else "linear", domain=list(x_domain), nice=False)
    x = alt.X("depth:Q", scale=x_scale, axis=axis)
    y_scale = alt.Scale(domain=list(y_domain), nice=False)
    y = alt.Y("error:Q", scale=y_scale, axis=alt.Axis(title=None, tickCount=5))
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data.add(means)).encode(x=x, color=colour)
    layers = [
        base.mark_line(strokeWidth=2).encode(y=y, detail="family:N"),
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q"),
    ]
    if seeds:
        circles = alt.Chart(data.add(seeds)).mark_point(size=22, opacity=0.55, strokeWidth=1.2)
        layers.append(circles.encode(x=x, y=y, color=colour, description="note:N"))
    layers.append(base.mark_point(filled=True, size=52, opacity=1).encode(y=y, description="note:N"))
    layers.extend(_label_layers(labels, x, y, y_domain, 10, size, data))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title)


def _profile(net: NetSummary, moment: Moment) -> list[Row]:
    """The drawable layers of one net at one moment, norms as powers of ten; `segment` counts up at each gap."""
    rows: list[Row] = []
    gaps = 0
    for place, layers in enumerate(zip(*moment.profiles, strict=True), start=1):
        norms = [layer.norm_l2 for layer in layers]
        if not all(math.isfinite(norm) and norm > 0 for norm in norms):
            gaps += 1
            continue
        norm = median(norms)
        name = f"{net.name}, layer {place} of {len(moment.profiles[0])}, {layers[0].site}"
        rows.append(
            {
                "net": net.name,
                "family": net.family,
                "depth": net.depth,
                "position": place,
                "norm": norm,
                "exponent": math.log10(norm),
                "low": math.log10(min(norms)),
                "high": math.log10(max(norms)),
                "segment": f"{net.name} {gaps}",
                "note": f"{name}: norm {number(norm)}",
            }
        )
    return rows


def _gradient_panel(
    title: str,
    nets: Sequence[Sequence[Row]],
    n_layers: int,
    y_domain: tuple[float, float],
    palette: Palette,
    size: Size,
    data: ChartData,
) -> alt.LayerChart:
    rows = [{**row, "colour": palette.net(row["family"], row["depth"])} for profile in nets for row in profile]
    low, high = y_domain

    def pixel(row: Row) -> tuple[float, float]:
        x_px = size.width * (row["position"] - 1) / max(n_layers - 1, 1)
        return x_px, size.height * (high - row["exponent"]) / (high - low)

    ends_of_lines = {row["net"]: row for row in rows}.values()
    labels = [_Label(row["net"], row["colour"], row["position"], *pixel(row)) for row in ends_of_lines]
    x_axis = alt.Axis(values=_layer_ticks(n_layers), format="d", grid=False, title="weight layer, from input to output")
    x = alt.X("position:Q", scale=alt.Scale(domain=[1, max(n_layers, 2)], nice=False), axis=x_axis)
    y_scale = alt.Scale(domain=list(y_domain), nice=False, zero=False)
    y = alt.Y("exponent:Q", scale=y_scale, axis=_power_axis(y_domain))
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(data.add(rows)).encode(x=x, color=colour, detail="segment:N")
    lengths = Counter(row["segment"] for row in rows)
    alone = [row for row in rows if lengths[row["segment"]] == 1]
    layers: list[alt.Chart] = []
    if any(row["low"] < row["high"] for row in rows):
        band = alt.Chart(base.data).mark_area(opacity=0.16).encode(x=x, fill=alt.Fill("colour:N", scale=None))
        layers.append(band.encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q", detail="segment:N"))
    layers.append(base.mark_line(strokeWidth=1.8).encode(y=y))
    # Invisible, but they carry what a pointer or a screen reader gets to know of each layer.
    layers.append(base.mark_point(filled=True, size=40, opacity=0).encode(y=y, description="note:N"))
    if alone:
        dots = alt.Chart(data.add(alone)).mark_point(filled=True, size=36, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour))
    layers.extend(_label_layers(labels, x, y, y_domain, 6, size, data, [pixel(row) for row in rows]))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title)


def _label_layers(
    labels: Sequence[_Label],
    x: alt.X,
    y: alt.Y,
    y_domain: tuple[float, float],
    gap_px: float,
    size: Size,
    data: ChartData,
    obstacles: Sequence[tuple[float, float]] = (),
) -> list[alt.Chart]:
    """Text beside the end of each line, over a halo in the page's colour, moved up or down to where it can be read."""
    x_field, y_field = (channel.shorthand.split(":")[0] for channel in (x, y))
    bottom, top = y_domain
    rows = [
        {
            x_field: label.x,
            y_field: top - y_px / size.height * (top - bottom),
            "label": label.text,
            "colour": label.colour,
        }
        for label, y_px in zip(labels, _apart(labels, size.height, obstacles), strict=True)
    ]
    base = alt.Chart(data.add(rows)).encode(x=x, y=y, text="label:N")
    style: dict[str, Any] = {"align": "left", "baseline": "middle", "dx": gap_px, "fontSize": 12, "fontWeight": 600}
    halo = base.mark_text(**style, stroke=PAPER, strokeWidth=4, color=PAPER, aria=False)
    return [halo, base.mark_text(**style).encode(color=alt.Color("colour:N", scale=None))]


def _apart(labels: Sequence[_Label], height: float, obstacles: Sequence[tuple[float, float]]) -> list[float]:
    """Vertical pixel of each label: the nearest to its line's end that is clear of lines and of earlier labels.

    Where no place is clear of both, labels keep clear of each other.
    """
    taken: list[tuple[float, float]] = []
    places: dict[int, float] = {}
    offsets = sorted(range(-round(height), round(height) + 1), key=abs)
    for index in sorted(range(len(labels)), key=lambda index: (labels[index].y_px, index)):
        label = labels[index]
        lines = [y for x, y in obstacles if 0 < x - label.x_px < _LABEL_WIDTH_PX]
        others = [y for x, y in taken if abs(x - label.x_px) < _LABEL_WIDTH_PX]
        # Half a label above the axis, so that it does not stand on it.
        inside = [y for y in (label.y_px + offset for offset in offsets) if 0 <= y <= height - _LABEL_PX / 2]
        apart = [y for y in inside if all(abs(y - other) >= _LABEL_PX for other in others)]
        clear = (y for y in apart if all(abs(y - line) >= _LABEL_PX / 2 + 2 for line in lines))
        places[index] = next(clear, next(iter(apart), label.y_px))
        taken.append((label.x_px, places[index]))
    return [places[index] for index in range(len(labels))]


def _layer_ticks(n_layers: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if n_layers / step <= 8)
    return [1, *range(step, n_layers + 1, step)] if step > 1 else list(range(1, n_layers + 1))


def _power_axis(domain: tuple[float, float]) -> alt.Axis:
    """Axis over exponents of ten that reads as a logarithmic one, with at most seven ticks at whole powers."""
    first, last = math.ceil(domain[0]), math.floor(domain[1])
    factors = (1, 2, 5) if last - first < 2 else (1,)
    powers = range(first - (last - first < 2), last + 1, max(1, math.ceil((last - first + 1) / 7)))
    names = {math.log10(factor) + power: _power_name(factor, power) for power in powers for factor in factors}
    cases = " : ".join(f"abs(datum.value - ({value})) < 1e-6 ? '{name}'" for value, name in names.items())
    return alt.Axis(title=None, values=list(names), labelExpr=f"{cases} : ''")


def _power_name(factor: int, power: int) -> str:
    if -2 <= power <= 3:
        return f"{factor * 10.0**power:g}"
    superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if factor == 1 else f'{factor}×'}10{superscript}"


def concat(panels: Sequence[alt.LayerChart], size: Size, data: ChartData) -> Chart:
    """Sets panels beside or above one another, in the look that all charts share.

    Args:
        panels: The panels.
        size: Size of each.
        data: The rows of all of them.

    Returns:
        The chart.
    """
    chart: Chart
    if size.stacked:
        chart = alt.vconcat(*panels, spacing=28, datasets=data.rows)
    else:
        chart = alt.hconcat(*panels, spacing=44, datasets=data.rows)
    axis = {"labelColor": FAINT, "titleColor": FAINT, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
    lines = {"gridColor": GRID, "domainColor": FAINT, "tickColor": FAINT, "domain": False, "ticks": False}
    styled: Chart = (
        chart.configure(font=FONT, background=PAPER, padding={"left": 4, "top": 4, "right": 8, "bottom": 4})
        .configure_view(stroke=None)
        .configure_axis(**axis, **lines, labelPadding=6, titlePadding=8)
        .configure_axisX(domain=True, ticks=True, tickSize=4, labelPadding=3)
        .configure_title(anchor="start", frame="group", fontSize=13, fontWeight=600, color=INK, offset=12)
    )
    return styled
