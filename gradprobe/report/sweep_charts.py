"""Charts of a sweep: error against depth and over the epochs, gradient norm by layer, and shortcut share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import altair as alt

from gradprobe.report.chart_parts import (
    THIRDS,
    WIDE,
    Chart,
    ChartData,
    Row,
    Size,
    concat,
    label_layers,
    line_rows,
    lines_panel,
    named_lines_panel,
    png,
    power_axis,
)
from gradprobe.report.label_places import Label
from gradprobe.report.palette import Palette
from gradprobe.report.profiles import GradientProfile, ShortcutProfile
from gradprobe.report.records import SweepRun
from gradprobe.report.seed_statistics import Spread, median
from gradprobe.report.summary import NetSummary, Summary, summarise
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.text.words import number

_MOST_NOTED_EPOCHS = 50  # of a line that can be pointed at
_BEGUN = 0.25  # share of the epochs from which on all errors are drawn
_CUT_BELOW = 0.7  # the errors before are cut off if those after are below this share of them


def error_chart(summary: Summary, size: Size = WIDE) -> Chart | None:
    """Draws training and test error against depth, one line per family.

    Each seed is a faint point, the line joins the means, and a bar spans one standard deviation to each side.

    Args:
        summary: The sweep.
        size: Size of each of the two panels.

    Returns:
        The chart, or None if no finite error is recorded.
    """
    palette = Palette(summary)
    splits = [
        (
            f"Training error{' (running)' if summary.has_running_errors else ''}, %",
            [(net, net.train_error_pct) for net in summary.nets],
        ),
        ("Test error, %", [(net, net.test_error_pct) for net in summary.nets]),
    ]
    drawn = [(title, [(net, s) for net, s in points if s and math.isfinite(s.mean)]) for title, points in splits]
    spreads = [spread for _, points in drawn for _, spread in points]
    if not spreads:
        return None
    # One scale for both panels, so that the distance from training to test error can be read.
    top = max(max(*spread.values, spread.mean + (spread.std or 0.0)) for spread in spreads)
    y_domain = (0.0, min(100.0, 1.08 * top) if top > 0 else 1.0)
    data = ChartData()
    panels = [_error_panel(title, points, y_domain, palette, size, data) for title, points in drawn]
    return concat(panels, size, data)


def curves_chart(summary: Summary, size: Size = WIDE) -> Chart | None:
    """Draws training and test error after each epoch, one line per network.

    The line is the mean over seeds and the band their range. An epoch in which a seed's error is not finite is a gap.
    As in He et al. 2015, figure 1, the large errors of the first epochs are cut off.

    Args:
        summary: The sweep.
        size: Size of each of the two panels.

    Returns:
        The chart, or None if no network has two epochs with finite errors.
    """
    palette = Palette(summary)
    is_running = draws_running_errors(summary)
    title = "Running training error, %" if is_running else "Training error, %"
    train = "any_running_error_pct" if is_running else "train_error_pct"
    panels = [
        (title, [row for net in summary.nets for row in _epoch_rows(net, train, palette)]),
        ("Test error, %", [row for net in summary.nets for row in _epoch_rows(net, "test_error_pct", palette)]),
    ]
    drawn = [(title, rows) for title, rows in panels if len({row["position"] for row in rows}) > 1]
    if not drawn:
        return None
    last = max(row["position"] for _, rows in drawn for row in rows)
    top = max(row["high"] for _, rows in drawn for row in rows)
    later = max((row["high"] for _, rows in drawn for row in rows if row["position"] >= _BEGUN * last), default=top)
    is_cut = 0 < later < _CUT_BELOW * top
    y_domain = (0.0, 1.15 * later if is_cut else min(100.0, 1.05 * top) if top > 0 else 1.0)
    x_axis = alt.Axis(title="epoch", format="d", grid=False, tickCount=max(3, size.width // 60), tickMinStep=1)
    y_axis = alt.Axis(title=None, tickCount=5)
    data, note_every = ChartData(), math.ceil(last / _MOST_NOTED_EPOCHS)
    return concat(
        [
            named_lines_panel(title, rows, (0, last), x_axis, y_axis, y_domain, size, data, note_every, clip=is_cut)
            for title, rows in drawn
        ],
        size,
        data,
    )


def draws_running_errors(summary: Summary) -> bool:
    """Returns whether the curves show running training errors, since some epochs have nothing else."""
    return any(row.is_running for net in summary.nets for result in net.counted for row in result.epochs.values())


def gradient_chart(summary: Summary, size: Size = WIDE) -> Chart | None:
    """Draws the gradient norm over depth at the first step and at the end, one line per network, on a log scale.

    The line is the median over seeds and the band their range. A layer whose norm is zero, NaN or infinite is a gap.

    Args:
        summary: The sweep.
        size: Size of each of the two panels.

    Returns:
        The chart, or None if no positive finite norm is recorded.
    """
    palette = Palette(summary)
    ends = sorted({net.end.epoch for net in summary.nets if net.end is not None})
    at_end = "at the end" if len(ends) != 1 else f"at epoch {ends[0]}"
    sides = [
        ("Gradient norm at the first step", [(net, net.initial) for net in summary.nets]),
        (f"Gradient norm {at_end}", [(net, net.end) for net in summary.nets]),
    ]
    panels = [
        (title, [row for net, profile in nets if profile for row in _layer_rows(net, profile, palette)])
        for title, nets in sides
    ]
    exponents = [row[key] for _, rows in panels for row in rows for key in ("low", "high")]
    if not exponents:
        return None
    low, high = min(exponents), max(exponents)
    # More room below than above: labels of shallow networks go under the lines of deeper ones.
    y_domain = (low - max(0.14 * (high - low), 0.3), high + max(0.05 * (high - low), 0.15))
    layers = max(row["position"] for _, rows in panels for row in rows)
    axis = power_axis(y_domain)
    data = ChartData()
    drawn = [
        lines_panel(title, rows, layers, "weight layer", axis, y_domain, size, data) for title, rows in panels if rows
    ]
    return concat(drawn, size, data)


def hidden_layers(summary: Summary) -> list[str]:
    """Lists the layers that `gradient_chart` cannot show, as phrases such as "plain-56 at epoch 3: 4 layers"."""
    palette = Palette(summary)
    phrases: list[str] = []
    for net in summary.nets:
        for profile in (net.initial, net.end):
            if profile is not None:
                hidden = len(profile.layers_by_seed[0]) - len(_layer_rows(net, profile, palette))
                if hidden:
                    phrases.append(f"{net.name} at {profile.when}: {hidden} layer{'s' if hidden > 1 else ''}")
    return phrases


def shortcut_chart(summary: Summary, size: Size = THIRDS) -> Chart | None:
    """Draws the share of the gradient that arrives by the shortcut at each residual add, one line per network.

    The panels show the first step, the middle and the end of training. The line is the median over seeds and the band
    their range. A residual add without two parts to compare is a gap.

    Args:
        summary: The sweep.
        size: Size of each of the three panels.

    Returns:
        The chart, or None if no share is recorded.
    """
    palette = Palette(summary)
    sides: dict[str, list[tuple[NetSummary, ShortcutProfile]]] = {"first": [], "in the middle": [], "at the end": []}
    for net in summary.nets:
        for profile in net.shortcut_profiles:
            later = "at the end" if profile is net.shortcut_profiles[-1] else "in the middle"
            sides[later if profile.epoch else "first"].append((net, profile))
    panels: list[tuple[str, list[Row]]] = []
    for side, nets in sides.items():
        epochs = {profile.when for _, profile in nets}
        rows = [row for net, profile in nets for row in _junction_rows(net, profile, palette)]
        if rows:
            panels.append((epochs.pop() if len(epochs) == 1 else side, rows))
    if not panels:
        return None
    n_adds = max(len(profile.shares) for nets in sides.values() for _, profile in nets)
    axis = alt.Axis(title=None, values=[0, 0.25, 0.5, 0.75, 1], format=".0%")
    data = ChartData()
    drawn = [lines_panel(title, rows, n_adds, "residual add", axis, (0.0, 1.0), size, data) for title, rows in panels]
    title = ["Share of the gradient", "that arrives by the shortcut"]
    titled: Chart = concat(drawn, size, data).properties(title=title if size.stacked else " ".join(title))
    return titled


def hidden_junctions(summary: Summary) -> list[str]:
    """Lists the residual adds that `shortcut_chart` cannot show, as phrases such as "resnet-56: 2 of 27"."""
    phrases: list[str] = []
    for net in summary.nets:
        hidden = {
            site for one in net.shortcut_profiles for site, share in one.shares.items() if not math.isfinite(share)
        }
        if hidden:
            phrases.append(f"{net.name}: {len(hidden)} of {len(net.shortcut_profiles[0].shares)}")
    return phrases


def write_png(run: SweepRun, folder: str | Path) -> list[Path]:
    """Writes the charts as `error.png`, `curves.png`, `gradient.png` and `shortcut.png`.

    Args:
        run: The recorded sweep, finished or not.
        folder: Folder to write to; created if missing.

    Returns:
        The files written; a chart without data is skipped.

    Raises:
        StoreError: The folder or a file in it cannot be written; the old files are unchanged.
    """
    summary = summarise(run)
    folder = Path(folder)
    create_folder(folder)
    images: dict[Path, list[bytes]] = {}
    for name, draw in (
        ("error", error_chart),
        ("curves", curves_chart),
        ("gradient", gradient_chart),
        ("shortcut", shortcut_chart),
    ):
        chart = draw(summary)
        if chart is not None:
            images[folder / f"{name}.png"] = [png(chart)]
    write_files(images)
    return list(images)


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
    labels: list[Label] = []
    for row in {row["family"]: row for row in means}.values():
        left, here, right = (math.log(v) if logarithmic else v for v in (x_domain[0], row["depth"], x_domain[1]))
        pixel = (size.width * (here - left) / (right - left), size.height * (1 - row["error"] / y_domain[1]))
        labels.append(Label(row["family"], row["colour"], row["depth"], *pixel))
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
        circles = alt.Chart(data.add(seeds)).mark_point(size=22, opacity=0.8, strokeWidth=1.2)
        layers.append(circles.encode(x=x, y=y, color=colour, description="note:N"))
    layers.append(base.mark_point(filled=True, size=52, opacity=1).encode(y=y, description="note:N"))
    layers.extend(label_layers(labels, x, y, y_domain, 10, size, data))
    return alt.LayerChart(layer=layers, width=size.width, height=size.height, title=title)


def _epoch_rows(net: NetSummary, error: str, palette: Palette) -> list[Row]:
    """Returns the rows of an error over the epochs that all counted seeds have."""
    places: list[Row | None] = []
    for epoch in range((net.epoch or 0) + 1):
        rows = [result.epochs.get(epoch) for result in net.counted]
        errors = [getattr(row, error) for row in rows if row is not None]
        if not errors or len(errors) < len(rows) or not all(map(math.isfinite, errors)):
            places.append(None)
            continue
        mean, low, high = math.fsum(errors) / len(errors), min(errors), max(errors)
        reach = f" ({low:.1f} to {high:.1f}, {len(errors)} seeds)" if len(errors) > 1 else ""
        note = f"{net.name}, epoch {epoch}: {mean:.1f} %{reach}"
        places.append({"value": mean, "low": low, "high": high, "note": note})
    return line_rows(net, palette.net(net.family, net.depth), palette.family(net.family), places, first=0)


def _layer_rows(net: NetSummary, profile: GradientProfile, palette: Palette) -> list[Row]:
    """Returns the rows of the layers that a log scale can show, with norms as powers of ten."""
    places: list[Row | None] = []
    for place, layers in enumerate(zip(*profile.layers_by_seed, strict=True), start=1):
        norms = [layer.norm_l2 for layer in layers]
        if not all(math.isfinite(norm) and norm > 0 for norm in norms):
            places.append(None)
            continue
        norm = median(norms)
        low, value, high = map(math.log10, (min(norms), norm, max(norms)))
        name = f"{net.name}, layer {place} of {len(profile.layers_by_seed[0])}, {layers[0].site}"
        note = f"{name}: norm {number(norm)}"
        places.append({"norm": norm, "value": value, "low": low, "high": high, "note": note})
    return line_rows(net, palette.net(net.family, net.depth), palette.family(net.family), places)


def _junction_rows(net: NetSummary, profile: ShortcutProfile, palette: Palette) -> list[Row]:
    """Returns the rows of the residual adds that have two parts."""
    places: list[Row | None] = []
    for place, (site, share) in enumerate(profile.shares.items(), start=1):
        seeds = [rows[place - 1].shortcut_share for rows in profile.junctions_by_seed]
        note = f"{net.name}, residual add {place} of {len(profile.shares)}, {site}: {100 * share:.0f} % by the shortcut"
        drawn = {"value": share, "low": min(seeds), "high": max(seeds), "note": note}
        places.append(drawn if math.isfinite(share) else None)
    return line_rows(net, palette.net(net.family, net.depth), palette.family(net.family), places)
