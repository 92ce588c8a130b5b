"""The report of a sweep: what it says must be what was recorded, whatever was recorded."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gradprobe.errors import StoreError
from gradprobe.experiments.store import Cell, EpochRow, LayerRow, open_run, start_run
from gradprobe.report import charts, html
from gradprobe.report.rows import SweepRun
from gradprobe.report.summary import clearly_above, summarise
from gradprobe.report.terminal import as_dict, render, write_csv

PARAMETERS = {20: 269_722, 56: 853_018, 110: 1_727_962}
SOUND, VANISHING, EXPLODING = (1.2, 0.8, 0.5), (1e-9, 1e-5, 1e-2), (500.0, 20.0, 0.5)


@dataclass
class Recorded:
    """A run in memory."""

    config: dict[str, object] = field(default_factory=lambda: {"data": "digits", "epochs": 4})
    meta: dict[str, str] = field(default_factory=lambda: {"gradprobe_version": "0.1.0", "torch_version": "2.13.0"})
    rows: list[Cell] = field(default_factory=list)
    epoch_rows: dict[int, list[EpochRow]] = field(default_factory=dict)
    layer_rows: dict[tuple[int, int], list[LayerRow]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        return self.rows

    def epochs(self, cell_id: int) -> list[EpochRow]:
        return self.epoch_rows.get(cell_id, [])

    def layers(self, cell_id: int, epoch: int) -> list[LayerRow]:
        return self.layer_rows.get((cell_id, epoch), [])

    def add(
        self,
        family: str,
        depth: int,
        errors: tuple[float, float] = (1.0, 2.0),
        *,
        seed: int = 0,
        first: tuple[float, ...] = SOUND,
        end: tuple[float, ...] = SOUND,
        epochs: int = 4,
        status: str = "done",
        loss: float = 0.1,
        nonfinite: int = 0,
    ) -> Recorded:
        """Adds a cell that ended with `errors` (train, test) and had norms `first` and `end`."""
        cell = len(self.rows) + 1
        self.rows.append(Cell(cell, family, depth, seed, PARAMETERS.get(depth, 1000), status))
        self.epoch_rows[cell] = [EpochRow(e, loss, *errors, 1.5) for e in range(epochs + 1)]
        for epoch in range(epochs + 1):
            norms = end if epoch else first
            self.layer_rows[cell, epoch] = [
                LayerRow(epoch, position, f"layers.{position}.weight", norm, norm / 10, norm / 2, 0.0, nonfinite, 144)
                for position, norm in enumerate(norms)
            ]
        return self


def degraded(seeds: int = 3) -> Recorded:
    """plain-56 with sound gradients and a high training error, beside three nets that train."""
    run = Recorded()
    for seed in range(seeds):
        run.add("plain", 20, (0.3 + 0.1 * seed, 1.6), seed=seed)
        run.add("plain", 56, (65.0 + 2 * seed, 70.0 + seed), seed=seed, first=EXPLODING)
        run.add("resnet", 20, (0.0, 0.7), seed=seed)
        run.add("resnet", 56, (1.4, 3.8), seed=seed)
    return run


def all_nan() -> Recorded:
    nan = math.nan
    return Recorded().add("plain", 20, (nan, nan), first=(nan,) * 3, end=(nan,) * 3, loss=nan, nonfinite=144)


def not_started() -> Recorded:
    run = Recorded()
    run.rows.append(Cell(1, "plain", 20, 0, 269_722, "pending"))
    return run


def no_layers() -> Recorded:
    run = Recorded().add("plain", 20)
    run.layer_rows.clear()
    return run


def interrupted() -> Recorded:
    run = Recorded({"data": "digits", "epochs": 20}).add("plain", 20, epochs=20).add("plain", 56, epochs=7)
    run.rows[1] = Cell(2, "plain", 56, 0, 853_018, "pending")
    run.rows.append(Cell(3, "plain", 110, 0, 1_727_962, "pending"))
    return run


ODD: dict[str, Callable[[], Recorded]] = {
    "no-cells": Recorded,
    "not-started": not_started,
    "zero-epochs": lambda: Recorded({"data": "digits", "epochs": 0}).add("plain", 20, epochs=0),
    "single-cell": lambda: Recorded().add("plain", 20),
    "single-depth": lambda: Recorded().add("plain", 20).add("resnet", 20),
    "all-nan": all_nan,
    "zero-norms": lambda: Recorded().add("plain", 20, first=(0.0,) * 3, end=(0.0,) * 3),
    "infinite-norms": lambda: Recorded().add("plain", 20, first=(math.inf,) * 3, end=(math.inf, 1.0, math.inf)),
    "diverged": lambda: Recorded().add("plain", 20, (math.nan, 90.0), status="diverged", loss=math.inf, epochs=1),
    "no-layers": no_layers,
    "one-layer": lambda: Recorded().add("plain", 20, first=(1.0,), end=(1.0,)),
    "gap": lambda: Recorded().add("plain", 20, end=(1.0, 0.0, 2.0, 3.0)),
    "subnormal": lambda: Recorded().add("plain", 20, first=(1e-320, 1e-45, 1e308), end=SOUND),
    "interrupted": interrupted,
    "no-config": lambda: Recorded(config={}, meta={}).add("plain", 20).add("plain", 56),
    "error-zero": lambda: Recorded().add("plain", 20, (0.0, 0.0)),
    "very-deep": lambda: Recorded().add("plain", 20).add("plain", 1202, end=(1.0,) * 1202),
    "other-family": lambda: Recorded().add("fixup", 20).add("dense", 20).add("plain", 20),
}


def terminal(run: SweepRun, width: int = 160) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(run))
    return capture.get()


def verdict(run: Recorded, name: str) -> str | None:
    return next(net.verdict for net in summarise(run).nets if net.name == name)


@cache
def page_of(build: Callable[[], Recorded]) -> str:
    """The page of a run; drawing it takes a while, and several tests look at the same one."""
    return html.page(summarise(build()))


class Page(HTMLParser):
    """Reads a page: its cells, what it loads, and whether its tags close in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.labels: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(f"{tag} {name}={value}")
            if name == "aria-label" and value:
                self.labels.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next([cell.replace("\xa0", " ") for cell in row] for row in self.rows if row and row[0] == name)


