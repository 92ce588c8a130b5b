"""The two pictures of a sweep: error against depth, and the gradient's norm layer by layer."""

from __future__ import annotations

import math
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

_PNG_SCALE = 2.0
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
    """A line's direct label: at data point (x, y), with the pixels of that point for keeping labels apart."""

    text: str
    colour: str
    x: float
    y: float
    x_px: float
    y_px: float


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
    panels = [_error_panel(title, points, y_domain, palette, size) for title, points in drawn]
    return _concat(panels, size)


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
    norms = [row[key] for _, nets in panels for rows in nets for row in rows for key in ("low", "high")]
    if not norms:
        return None
    low, high = math.log10(min(norms)), math.log10(max(norms))
    # More room below than above: labels of shallow nets go under the deeper nets' lines.
    y_domain = (10 ** (low - max(0.14 * (high - low), 0.3)), 10 ** (high + max(0.05 * (high - low), 0.15)))
    layers = max(row["position"] for _, nets in panels for rows in nets for row in rows)
    drawn = [_gradient_panel(title, nets, layers, y_domain, palette, size) for title, nets in panels if any(nets)]
    return _concat(drawn, size)


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
    drawn: str = vl_convert.vegalite_to_svg(chart.to_json())
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
                (folder / name).write_bytes(vl_convert.vegalite_to_png(chart.to_json(), scale=_PNG_SCALE))
                written.append(folder / name)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write the charts: {error}") from error
    return written


def _error_panel(
    title: str, points: Sequence[tuple[NetSummary, Spread]], y_domain: tuple[float, float], palette: Palette, size: Size
) -> alt.LayerChart:
    depths = sorted({net.depth for net, _ in points})
    logarithmic = bool(depths) and depths[-1] > 8 * depths[0]
    margin = 1.15 if logarithmic else max(0.06 * (depths[-1] - depths[0]), 1) if depths else 0
    ends = (min(depths, default=0), max(depths, default=1))
    x_domain = (ends[0] / margin, ends[1] * margin) if logarithmic else (ends[0] - margin, ends[1] + margin)
    x_scale = alt.Scale(type="log" if logarithmic else "linear", domain=list(x_domain), nice=False)
    axis = alt.Axis(values=depths, format="d", grid=False, title="depth, weight layers", labelOverlap="greedy")
    x = alt.X("depth:Q", scale=x_scale, axis=axis)
    y_scale = alt.Scale(domain=list(y_domain), nice=False)
    y = alt.Y("error:Q", scale=y_scale, axis=alt.Axis(title=None, tickCount=5))
    means: list[Row] = []
    seeds: list[Row] = []
    labels: list[_Label] = []
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
    for row in {row["family"]: row for row in means}.values():
        left, here, right = (math.log(v) if logarithmic else v for v in (x_domain[0], row["depth"], x_domain[1]))
        pixel = (size.width * (here - left) / (right - left), size.height * (1 - row["error"] / y_domain[1]))
        labels.append(_Label(row["family"], row["colour"], row["depth"], row["error"], *pixel))
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(alt.InlineData(values=means)).encode(x=x, color=colour)
    line = base.mark_line(strokeWidth=2).encode(y=y, detail="family:N")
    bar = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q")
    dot = base.mark_point(filled=True, size=52, opacity=1).encode(y=y, description="note:N")
    each = alt.Chart(alt.InlineData(values=seeds)).mark_point(size=22, opacity=0.55, strokeWidth=1.2)
    each = each.encode(x=x, y=y, color=colour, description="note:N")
    layers = [line, bar, *([each] if seeds else []), dot, *_label_layers(labels, x, "error", y_scale, 10, size)]
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title)


