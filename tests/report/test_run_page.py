"""The page of one run, and its charts: what a reader sees of faults, names and numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.diagnose_cases import snapshot
from helpers.full_disk import full_disk
from helpers.names import NAMES
from helpers.report_cases import Page
from helpers.run_cases import N, run

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.errors import ArgumentError, StoreError, printable
from gradprobe.ops.rows import N_NONFINITE, N_ZERO, SUM_ABS, SUM_SQ
from gradprobe.report import run as run_report
from gradprobe.report import run_charts, run_page
from gradprobe.report.palette import BROKEN, ZERO
from gradprobe.report.run_view import Grid, RunView, cells
from gradprobe.snapshot.snapshot import Snapshot

KINDS = list(run_charts.KINDS)


def page(snapshots: Sequence[Snapshot]) -> str:
    return run_page.page(snapshots, diagnose(snapshots))


@cache
def ordinary() -> str:
    return page(run(6))


def grid(values: list[list[float]], every: int = 1) -> Grid:
    """A grid of these values: one list per place."""
    array = np.array(values).T
    steps = np.arange(len(array)) * every
    return Grid(steps, tuple(f"layer{k}" for k in range(array.shape[1])), array)


def heat_rows(snapshots: Sequence[Snapshot]) -> list[dict[str, object]]:
    chart = run_charts.plot(snapshots, diagnose(snapshots), "heatmap").to_dict()
    return [row for rows in chart["datasets"].values() for row in rows if "steps" in row]


def test_the_findings_are_on_top_as_the_diagnosis_prints_them() -> None:
    snapshots = run(40)
    snapshots[30].rows[2, N_NONFINITE] = 3
    diagnosis = diagnose(snapshots)
    shown = " ".join(Page(run_page.page(snapshots, diagnosis)).text.replace("\xa0", " ").split())
    printed = " ".join(str(diagnosis).split())
    first = diagnosis[0]
    assert shown.index(printed.split(" 1. ")[0]) < shown.index(f"1. {first.title}") < shown.index("Loss, and when")
    assert first.message[1:] in shown
    assert f"{first.title}: {first.meaning}" in shown
    assert f"Try first: {first.remedies[0]}." in shown
    assert all(f"{one.title}: {one.meaning}" in shown for one in diagnosis)


def test_a_fault_whose_causes_were_not_observed_says_how_to_observe_them() -> None:
    shown = Page(page([snapshot(step, [1.0] * 6, zeros=0.8) for step in range(40)])).text
    assert "1. dying" in shown
    assert "To learn why: attach(activations=True), which also judges exploding (forward), saturation" in shown


def test_a_healthy_run_and_an_empty_one_say_so() -> None:
    assert "No fault in 60 steps" in Page(page(run(60))).text
    assert "No gradient was measured, so nothing is known." in Page(page([])).text


def test_a_run_with_gradients_alone_says_what_the_other_charts_need() -> None:
    text = Page(page([snapshot(step, [1.0, 2.0]) for step in range(5)])).text
    for kind in ("update_ratio", "shortcut_share", "dead_units"):
        assert f"Not recorded. It needs {run_charts.NEEDS[kind]}." in text


def test_a_run_with_residual_adds_but_without_activations() -> None:
    model = gradprobe.networks.resnet(8, in_channels=1, width=4)
    with gradprobe.attach(model) as probe:
        for _ in range(3):
            model(torch.randn(4, 1, 8, 8)).square().sum().backward()
            probe.step()
        text = Page(page(probe.history())).text
    assert "Share of the gradient that arrives by the shortcut" in text
    assert f"Not recorded. It needs {run_charts.NEEDS['dead_units']}." in text


def test_the_tables_have_the_recorded_numbers() -> None:
    snapshots = run(5, n_weights=3)
    norms = [one["layer1.weight"].norm for one in snapshots]
    row = Page(page(snapshots)).row("layer1.weight")
    assert row[1] == str(N)
    assert [float(cell) for cell in row[2:5]] == pytest.approx([norms[0], sorted(norms)[2], norms[-1]], rel=5e-3)


def test_a_spike_of_one_step_among_two_thousand_stays_visible() -> None:
    values = np.ones(2000)
    values[1234] = 50.0
    drawn = cells(grid([values.tolist(), [1.0] * 2000]), 150, 100)
    assert drawn.values.shape[0] <= 150
    column = next(k for k, first in enumerate(drawn.first) if first <= 1234 <= drawn.last[k])
    assert drawn.values[:, 0].argmax() == column
    assert drawn.values[column, 0] == pytest.approx(50.0)
    assert np.delete(drawn.values[:, 0], column) == pytest.approx(np.ones(len(drawn.first) - 1))


def test_joined_steps_keep_their_level_although_they_scatter() -> None:
    scatter = (10.0 ** np.random.default_rng(0).normal(0, 0.1, 400)).tolist()
    drawn = cells(grid([scatter]), 20, 10)
    assert np.abs(np.log10(drawn.values)).max() < 0.15


def test_a_pause_of_the_probe_is_a_gap() -> None:
    one = grid([[1.0] * 20])
    steps = np.array([*range(10), *range(100, 110)])
    drawn = cells(Grid(steps, one.names, one.values), 20, 10)
    assert (drawn.end[9], drawn.first[10]) == (10, 100)


def test_the_heatmap_tells_zero_infinite_and_missing_apart() -> None:
    snapshots = run(10, n_weights=4)
    for one in snapshots[6:]:
        one.rows[1, [SUM_ABS, SUM_SQ]] = 0.0
        one.rows[1, N_ZERO] = N
    snapshots[3].rows[2, N_NONFINITE] = 1
    for k, one in enumerate(snapshots):
        snapshots[k] = replace(one, measured=replace(one.measured, present=np.array([True, True, True, k < 5])))
    rows = heat_rows(snapshots)
    found = {(row["top"], row["first"]): row.get("kind", "number") for row in rows}
    assert [found[1, step] for step in (5, 6, 9)] == ["number", "zero", "zero"]
    assert [found[2, step] for step in (2, 3, 4)] == ["number", "NaN or infinite", "number"]
    assert (3, 4) in found
    assert (3, 5) not in found
    drawn = page(snapshots)
    assert f'fill="{ZERO}"' in drawn
    assert f'fill="{BROKEN}"' in drawn


def test_the_input_is_at_the_top() -> None:
    rows = heat_rows(run(3, n_weights=4))
    assert {row["name"] for row in rows if row["top"] == 0} == {"layer0.weight"}
    assert {row["name"] for row in rows if row["top"] == 3} == {"layer3.weight"}


def test_half_precision_shows_its_range_in_the_chart_and_the_caption() -> None:
    snapshots = run(5, smallest_normal=2.0**-14)
    text = page(snapshots)
    assert "largest float16: 65504" in text
    assert "Outputs are float16, 6.1&nbsp;×&nbsp;10<sup>−5</sup> to 65504." in text
    assert "largest bfloat16" not in ordinary()


@pytest.mark.soak
def test_a_page_of_110_layers_and_2000_steps_stays_under_5_mb() -> None:
    assert len(page(run(2000, n_weights=110, n_adds=54)).encode()) < 5_000_000


def test_every_chart_is_written_in_every_format(tmp_path: Path) -> None:
    snapshots = run(10)
    paths = run_charts.write_images(snapshots, diagnose(snapshots), tmp_path, ("png", "svg", "pdf"))
    assert {path.name for path in paths} == {f"{kind}.{end}" for kind in KINDS for end in ("png", "svg", "pdf")}
    starts = {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in paths)


def test_a_chart_that_cannot_be_drawn_says_what_it_needs() -> None:
    snapshots = [snapshot(step, [1.0, 2.0]) for step in range(5)]
    with pytest.raises(ArgumentError, match=r"kind: needed one of loss, heatmap, .*, got 'losses'"):
        run_report.plot(snapshots, diagnose(snapshots), "losses")
    with pytest.raises(ArgumentError, match=r"needed attach\(updates=True\)"):
        run_report.plot(snapshots, diagnose(snapshots), "update_ratio")


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(module: str) -> None:
        raise ModuleNotFoundError(name="altair")

    monkeypatch.setattr(run_report, "import_module", fail)
    with pytest.raises(ArgumentError, match=r"report: needed altair.*pip install 'gradprobe\[report\]'"):
        run_report.write_page([], diagnose([]), tmp_path / "run.html")


def tags(text: str) -> list[str]:
    """Returns the page's tags, without the values of attributes and without those that typeset sentences."""
    text = re.sub(r'<span class="net">(.*?)</span>', r"\1", text)
    text = re.sub(r"<(path|text|g)\b[^>]*>|</(path|text|g)>", "", text)  # drawn by place and length of a name
    return [re.sub(r'"[^"]*"', '""', tag) for tag in re.findall(r"<[^>]*>", text) if tag not in ("<sup>", "</sup>")]


