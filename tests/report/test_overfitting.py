"""The verdict "overfitting": against shallower networks, against earlier epochs, and distinguished from degradation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.report_cases import EXPLODING, Page, Recorded
from rich.console import Console

from gradprobe.experiments.common import one_thread
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.train import Recipe, train_cell
from gradprobe.report import html
from gradprobe.report.export import as_dict
from gradprobe.report.records import Cell, EpochRow
from gradprobe.report.sentences import explain_verdict, headline
from gradprobe.report.summary import NetSummary, summarise
from gradprobe.report.terminal import render

Errors = tuple[float, float]  # training and test error, in percent


def recorded(test_images: int | None = 450, epochs: int = 4) -> Recorded:
    return Recorded({"data": "digits", "epochs": epochs, **({"test_images": test_images} if test_images else {})})


def with_course(errors: Sequence[Sequence[Errors]], epochs: int = 0) -> NetSummary:
    """Summarises one network whose seeds had these errors after epochs 1, 2, 3 …"""
    run = recorded(epochs=epochs or len(errors[0]))
    for seed, course in enumerate(errors):
        run.add("plain", 20, course[-1], seed=seed, epochs=len(course))
        rows = [EpochRow(epoch, 0.1, *pair, 1.5) for epoch, pair in enumerate(course, start=1)]
        run.epoch_rows[seed + 1] = [EpochRow(0, 2.3, 90.0, 90.0, 1.5), *rows]
    return summarise(run).nets[0]


def deepest(run: Recorded) -> NetSummary:
    return summarise(run).nets[-1]


def trained(families_depths_seeds: Sequence[tuple[str, int, int]], data: Dataset, epochs: int) -> Recorded:
    """Runs a sweep in memory, on any data."""
    run = recorded(len(data.test_x), epochs)
    for id, (family, depth, seed) in enumerate(families_depths_seeds, start=1):
        run.rows.append(Cell(id, family, depth, seed, 1000, "done"))
        with one_thread():
            results = list(train_cell(family, depth, seed, data, Recipe(epochs, 64), None))
        run.epoch_rows[id] = [row for result in results for row in result.epochs]
        for result in results:
            for layer in result.layers:
                run.layer_rows.setdefault((id, layer.epoch), []).append(layer)
    return run


def few_digits(n_images: int, wrong_labels: float = 0.0) -> Dataset:
    """Returns the digits with fewer training images, a share of them with random labels, and unchanged test images."""
    digits = load("digits")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(digits.train_x), generator=generator)[:n_images]
    drawn = torch.randint(10, (n_images,), generator=generator)
    is_wrong = torch.rand(n_images, generator=generator) < wrong_labels
    labels = torch.where(is_wrong, drawn, digits.train_y[chosen])
    return replace(digits, train_x=digits.train_x[chosen], train_y=labels)


@pytest.mark.parametrize(
    ("shallower", "deeper", "test_images", "expected"),
    [
        pytest.param((0.05, 6.43), (0.05, 7.93), 10_000, "overfitting", id="resnet-110-and-1202-of-the-paper"),
        pytest.param((0.05, 6.43), (0.05, 7.93), 450, "healthy", id="the-same-on-450-images"),
        pytest.param((0.05, 6.43), (0.05, 7.93), None, "healthy", id="images-not-recorded"),
        pytest.param((0.0, 5.6), (0.0, 14.0), 450, "overfitting", id="few-training-images"),
        pytest.param((0.0, 5.6), (2.9, 15.0), 450, "overfitting", id="training-error-within-its-margin"),
        pytest.param((0.0, 1.0), (2.9, 6.5), 450, "healthy", id="worse-on-both-sets-alike"),
        pytest.param((0.0, 5.6), (30.0, 60.0), 450, "degraded optimisation", id="training-error-much-higher-too"),
        pytest.param((0.0, 5.6), (3.0, 30.0), 450, "needs more seeds", id="training-error-higher-too"),
        pytest.param((0.0, 0.0), (0.0, 0.0), 450, "healthy", id="no-errors-at-all"),
        pytest.param((0.0, 14.0), (0.0, 5.6), 450, "healthy", id="deeper-is-better"),
    ],
)
def test_a_deeper_network_overfits_if_only_its_test_error_is_clearly_higher(
    shallower: Errors, deeper: Errors, test_images: int | None, expected: str
) -> None:
    run = recorded(test_images).add("resnet", 110, shallower).add("resnet", 1202, deeper)
    assert deepest(run).verdict == expected
    assert summarise(run).nets[0].verdict == "healthy"


@pytest.mark.parametrize(("tests", "expected"), [((9.0, 10.0, 11.0), "overfitting"), ((0.0, 9.0, 21.0), "healthy")])
def test_a_difference_within_the_spread_over_seeds_is_not_overfitting(tests: tuple[float, ...], expected: str) -> None:
    run = recorded()
    for seed, error in enumerate(tests):
        run.add("plain", 8, (0.0, 5.0), seed=seed).add("plain", 20, (0.0, error), seed=seed)
    assert deepest(run).verdict == expected


def test_unhealthy_gradients_take_precedence() -> None:
    run = recorded().add("plain", 8, (0.0, 5.6)).add("plain", 20, (0.0, 14.0), end=EXPLODING)
    assert deepest(run).verdict == "exploding"
    assert "overfits" not in explain_verdict(deepest(run))
    assert headline(summarise(run))[0].startswith("In this run deeper is not clearly worse for plain")


def test_the_comparison_is_with_the_shallower_network_of_the_lowest_test_error() -> None:
    run = recorded().add("plain", 8, (0.2, 5.6)).add("plain", 14, (0.0, 12.0)).add("plain", 20, (0.0, 14.0))
    net = deepest(run)
    assert net.verdict == "overfitting"
    assert (net.comparison and net.comparison.other) == "plain-14"
    assert "After epoch 4 the test error, 14.0 %, is clearly above that of plain-8, 5.6 %" in explain_verdict(net)


def test_the_report_names_the_epoch_and_the_numbers() -> None:
    run = recorded()
    for seed in range(3):
        run.add("plain", 8, (0.0, 5.0 + seed), seed=seed).add("plain", 20, (0.5, 13.0 + seed), seed=seed)
    console = Console(width=1000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(run))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "plain-20 3 269,722 0.5 ± 0.0 14.0 ± 1.0 overfitting, 4" in lines
    assert headline(summarise(run)) == [
        "Depth leads to overfitting for plain: after epoch 4 the test error is 14.0 ± 1.0 % for plain-20 and "
        "6.0 ± 1.0 % for plain-8, and the training error 0.5 ± 0.0 and 0.0 ± 0.0 %."
    ]
    (text,) = [line for line in lines if line.startswith("plain-20 Gradients")]
    assert "the training error, 0.5 ± 0.0 %, is not clearly above that of plain-8" in text
    assert (
        "exceeds the training error by more, 13.5 ± 1.0 points against 6.0 ± 1.0: the deeper network overfits." in text
    )
    net = as_dict(run)["nets"][1]  # type: ignore[index]
    assert (net["verdict"], net["verdict_epoch"]) == ("overfitting", 4)
    assert net["test_compared_with"]["overfits"] is True
    assert net["test_compared_with"]["its_test_error_pct"]["mean"] == 6.0
    page = Page(html.page(summarise(run)))
    assert page.row("plain-20")[1] == "overfittingepoch 4"
    assert "“Overfitting” means" in page.text


FALLING = [(36.0, 8.0), (30.0, 9.0), (5.0, 19.0), (0.2, 22.0)]


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        pytest.param(FALLING, "overfitting", id="rises-while-the-training-error-falls"),
        pytest.param(
            [(36.0, 8.0), (30.0, 9.0), (5.0, 9.0), (0.2, 12.0)], "healthy", id="within-the-noise-of-450-images"
        ),
        pytest.param([(0.2, 8.0), (0.2, 9.0), (0.0, 19.0), (0.0, 22.0)], "healthy", id="training-error-was-low-before"),
        pytest.param([(5.0, 8.0), (0.2, 9.0), (30.0, 30.0), (36.0, 37.0)], "healthy", id="both-rise"),
        pytest.param([(36.0, 40.0), (5.0, 9.0), (0.2, 8.0), (0.0, 8.0)], "healthy", id="falls"),
    ],
)
def test_a_single_network_overfits_if_its_test_error_has_risen(course: list[Errors], expected: str) -> None:
    net = with_course([course])
    assert (net.verdict, net.end and net.end.epoch) == (expected, 4)


def test_the_epoch_of_the_lowest_test_error_is_named() -> None:
    net = with_course([FALLING])
    assert (
        "From epoch 1 to epoch 4 the test error rose from 8.0 to 22.0 % while the training error fell from 36.0 to "
        "0.2 %: the network overfits."
    ) in explain_verdict(net)


def test_seeds_must_agree_on_the_rise() -> None:
    stays = [(36.0, 8.0), (30.0, 8.0), (5.0, 8.0), (0.2, 8.0)]
    assert with_course([FALLING, FALLING, FALLING]).verdict == "overfitting"
    assert with_course([FALLING, stays, stays]).verdict == "healthy"


def test_a_rise_is_not_judged_in_the_first_third() -> None:
    assert with_course([FALLING], epochs=20).verdict == "healthy"
    assert with_course([[*FALLING, (0.1, 22.0), (0.0, 23.0)]], epochs=20).verdict == "overfitting"


@pytest.mark.soak
def test_a_deeper_network_on_few_images_overfits() -> None:
    cells = [("plain", depth, seed) for depth in (8, 20) for seed in range(3)]
    shallower, deeper = summarise(trained(cells, few_digits(200), epochs=20)).nets
    assert (shallower.verdict, deeper.verdict) == ("healthy", "overfitting")
    assert "the deeper network overfits." in explain_verdict(deeper)


@pytest.mark.soak
@pytest.mark.parametrize(("wrong_labels", "expected"), [(0.0, "healthy"), (0.4, "overfitting")])
def test_a_network_that_memorises_wrong_labels_overfits(wrong_labels: float, expected: str) -> None:
    (net,) = summarise(trained([("resnet", 8, 0)], few_digits(1347, wrong_labels), epochs=20)).nets
    assert net.verdict == expected