def _profile(net: NetSummary, moment: Moment) -> list[Row]:
    """The drawable layers of one net at one moment; `segment` counts up at each gap."""
    rows: list[Row] = []
    segment = 0
    for place, layers in enumerate(zip(*moment.profiles, strict=True), start=1):
        norms = [layer.norm_l2 for layer in layers]
        if not all(math.isfinite(norm) and norm > 0 for norm in norms):
            segment += 1
            continue
        norm = median(norms)
        note = f"{net.name}, layer {place} of {len(moment.profiles[0])}, {layers[0].site}: norm {number(norm)}"
        rows.append(
            {
                "net": net.name,
                "family": net.family,
                "depth": net.depth,
                "position": place,
                "norm": norm,
                "low": min(norms),
                "high": max(norms),
                "segment": f"{net.name} {segment}",
                "note": note,
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
) -> alt.LayerChart:
    rows = [{**row, "colour": palette.net(row["family"], row["depth"])} for profile in nets for row in profile]
    x_scale = alt.Scale(domain=[1, max(n_layers, 2)], nice=False)
    x_axis = alt.Axis(values=_layer_ticks(n_layers), format="d", grid=False, title="weight layer, from input to output")
    x = alt.X("position:Q", scale=x_scale, axis=x_axis)
    y_scale = alt.Scale(type="log", domain=list(y_domain), nice=False)
    y = alt.Y("norm:Q", scale=y_scale, axis=_power_axis(y_domain))
    low, high = (math.log10(end) for end in y_domain)

    def pixel(row: Row) -> tuple[float, float]:
        x_px = size.width * (row["position"] - 1) / max(n_layers - 1, 1)
        return x_px, size.height * (high - math.log10(row["norm"])) / (high - low)

    ends_of_lines = {row["net"]: row for row in rows}.values()
    labels = [_Label(row["net"], row["colour"], row["position"], row["norm"], *pixel(row)) for row in ends_of_lines]
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, color=colour, detail="segment:N")
    line = base.mark_line(strokeWidth=1.8).encode(y=y)
    spread = [row for row in rows if row["low"] < row["high"]]
    lengths = {row["segment"]: sum(other["segment"] == row["segment"] for other in rows) for row in rows}
    alone = [row for row in rows if lengths[row["segment"]] == 1]
    # Invisible, but they carry what a pointer or a screen reader gets to know of each layer.
    touch = base.mark_point(filled=True, size=40, opacity=0).encode(y=y, description="note:N")
    layers: list[alt.Chart] = [line, touch]
    if spread:
        band = alt.Chart(alt.InlineData(values=rows)).mark_area(opacity=0.16)
        ends = {"y": alt.Y("low:Q", scale=y_scale), "y2": "high:Q"}
        layers.insert(0, band.encode(x=x, fill=alt.Fill("colour:N", scale=None), detail="segment:N", **ends))
    if alone:
        dots = alt.Chart(alt.InlineData(values=alone)).mark_point(filled=True, size=36, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour))
    layers.extend(_label_layers(labels, x, "norm", y_scale, 6, size, [pixel(row) for row in rows]))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title)


def _label_layers(
    labels: Sequence[_Label],
    x: alt.X,
    field: str,
    y_scale: alt.Scale,
    gap_px: float,
    size: Size,
    obstacles: Sequence[tuple[float, float]] = (),
) -> list[alt.Chart]:
    """Text beside the end of each line, over a halo in the page's colour, moved up or down to where it can be read."""
    layers: list[alt.Chart] = []
    for label, y_px in zip(labels, _apart(labels, size.height, obstacles), strict=True):
        data = alt.InlineData(values=[{x.shorthand.split(":")[0]: label.x, field: label.y, "label": label.text}])
        place: dict[str, Any] = {
            "align": "left",
            "baseline": "middle",
            "dx": gap_px,
            "dy": y_px - label.y_px,
            "fontSize": 12,
        }
        base = alt.Chart(data).encode(x=x, y=alt.Y(f"{field}:Q", scale=y_scale), text="label:N")
        layers.append(base.mark_text(**place, fontWeight=600, stroke=PAPER, strokeWidth=4, color=PAPER, aria=False))
        layers.append(base.mark_text(**place, fontWeight=600, color=label.colour))
    return layers


def _apart(labels: Sequence[_Label], height: float, obstacles: Sequence[tuple[float, float]]) -> list[float]:
    """Vertical pixel of each label: the nearest to its line's end that is clear of lines and of earlier labels."""
    taken: list[tuple[float, float]] = []
    places: dict[int, float] = {}
    for index in sorted(range(len(labels)), key=lambda index: (labels[index].y_px, index)):
        label = labels[index]
        in_the_way = [y for x, y in obstacles if 0 < x - label.x_px < _LABEL_WIDTH_PX]
        others = [y for x, y in taken if abs(x - label.x_px) < _LABEL_WIDTH_PX]
        offsets = sorted((float(offset) for offset in range(-round(height), round(height) + 1)), key=abs)
        places[index] = next(
            (
                y
                for y in (label.y_px + offset for offset in offsets)
                if 0 <= y <= height
                and all(abs(y - other) >= _LABEL_PX for other in others)
                and all(abs(y - line) >= _LABEL_PX / 2 + 2 for line in in_the_way)
            ),
            label.y_px,
        )
        taken.append((label.x_px, places[index]))
    return [places[index] for index in range(len(labels))]


def _layer_ticks(n_layers: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if n_layers / step <= 8)
    return [1, *range(step, n_layers + 1, step)] if step > 1 else list(range(1, n_layers + 1))


def _power_axis(domain: tuple[float, float]) -> alt.Axis:
    """Log axis with a tick at whole powers of ten, at most seven of them, in the reader's notation."""
    first, last = math.ceil(math.log10(domain[0])), math.floor(math.log10(domain[1]))
    step = max(1, math.ceil((last - first + 1) / 7))
    powers = list(range(first, last + 1, step))
    if len(powers) < 2:
        return alt.Axis(title=None, tickCount=4, format="~g")
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    names = {p: f"{10.0**p:g}" if -2 <= p <= 3 else "10" + str(p).translate(superscript) for p in powers}
    cases = " : ".join(f"abs(datum.value / 1e{power} - 1) < 0.01 ? '{name}'" for power, name in names.items())
    return alt.Axis(title=None, values=[10.0**power for power in powers], labelExpr=f"{cases} : ''")


def _concat(panels: Sequence[alt.LayerChart], size: Size) -> Chart:
    chart: Chart = alt.vconcat(*panels, spacing=28) if size.stacked else alt.hconcat(*panels, spacing=44)
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