def test_names_are_inert() -> None:
    names = list(NAMES.values())
    text = page(run(3, n_weights=len(names), n_adds=len(names), name=lambda k: f"{names[k]}{k}"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert tags(text) == tags(page(run(3, n_weights=len(names), n_adds=len(names))))
    assert Page(text).loads == []
    texts = [json.loads(one) for one in re.findall(r'class="cells">(.*?)</script>', text)]
    assert texts[0]["names"] == [printable(f"{name}{k}.weight") for k, name in enumerate(names)]


def test_the_page_opens_offline() -> None:
    text = ordinary()
    assert Page(text).loads == []
    assert not re.search(r"https?:|url\(\s*[\"']?(?!#)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest", text)


def test_identifiers_of_charts_do_not_clash() -> None:
    identifiers = re.findall(r'\bid="([^"]*)"', ordinary())
    assert len(identifiers) == len(set(identifiers))


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_enough_contrast_on_both_pages() -> None:
    from gradprobe.report.palette import BACKGROUND, GRID, dark_of_run, shades

    colours = dark_of_run()
    for light, dark in colours.items():
        if light not in (BACKGROUND, GRID):
            assert contrast(light, BACKGROUND) >= 4.5, light
            assert contrast(dark, colours[BACKGROUND]) >= 4.5, dark
    assert all(contrast(shade, BACKGROUND) >= 3 for shade in [*shades(4), ZERO])
    assert contrast(ZERO, colours[BACKGROUND]) >= 3


def test_a_full_disk_leaves_the_older_page(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    path.write_text("older")
    snapshots = run(5)
    with full_disk(3_000), pytest.raises(StoreError, match="cannot write this file"):
        run_page.write(snapshots, diagnose(snapshots), path)
    assert path.read_text() == "older"


def test_charts_survive_values_that_a_scale_cannot_hold() -> None:
    snapshots = run(6)
    snapshots[2] = replace(snapshots[2], loss=math.nan)
    snapshots[3] = replace(snapshots[3], loss=math.inf)
    for one in snapshots:
        one.rows[:, [SUM_ABS, SUM_SQ]] = 0.0
        one.rows[:, N_ZERO] = N
    text = page(snapshots)
    assert "Not drawn: 2 losses that are NaN or infinite." in text
    assert "NaN" not in re.sub(r"NaN or infinite", "", "".join(re.findall(r' d="[^"]*"', text)))


def test_steps_of_a_changed_model_share_one_page() -> None:
    before, after = run(4, n_weights=3), run(4, n_weights=5)
    view = RunView([*before, *(replace(one, step=one.step + 4) for one in after)])
    assert view.norms.names == tuple(f"layer{k}.weight" for k in range(5))
    assert np.isnan(view.norms.values[:4, 3:]).all()