def test_terminal_shows_the_recorded_numbers() -> None:
    text = terminal(degraded())
    lines = [line.split() for line in text.splitlines()]
    errors = next(line for line in lines if line[:1] == ["plain-56"])
    assert " ".join(errors) == "plain-56 3 853,018 67.0 ± 2.0 71.0 ± 1.0 degraded optimisation, 4"
    first = next(line for line in lines if line[:2] == ["plain-56", "the"])
    assert " ".join(first) == "plain-56 the first step 500 0.500 1000 exploding"
    assert "epoch 4 1.20 0.500 2.40 healthy" in map(" ".join, lines)


def test_terminal_fits_80_columns() -> None:
    assert max(map(len, terminal(degraded(), width=80).splitlines())) <= 80


def test_one_seed_has_no_spread() -> None:
    text = terminal(degraded(seeds=1))
    assert "65.0" in text
    assert "±" not in text.split("\n\n", 2)[2]


@pytest.mark.parametrize(
    ("end", "error", "expected"),
    [
        pytest.param(SOUND, 67.0, "degraded optimisation", id="sound-gradients-high-error"),
        pytest.param(SOUND, 3.0, "healthy", id="sound-gradients-error-within-the-margin"),
        pytest.param(VANISHING, 67.0, "vanishing", id="vanishing"),
        pytest.param(EXPLODING, 67.0, "exploding", id="exploding"),
        pytest.param((math.nan, 1.0, 1.0), 67.0, "non-finite", id="nan"),
        pytest.param((math.inf, 1.0, 1.0), 0.0, "non-finite", id="infinite"),
    ],
)
def test_verdict_follows_the_gradient_first_and_the_error_second(
    end: tuple[float, ...], error: float, expected: str
) -> None:
    run = Recorded().add("plain", 20, (0.3, 1.6)).add("plain", 56, (error, error), end=end)
    assert verdict(run, "plain-20") == "healthy"
    assert verdict(run, "plain-56") == expected


