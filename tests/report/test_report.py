"""The report of a sweep states exactly what was recorded, ordinary or odd."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

import pytest
from helpers.report_cases import (
    EXPLODING,
    HEALTHY,
    ODD,
    VANISHING,
    Page,
    Recorded,
    all_nan,
    degraded,
    interrupted,
    page_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run
from gradprobe.report import html, sweep_charts
from gradprobe.report.export import as_dict, write_csv
from gradprobe.report.records import EpochRow, SweepRun
from gradprobe.report.seed_statistics import clearly_above
from gradprobe.report.summary import summarise
from gradprobe.report.terminal import render


def terminal(run: SweepRun, width: int = 160) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(run))
    return capture.get()


def verdict(run: Recorded, name: str) -> str | None:
    return next(net.verdict for net in summarise(run).nets if net.name == name)


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
    assert "±" not in text.split("\n\n", 3)[3]


@pytest.mark.parametrize(
    ("end", "error", "expected"),
    [
        pytest.param(HEALTHY, 67.0, "degraded optimisation", id="healthy-gradients-high-error"),
        pytest.param(HEALTHY, 3.0, "healthy", id="healthy-gradients-error-within-the-margin"),
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


def test_degraded_network_with_healthy_gradients_is_never_called_vanishing() -> None:
    text = terminal(degraded(), width=1000)
    assert "vanishing" not in text
    line = next(line for line in text.splitlines() if line.startswith("plain-56  Gradients"))
    assert "Gradients explode towards the input at the first step (norm 500 in the first weight layer" in line
    assert "and are healthy at epoch 4 (1.20 and 0.500)" in line
    assert "67.0 ± 2.0 %, is clearly above that of plain-20, 0.4 ± 0.1 %" in line
    assert "its gradients do not vanish" in line


def test_report_does_not_deny_vanishing_that_was_seen() -> None:
    run = Recorded().add("plain", 20, (0.3, 1.6)).add("plain", 56, (67.0, 70.0), first=VANISHING)
    text = terminal(run, width=1000)
    assert verdict(run, "plain-56") == "degraded optimisation"
    assert "Gradients vanish towards the input at the first step" in text
    assert "do not vanish" not in text


def test_gradients_that_explode_and_then_vanish_are_exploding() -> None:
    run = Recorded().add("plain", 20, (0.3, 1.6)).add("plain", 56, (89.0, 90.0), first=EXPLODING, end=VANISHING)
    net = summarise(run).nets[1]
    assert (net.verdict, net.verdict_profile) == ("exploding", net.initial)
    text = terminal(run, width=1000)
    assert "Gradients explode towards the input at the first step" in text
    assert "and vanish towards the input at epoch 4 (1.0e-9 and 0.0100). The explosion is the cause" in text
    assert verdict(Recorded().add("plain", 56, first=VANISHING, end=EXPLODING), "plain-56") == "exploding"
    assert verdict(Recorded().add("plain", 56, first=HEALTHY, end=VANISHING), "plain-56") == "vanishing"


def test_a_first_step_without_gradients_before_the_last_layer_is_explained() -> None:
    said = (
        "At the first step only the last weight layer of fixup-20 and fixup-56 has a gradient, as where that layer "
        "starts at zero (Fixup): until its first update it lets none through."
    )
    run = Recorded().add("resnet", 20)
    for depth in (20, 56):
        for seed in (0, 1):
            run.add("fixup", depth, seed=seed, first=(0.0, 0.0, 0.5))
    assert said in " ".join(terminal(run).split())
    assert said in Page(html.page(summarise(run))).text
    dead = Recorded().add("fixup", 20, first=(0.0, 0.0, 0.0)).add("fixup", 56, first=(0.0, 0.1, 0.5))
    assert "starts at zero" not in terminal(dead)


def test_a_single_network_that_has_not_learned_is_not_healthy() -> None:
    alone = Recorded().add("plain", 56, (87.8, 87.1), first=EXPLODING)
    assert verdict(alone, "plain-56") == "not learning"
    text = terminal(alone, width=1000)
    sentence = "After epoch 4 the training error, 87.8 %, is not clearly below its value before the first step, 90.0 %"
    assert sentence in text
    assert verdict(Recorded().add("plain", 56, (80.0, 81.0)), "plain-56") == "healthy"
    assert verdict(Recorded().add("plain", 56, (87.8, 87.1), end=EXPLODING), "plain-56") == "exploding"
    beside_a_shallower = Recorded().add("plain", 20).add("plain", 56, (87.8, 87.1))
    assert verdict(beside_a_shallower, "plain-56") == "degraded optimisation"
    too_early = Recorded({"data": "digits", "epochs": 20}).add("plain", 56, (87.8, 87.1), epochs=5, status="pending")
    assert verdict(too_early, "plain-56") == "healthy"


def test_seeds_decide_whether_a_network_has_learned() -> None:
    run = Recorded()
    for seed, error in enumerate((87.2, 87.4, 87.6)):
        run.add("plain", 56, (error, 88.0), seed=seed)
    assert verdict(run, "plain-56") == "healthy"  # 2.6 points, in each of three seeds
    run.add("plain", 56, (90.0, 88.0), seed=3)
    assert verdict(run, "plain-56") == "not learning"


def test_a_single_non_finite_element_decides_the_verdict() -> None:
    run = Recorded().add("plain", 20, nonfinite=1)
    assert verdict(run, "plain-20") == "non-finite"


def test_one_diverged_seed_is_reported_and_excluded_from_the_mean() -> None:
    run = Recorded().add("plain", 20, (1.0, 2.0), seed=0).add("plain", 20, (2.0, 3.0), seed=1)
    run.add("plain", 20, (90.0, 90.0), seed=2, status="diverged", loss=math.nan, epochs=1)
    net = summarise(run).nets[0]
    assert net.train_error_pct is not None
    assert (net.train_error_pct.mean, net.progress, net.verdict) == (1.5, "2 of 3, 1 diverged", "healthy")
    assert "The training loss of 1 of 3 seeds became NaN or infinite" in Page(html.page(summarise(run))).text


def test_a_network_is_non_finite_if_most_seeds_diverged() -> None:
    run = Recorded().add("plain", 20, seed=0)
    for seed in (1, 2):
        run.add("plain", 20, seed=seed, status="diverged", loss=math.inf, epochs=1)
    assert verdict(run, "plain-20") == "non-finite"


def test_seeds_vote_and_the_worse_verdict_breaks_a_tie() -> None:
    run = Recorded().add("plain", 20, seed=0, end=HEALTHY).add("plain", 20, seed=1, end=EXPLODING)
    assert verdict(run, "plain-20") == "exploding"
    assert "healthy (1 of 2 seeds), exploding (1 of 2 seeds)" in terminal(run)
    run.add("plain", 20, seed=2, end=HEALTHY)
    assert verdict(run, "plain-20") == "healthy"


def test_comparison_waits_for_a_third_of_the_run_and_uses_the_same_epoch() -> None:
    run = Recorded({"data": "digits", "epochs": 20}).add("plain", 20, (0.3, 1.6), epochs=20)
    run.add("plain", 56, (67.0, 70.0), epochs=5, status="pending")
    assert verdict(run, "plain-56") == "too early"
    assert "less than 30 % of the planned epochs are done" in terminal(run, width=1000)
    run.epoch_rows[1][6] = EpochRow(6, 0.1, 30.0, 31.0, 1.0)
    run.epoch_rows[2].append(EpochRow(6, 0.1, 67.0, 70.0, 1.0))
    run.layer_rows[2, 6] = run.layer_rows[2, 5]
    comparison = summarise(run).nets[1].comparison
    assert comparison is not None
    assert (comparison.epoch, comparison.errors.train.mean, comparison.other_errors.train.mean) == (6, 67.0, 30.0)


def test_families_are_not_compared_with_each_other() -> None:
    run = Recorded().add("resnet", 20, (0.0, 0.7)).add("plain", 56, (67.0, 70.0))
    assert verdict(run, "plain-56") == "healthy"


def test_comparison_is_with_the_best_shallower_network() -> None:
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
    # scipy's arithmetic cannot judge seeds that agree to many digits.
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
    write_csv(run, tmp_path)
    assert [net["net"] for net in parsed["nets"]] == [net.name for net in summarise(run).nets]
    for net in summarise(run).nets:
        assert net.name in text


def test_json_equals_the_run_and_spells_out_non_finite_numbers() -> None:
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


def test_published_errors_are_listed_for_networks_of_the_paper() -> None:
    run = Recorded().add("plain", 18).add("resnet", 34).add("resnet", 56)
    (paragraph,) = as_dict(run)["paper"]  # ImageNet's only: the sweep's data are the digits
    assert "(Tables 2 and 3): plain-18 27.94 %, resnet-34 24.52 %. Their conditions: 1,000 classes" in paragraph
    assert " ".join(paragraph.split()) in " ".join(terminal(run).split())
    assert as_dict(degraded())["paper"] == []


def test_csv_holds_every_recorded_row(tmp_path: Path) -> None:
    run = degraded()
    paths = write_csv(run, tmp_path / "new" / "folder")
    tables = {path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in paths}
    lengths = {name: len(rows) for name, rows in tables.items()}
    assert lengths == {"nets": 4, "epochs": 12 * 5, "layers": 12 * 5 * 3, "junctions": 6 * 4 * 3}
    net = tables["nets"][1]
    assert (float(net["train_error_pct_mean"]), float(net["initial_ratio"]), net["verdict"]) == (
        67.0,
        1000.0,
        "degraded optimisation",
    )
    layer = next(r for r in tables["layers"] if (r["depth"], r["epoch"], r["position"]) == ("56", "0", "0"))
    assert (float(layer["norm_l2"]), layer["site"]) == (500.0, "layers.0.weight")
    assert tables["junctions"][0] == {
        **{"family": "resnet", "depth": "20", "seed": "0", "epoch": "0", "position": "0", "site": "stages.0.join"},
        **{"shortcut_norm_l2": "0.8", "branch_norm_l2": "1.2", "cosine": "0.25", "shortcut_share": "0.4"},
    }


@pytest.mark.parametrize("write", [html.write, write_csv, sweep_charts.write_png], ids=["html", "csv", "png"])
def test_unwritable_target_is_one_clear_error(write: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        write(Recorded().add("plain", 20), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "in the way"


def test_reads_a_run_from_its_file(tmp_path: Path) -> None:
    source = degraded()
    with start_run(tmp_path / "run.sqlite", source.config, source.meta) as writer:
        writer.add_cells([(cell.family, cell.depth, cell.seed, cell.parameters) for cell in source.cells()])
        for cell in source.cells():
            for row in source.epochs(cell.id):
                status = "done" if row.epoch == 4 else "pending"
                writer.save(
                    cell.id, [row], source.layers(cell.id, row.epoch), source.junctions(cell.id, row.epoch), b"", status
                )
    with open_run(tmp_path / "run.sqlite") as run:
        assert terminal(run) == terminal(source)
        assert as_dict(run)["nets"] == as_dict(source)["nets"]


@pytest.mark.soak
@settings(max_examples=25 if os.environ.get("CI") else 8, deadline=None)
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
    sweep_charts.error_chart(summary)
    sweep_charts.gradient_chart(summary)
    sweep_charts.shortcut_chart(summary)
    assert all(net.name in terminal(run) for net in summary.nets)
