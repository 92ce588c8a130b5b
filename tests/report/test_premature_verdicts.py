"""What a sweep says about depth after too few steps or with one seed, and when it may call optimisation degraded."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.report_cases import EXPLODING, Page, Recorded
from rich.console import Console

from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run
from gradprobe.report import html
from gradprobe.report.export import as_dict, write_csv
from gradprobe.report.records import EpochRow, SweepRun
from gradprobe.report.summary import summarise
from gradprobe.report.terminal import render

REAL_CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar-10-batches-bin"
ONE_SEED = "One seed shows only this run: train more"

# Training errors before the first step and after each epoch, measured on the digits (21 steps per epoch).
PLAIN_20 = [86.7, 87.8, 18.2, 8.1, 4.6, 2.3, 2.0, 1.6, 0.7, 0.5, *[0.0] * 11]
PLAIN_56 = [89.4, 90.1, 89.9, 85.7, 89.3, 88.9, 88.5, 88.3, 89.4, 88.0, 87.9, *[87.6] * 4, 87.3, *[86.9] * 5]
RESNET_20 = [89.5, 64.4, 2.9, 0.1, 0.7, *[0.1] * 6, *[0.0] * 10]
RESNET_56 = [
    *[89.9, 89.9, 81.9, 74.9, 72.3, 64.7, 56.5, 41.6, 29.4, 14.8, 9.4],
    *[6.7, 5.9, 5.4, 4.9, 4.5, 4.2, 4.5, 4.1, 3.9, 3.8],
]


def recorded(nets: dict[tuple[str, int], Sequence[Sequence[float]]], planned: int = 0, steps: int = 21) -> Recorded:
    """Returns a run whose networks have these courses of the training error, one per seed, from epoch 0 on."""
    longest = max(len(course) - 1 for courses in nets.values() for course in courses)
    config = {"data": "digits", "epochs": planned or longest, "train_images": 64 * steps, "batch_size": 64}
    run = Recorded({**config, "test_images": 450})
    for (family, depth), courses in nets.items():
        for seed, course in enumerate(courses):
            run.add(family, depth, seed=seed, epochs=len(course) - 1)
            run.epoch_rows[len(run.rows)] = [EpochRow(e, 0.1, error, error, 1.5) for e, error in enumerate(course)]
    return run


def pair(shallow: Sequence[Sequence[float]], deep: Sequence[Sequence[float]], **options: int) -> Recorded:
    return recorded({("plain", 20): shallow, ("plain", 56): deep}, **options)


def deeper(run: SweepRun) -> dict[str, Any]:
    net: dict[str, Any] = as_dict(run)["nets"][-1]  # type: ignore[index]
    return net


def headline(run: SweepRun) -> list[str]:
    lines = as_dict(run)["headline"]
    assert isinstance(lines, list)
    return lines


def printed(run: SweepRun) -> str:
    console = Console(width=1000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(run))
    return capture.get()


def test_one_epoch_and_one_seed_are_too_early_in_every_form_of_the_report(tmp_path: Path) -> None:
    run = pair([[86.8, 69.5]], [[90.0, 75.6]], steps=39)
    assert (deeper(run)["verdict"], deeper(run)["compared_with"]["clearly_above"]) == ("too early", False)
    (line,) = headline(run)
    assert line == (
        "It is too early to tell whether depth harms plain: after epoch 1 the training error is 75.6 % for plain-56 "
        "and 69.5 % for plain-20."
    )
    reason = (
        "After epoch 1 it is too early to compare the training error, 75.6 %, with that of plain-20, 69.5 %: that of "
        "plain-20 has not yet fallen to half of its value before the first step, 86.8 %."
    )
    assert reason in deeper(run)["explanation"]
    page = Page(html.page(summarise(run)))
    assert page.row("plain-56")[1] == "too earlyepoch 1"
    write_csv(run, tmp_path)
    with (tmp_path / "nets.csv").open(encoding="utf-8") as file:
        row = list(csv.DictReader(file))[1]
    assert (row["verdict"], reason in row["explanation"]) == ("too early", True)
    for text in (printed(run), page.text.partition("How the numbers were measured")[0].replace("\xa0", " ")):
        assert line in text
        assert reason in text
        assert "degraded" not in text
        assert "harder" not in text


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize(
    ("shallow", "deep", "epochs", "reason"),
    [
        pytest.param(PLAIN_20, PLAIN_56, 1, "that of plain-20 has not yet fallen to half", id="untrained"),
        pytest.param(RESNET_20, RESNET_56, 2, "plain-56 has taken 42 steps", id="slow-start"),
        pytest.param(RESNET_20, RESNET_56, 6, "plain-56 has taken 126 steps", id="slow-start-later"),
        pytest.param(RESNET_20, RESNET_56, 8, "since epoch 6 that of plain-56 has fallen by 27.1", id="falling"),
        pytest.param([90.0, 40.0, 20.0], [90.0, 60.0, 30.0], 2, "fallen by 30.0 points", id="both-falling"),
    ],
)
def test_a_short_run_is_too_early_with_any_number_of_seeds(
    shallow: list[float], deep: list[float], epochs: int, reason: str, n_seeds: int
) -> None:
    run = pair([shallow[: epochs + 1]] * n_seeds, [deep[: epochs + 1]] * n_seeds)
    assert deeper(run)["verdict"] == "too early"
    assert reason in deeper(run)["explanation"]
    assert headline(run)[0].startswith("It is too early to tell whether depth harms plain")
    assert ONE_SEED not in " ".join(headline(run))


def test_a_network_is_not_said_not_to_learn_before_400_steps() -> None:
    short, long = (recorded({("plain", 56): [PLAIN_56[: epochs + 1]]}) for epochs in (1, 20))
    assert (deeper(short)["verdict"], deeper(long)["verdict"]) == ("too early", "not learning")
    assert (
        "90.1 %, is not clearly below its value before the first step, 89.4 %: the network has taken 21 steps"
        in (deeper(short)["explanation"])
    )


def test_one_finished_seed_shows_a_large_difference_in_this_run_only() -> None:
    run = pair([PLAIN_20], [PLAIN_56])
    assert deeper(run)["verdict"] == "degraded optimisation"
    line, note = headline(run)
    assert line == (
        "In this run deeper is worse for plain: after epoch 20 the training error is 86.9 % for plain-56 and 0.0 % for "
        "plain-20."
    )
    assert note.startswith(ONE_SEED)
    assert "in this run, of one seed, the deeper network was harder to optimise" in deeper(run)["explanation"]
    assert "network is harder" not in printed(run)


def test_one_finished_seed_cannot_decide_a_small_difference() -> None:
    run = recorded({("resnet", 20): [RESNET_20], ("resnet", 56): [RESNET_56]})
    assert deeper(run)["verdict"] == "needs more seeds"
    line, note = headline(run)
    assert line.startswith(
        "One seed cannot tell whether depth harms resnet: after epoch 20 the training error is 3.8 %"
    )
    assert note.startswith(ONE_SEED)
    assert "but one seed cannot tell whether depth or the seed is the reason" in deeper(run)["explanation"]
    page = Page(html.page(summarise(run)))
    assert page.row("resnet-56")[1] == "needs more seedsepoch 20"
    assert "harder to optimise" not in page.text
    exploding = Recorded().add("plain", 20).add("plain", 56, (5.0, 6.0), end=EXPLODING)
    assert deeper(exploding)["verdict"] == "exploding"


def test_five_measured_seeds_decide_it() -> None:
    courses = [[*RESNET_56[:-1], final] for final in (3.8, 1.0, 0.1, 0.1, 1.9)]  # measured
    run = recorded({("resnet", 20): [RESNET_20] * 5, ("resnet", 56): courses})
    assert deeper(run)["verdict"] == "healthy"
    (line,) = headline(run)
    assert line.startswith("Deeper is not clearly worse for resnet: after epoch 20 the training error is 1.4 ± 1.5 %")


def test_three_finished_seeds_with_a_difference_are_degraded() -> None:
    run = pair([PLAIN_20] * 3, [[*PLAIN_56[:-1], final] for final in (84.0, 86.9, 88.0)])
    assert deeper(run)["verdict"] == "degraded optimisation"
    (line,) = headline(run)
    assert line.startswith("Deeper is worse for plain: after epoch 20 the training error is 86.3 ± 2.1 % for plain-56")
    assert "the deeper network is harder to optimise, and its gradients do not vanish" in deeper(run)["explanation"]


def test_three_finished_seeds_without_a_difference_are_healthy() -> None:
    run = pair([PLAIN_20] * 3, [PLAIN_20] * 3)
    assert deeper(run)["verdict"] == "healthy"
    (line,) = headline(run)
    assert line.startswith("Deeper is not clearly worse for plain: after epoch 20")


def test_one_seed_is_named_where_the_headline_is_about_overfitting() -> None:
    run = Recorded({"data": "digits", "epochs": 4, "test_images": 450})
    line, note = headline(run.add("plain", 8, (0.0, 5.6)).add("plain", 20, (0.0, 14.0)))
    assert line.startswith("In this run depth leads to overfitting for plain: after epoch 4")
    assert note.startswith(ONE_SEED)


@pytest.mark.parametrize(
    ("data", "families"),
    [
        pytest.param("digits", ["plain"], marks=pytest.mark.soak, id="digits"),
        pytest.param(f"cifar10:{REAL_CIFAR}", ["plain", "resnet"], marks=pytest.mark.soak, id="cifar10"),
    ],
)
def test_a_real_epoch_is_too_early(data: str, families: list[str], tmp_path: Path) -> None:
    if data != "digits" and not REAL_CIFAR.is_dir():
        pytest.skip(f"needs CIFAR-10 in {REAL_CIFAR}")
    sweep(out=tmp_path / "run.sqlite", data=data, families=families, depths=[8, 20], epochs=1, jobs=2)
    with open_run(tmp_path / "run.sqlite") as run:
        verdicts = {net.name: net.verdict for net in summarise(run).nets}
        assert {verdicts[f"{family}-20"] for family in families} == {"too early"}
        assert all(line.startswith("It is too early to tell") for line in headline(run))