def test_degraded_net_with_sound_gradients_is_never_called_vanishing() -> None:
    text = terminal(degraded(), width=1000)
    assert "vanishing" not in text
    line = next(line for line in text.splitlines() if line.startswith("plain-56  Gradients"))
    assert "Gradients explode towards the input at the first step (norm 500 in the first weight layer" in line
    assert "they are sound at epoch 4 (1.20 and 0.500)" in line
    assert "67.0 ± 2.0 %, is clearly above that of plain-20, 0.4 ± 0.1 %" in line
    assert "its gradients do not vanish" in line


def test_report_does_not_deny_vanishing_where_it_was_seen() -> None:
    run = Recorded().add("plain", 20, (0.3, 1.6)).add("plain", 56, (67.0, 70.0), first=VANISHING)
    text = terminal(run, width=1000)
    assert verdict(run, "plain-56") == "degraded optimisation"
    assert "Gradients vanish towards the input at the first step" in text
    assert "do not vanish" not in text


def test_single_non_finite_element_makes_the_verdict() -> None:
    run = Recorded().add("plain", 20, nonfinite=1)
    assert verdict(run, "plain-20") == "non-finite"


def test_one_diverged_seed_is_told_and_kept_out_of_the_mean() -> None:
    run = Recorded().add("plain", 20, (1.0, 2.0), seed=0).add("plain", 20, (2.0, 3.0), seed=1)
    run.add("plain", 20, (90.0, 90.0), seed=2, status="diverged", loss=math.nan, epochs=1)
    net = summarise(run).nets[0]
    assert net.train_error_pct is not None
    assert (net.train_error_pct.mean, net.progress, net.verdict) == (1.5, "2 of 3, 1 diverged", "healthy")
    assert "The training loss of 1 of 3 seeds became NaN or infinite" in Page(html.page(summarise(run))).text


def test_most_seeds_diverged_is_non_finite() -> None:
    run = Recorded().add("plain", 20, seed=0)
    for seed in (1, 2):
        run.add("plain", 20, seed=seed, status="diverged", loss=math.inf, epochs=1)
    assert verdict(run, "plain-20") == "non-finite"


def test_seeds_vote_and_the_worse_verdict_breaks_a_tie() -> None:
    run = Recorded().add("plain", 20, seed=0, end=SOUND).add("plain", 20, seed=1, end=EXPLODING)
    assert verdict(run, "plain-20") == "exploding"
    assert "healthy (1 of 2 seeds), exploding (1 of 2 seeds)" in terminal(run)
    run.add("plain", 20, seed=2, end=SOUND)
    assert verdict(run, "plain-20") == "healthy"


def test_comparison_waits_for_a_third_of_the_run_and_uses_the_same_epoch() -> None:
    run = Recorded({"data": "digits", "epochs": 20}).add("plain", 20, (0.3, 1.6), epochs=20)
    run.add("plain", 56, (67.0, 70.0), epochs=5, status="pending")
    assert verdict(run, "plain-56") == "healthy"
    assert summarise(run).nets[1].comparison is None
    run.epoch_rows[1][6] = EpochRow(6, 0.1, 30.0, 31.0, 1.0)
    run.epoch_rows[2].append(EpochRow(6, 0.1, 67.0, 70.0, 1.0))
    run.layer_rows[2, 6] = run.layer_rows[2, 5]
    comparison = summarise(run).nets[1].comparison
    assert comparison is not None
    assert (comparison.epoch, comparison.error.mean, comparison.other_error.mean) == (6, 67.0, 30.0)


def test_families_are_not_compared_with_each_other() -> None:
    run = Recorded().add("resnet", 20, (0.0, 0.7)).add("plain", 56, (67.0, 70.0))
    assert verdict(run, "plain-56") == "healthy"


def test_comparison_is_with_the_best_shallower_net() -> None:
    run = Recorded().add("plain", 20, (0.3, 1.6)).add("plain", 56, (67.0, 70.0)).add("plain", 110, (60.0, 60.0))
    comparison = summarise(run).nets[2].comparison
    assert comparison is not None
    assert comparison.other == "plain-20"


@given(
    st.lists(st.integers(0, 1000).map(lambda n: n / 10), min_size=2, max_size=6),
    st.lists(st.integers(0, 1000).map(lambda n: n / 10), min_size=2, max_size=6),
)
def test_clearly_above_is_at_least_as_strict_as_welch_at_95_pct(deeper: list[float], shallower: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    # Seeds that agree to many digits are beyond what scipy's own arithmetic can judge.
    if clearly_above(deeper, shallower) and stdev(deeper) + stdev(shallower) > 1e-6:
        assert stats.ttest_ind(deeper, shallower, equal_var=False, alternative="greater").pvalue <= 0.0501


def test_unfinished_cells_are_shown_as_such() -> None:
    text = terminal(interrupted())
    assert "1 of 3 runs finished" in text
    assert "0 of 1, epoch 7" in text
    assert "0 of 1, not started" in text
    page = Page(page_of(interrupted))
    assert "1 of 3 runs are finished" in page.text
    assert page.row("plain-110")[2:] == ["0 of 1, not started", "1,727,962", *"––––––––"]


@pytest.mark.parametrize("build", ODD.values(), ids=ODD.keys())
def test_odd_run_breaks_nothing(build: Callable[[], Recorded], tmp_path: Path) -> None:
    run = build()
    text = terminal(run)
    parsed = json.loads(json.dumps(as_dict(run), allow_nan=False))
    page = Page(page_of(build))
    write_csv(run, tmp_path)
    assert [net["net"] for net in parsed["nets"]] == [net.name for net in summarise(run).nets]
    for net in summarise(run).nets:
        assert net.name in text
        assert page.row(net.name)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(degraded, ["error.png", "gradient.png"], id="degraded"),
        pytest.param(all_nan, [], id="all-nan"),
        pytest.param(no_layers, ["error.png"], id="no-layers"),
    ],
)
def test_pictures_are_written_where_there_is_something_to_draw(
    build: Callable[[], Recorded], expected: list[str], tmp_path: Path
) -> None:
    paths = charts.write_png(build(), tmp_path / "new")
    assert [path.name for path in paths] == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-cells", "The run holds no networks yet"),
        ("not-started", "Not started."),
        ("not-started", "No gradient is recorded yet."),
        ("all-nan", "No finite error is recorded yet."),
        ("all-nan", "Gradients hold NaN or infinite values at the first step (norm NaN in the first weight layer"),
        ("zero-norms", "Every recorded norm is zero, NaN or infinite."),
        ("gap", "zero, NaN and infinite norms have no place on it: plain-20 at epoch 4: 1 layer."),
        ("no-layers", "No gradient is recorded."),
        ("diverged", "The training loss of its one seed became NaN or infinite"),
    ],
)
def test_page_says_what_is_odd(name: str, words: str) -> None:
    assert words in Page(page_of(ODD[name])).text.replace("\xa0", " ")


def test_page_has_the_recorded_numbers() -> None:
    page = Page(page_of(degraded))
    assert page.row("plain-56") == [
        "plain-56",
        "degraded optimisationepoch 4",
        "3",
        "853,018",
        "67.0 ± 2.0",
        "71.0 ± 1.0",
        *("500", "0.500", "1000"),
        *("1.20", "0.500", "2.40"),
    ]
    assert "plain-56, layer 2 of 3, layers.1.weight: norm 20.0" in page.labels
    assert "plain-56: 67.00 % ± 2.00 (3 seeds)" in page.labels
    assert "plain-56, seed 2: 69.00 %" in page.labels
    assert "torch version" in page.text


@pytest.mark.parametrize("build", [degraded, *ODD.values()], ids=["degraded", *ODD.keys()])
def test_page_loads_nothing(build: Callable[[], Recorded]) -> None:
    text = page_of(build)
    assert Page(text).loads == []
    assert not re.search(
        r"https?:|url\(\s*[\"']?(?!#)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest|//[a-z0-9.-]+\.[a-z]", text
    )


def test_page_escapes_what_it_is_given() -> None:
    run = Recorded({"data": "<script>alert(1)</script>", "epochs": 4}).add("<b>x", 20)
    text = html.page(summarise(run))
    assert "<script>alert" not in text
    assert "<b>x" not in text
    Page(text)


def test_page_stays_small_for_a_large_sweep() -> None:
    run = Recorded()
    for depth in (20, 32, 44, 56, 110):
        for family in ("plain", "resnet"):
            for seed in range(3):
                run.add(family, depth, seed=seed, first=(1.0 + seed,) * depth, end=(1.0 + seed,) * depth)
    assert len(html.page(summarise(run)).encode()) < 2_000_000


def test_page_prints_the_papers_figures_only_beside_cifar10() -> None:
    cifar = html.page(summarise(Recorded({"data": "cifar10", "epochs": 4}).add("resnet", 20)))
    assert "8.75" in cifar
    assert "64,000 iterations" in cifar
    assert "8.75" not in page_of(degraded)


def rows_of(chart: charts.Chart | None) -> list[dict[str, object]]:
    """All rows of data inside a chart."""
    assert chart is not None
    return [row for data in chart.to_dict()["datasets"].values() for row in data]


def test_charts_hold_the_recorded_data() -> None:
    summary = summarise(degraded())
    errors = rows_of(charts.error_chart(summary))
    means = {(row["family"], row["depth"], row["error"]) for row in errors if "low" in row}
    assert ("plain", 56, 67.0) in means
    assert ("plain", 56, 71.0) in means
    assert {row["error"] for row in errors if row.get("note") == "plain-56, seed 1: 67.00 %"} == {67.0}
    norms = rows_of(charts.gradient_chart(summary))
    drawn = [(row["position"], row["norm"]) for row in norms if row.get("net") == "plain-56"]
    assert drawn == [*enumerate(EXPLODING, start=1), *enumerate(SOUND, start=1)]


def test_layers_that_a_log_scale_cannot_show_are_gaps_not_zeros() -> None:
    rows = rows_of(charts.gradient_chart(summarise(ODD["gap"]())))
    drawn = [(row["position"], row["norm"], row["segment"]) for row in rows if row.get("depth") == 20]
    assert (2, 0.0) not in [row[:2] for row in drawn]
    assert {segment for position, _, segment in drawn if position == 4} != {drawn[-4][2]}


def test_gradient_line_is_the_median_over_seeds() -> None:
    run = Recorded()
    for seed, norm in enumerate((1.0, 100.0, 3.0)):
        run.add("plain", 20, seed=seed, end=(norm, 1.0))
    row = next(row for row in rows_of(charts.gradient_chart(summarise(run))) if row.get("high") == 2.0)
    assert (row["low"], row["norm"]) == (0.0, 3.0)  # a power of ten, and the norm itself


def test_each_net_has_its_own_colour() -> None:
    run = Recorded()
    for family in ("plain", "resnet", "fixup"):
        for depth in (20, 56):
            run.add(family, depth)
    nets = {(r["net"], r["colour"]) for r in rows_of(charts.gradient_chart(summarise(run))) if "net" in r}
    assert len({colour for _, colour in nets}) == len(nets) == 6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 250), min_size=1, max_size=8), st.lists(st.floats(1, 300), max_size=20))
def test_labels_keep_apart_and_inside(ends: list[float], line: list[float]) -> None:
    labels = [charts._Label(str(i), "#000000", 1.0, 0.0, y) for i, y in enumerate(ends)]
    placed = charts._apart(labels, 250.0, [(x, 60.0) for x in line])
    assert all(0 <= y < 250 for y in placed)
    ordered = sorted(placed)
    assert all(below - above >= charts._LABEL_PX for above, below in pairwise(ordered))


def test_json_equals_the_run_and_names_what_json_cannot_hold() -> None:
    report = json.loads(json.dumps(as_dict(degraded()), allow_nan=False))
    net = next(net for net in report["nets"] if net["net"] == "plain-56")
    assert net["train_error_pct"] == {"mean": 67.0, "std": 2.0, "values": [65.0, 67.0, 69.0]}
    assert net["gradient"]["first_step"]["layers"][1]["norm_l2"] == [20.0, 20.0, 20.0]
    assert (net["verdict"], net["verdict_epoch"]) == ("degraded optimisation", 4)
    assert net["compared_with"]["net"] == "plain-20"
    odd = json.loads(json.dumps(as_dict(ODD["infinite-norms"]()), allow_nan=False))["nets"][0]
    assert odd["gradient"]["end"]["layers"][0]["norm_l2"] == ["inf"]
    assert odd["train_error_pct"]["std"] is None
    nan = json.loads(json.dumps(as_dict(all_nan()), allow_nan=False))["nets"][0]
    assert nan["train_error_pct"]["mean"] == "nan"


def test_csv_holds_every_recorded_row(tmp_path: Path) -> None:
    run = degraded()
    paths = write_csv(run, tmp_path / "new" / "folder")
    tables = {path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in paths}
    assert {name: len(rows) for name, rows in tables.items()} == {"nets": 4, "epochs": 12 * 5, "layers": 12 * 5 * 3}
    net = tables["nets"][1]
    assert (float(net["train_error_pct_mean"]), float(net["initial_ratio"]), net["verdict"]) == (
        67.0,
        1000.0,
        "degraded optimisation",
    )
    layer = next(r for r in tables["layers"] if (r["depth"], r["epoch"], r["position"]) == ("56", "0", "0"))
    assert (float(layer["norm_l2"]), layer["site"]) == (500.0, "layers.0.weight")


def test_write_makes_folders_and_replaces_an_older_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    html.write(not_started(), path)
    assert html.write(interrupted(), path) == path
    assert path.read_text(encoding="utf-8") == page_of(interrupted)


@pytest.mark.parametrize("write", [html.write, write_csv, charts.write_png], ids=["html", "csv", "png"])
def test_unwritable_target_is_one_clear_error(write: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        write(degraded(), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_reads_a_run_from_its_file(tmp_path: Path) -> None:
    source = degraded()
    with start_run(tmp_path / "run.sqlite", source.config, source.meta) as writer:
        writer.add_cells([(cell.family, cell.depth, cell.seed, cell.parameters) for cell in source.cells()])
        for cell in source.cells():
            for row in source.epochs(cell.id):
                status = "done" if row.epoch == 4 else "pending"
                writer.save(cell.id, [row], source.layers(cell.id, row.epoch), b"", status)
    with open_run(tmp_path / "run.sqlite") as run:
        assert terminal(run) == terminal(source)
        assert as_dict(run)["nets"] == as_dict(source)["nets"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["plain", "resnet"]),
            st.sampled_from([20, 56]),
            st.floats(0, 100) | st.just(math.nan),
            st.lists(st.floats(min_value=0) | st.just(math.nan), min_size=3, max_size=3),
            st.sampled_from(["pending", "done", "diverged"]),
            st.integers(0, 4),
        ),
        max_size=6,
    )
)
def test_any_run_can_be_reported(cells: list[tuple[str, int, float, list[float], str, int]]) -> None:
    run = Recorded()
    for seed, (family, depth, error, norms, status, epochs) in enumerate(cells):
        run.add(family, depth, (error, error), seed=seed, end=tuple(norms), status=status, epochs=epochs)
    summary = summarise(run)
    json.dumps(as_dict(run), allow_nan=False)
    charts.error_chart(summary)
    charts.gradient_chart(summary)
    assert all(net.name in terminal(run) for net in summary.nets)
