"""Paired tests over seeds, against SciPy, and the sentence that opens a report."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import pytest
from helpers.report_cases import Recorded, degraded
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradprobe.report import terminal
from gradprobe.report.export import as_dict
from gradprobe.report.paired_tests import PairedTest, contrasts, opening
from gradprobe.report.summary import summarise

TRAINED = {"data": "digits", "epochs": 4, "train_images": 32_000, "batch_size": 64}


def sentence(run: Recorded) -> str:
    return opening(summarise(run))


def grid(errors: dict[tuple[str, int], tuple[float, ...]]) -> Recorded:
    """Returns a run with a training error for each seed of each network."""
    run = Recorded(dict(TRAINED))
    for (family, depth), of_seeds in errors.items():
        for seed, error in enumerate(of_seeds):
            run.add(family, depth, (error, error + 1), seed=seed)
    return run


FOUR = {
    ("plain", 20): (0.3, 0.4, 0.5),
    ("plain", 56): (65.0, 67.0, 69.0),
    ("resnet", 20): (0.0, 0.1, 0.2),
    ("resnet", 56): (0.1, 0.1, 0.2),
}


@given(st.lists(st.integers(-1000, 1000).map(lambda n: n / 10), min_size=2, max_size=8))
def test_the_paired_test_is_scipys(differences: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    test = PairedTest(tuple(differences))
    if len({*differences}) == 1:
        assert test.p_value == (0.0 if differences[0] else 1.0)
        assert test.interval == pytest.approx((differences[0], differences[0]))
        return
    expected = stats.ttest_1samp(differences, 0)
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    interval = expected.confidence_interval(0.95)
    assert test.interval == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)
    assert test.effect == pytest.approx(expected.statistic / math.sqrt(len(differences)), rel=1e-6, abs=1e-9)


def test_the_report_opens_with_what_depth_and_shortcuts_do() -> None:
    run = grid(FOUR)
    text = sentence(run)
    assert text == (
        "After epoch 4, plain-56 trains worse than plain-20 (training error +66.6 points, 95 % interval +61.9 to "
        "+71.3, p < 0.001, d = 35.1, 3 seeds); resnet-56 does not train significantly differently from resnet-20 "
        "(training error +0.0 points, 95 % interval -0.1 to +0.2, p = 0.423, d = 0.6, 3 seeds); resnet-56 trains "
        "better than plain-56 (training error -66.9 points, 95 % interval -71.7 to -62.0, p < 0.001, d = -34.3, 3 "
        "seeds)."
    )
    screen = StringIO()
    Console(file=screen, width=100).print(terminal.render(run))
    first = screen.getvalue().split("\n\n")[1]
    assert " ".join(first.split()) == text
    assert as_dict(run)["opening"] == text


def test_every_family_is_compared_with_plain() -> None:
    text = sentence(grid({**FOUR, ("my", 20): (0.1, 0.3, 0.5), ("my", 56): (30.0, 31.0, 32.0)}))
    claims = [
        "plain-56 trains worse than plain-20",
        "resnet-56 does not train significantly differently from resnet-20",
        "my-56 trains worse than my-20",
        "resnet-56 trains better than plain-56",
        "my-56 trains better than plain-56",
    ]
    assert [clause.split(" (")[0] for clause in text.removeprefix("After epoch 4, ").split("; ")] == claims


def test_every_family_is_compared_with_its_network_without_residual_adds() -> None:
    families = ("plain", "resnet", "fixup", "transformer-pre", "transformer-plain")
    run = grid({(family, 20): (place, place + 0.2, place + 0.3) for place, family in enumerate(families)})
    pairs = [(one.name, one.other) for one in contrasts(summarise(run))]
    assert pairs == [
        ("resnet-20", "plain-20"),
        ("fixup-20", "plain-20"),
        ("transformer-pre-20", "transformer-plain-20"),
    ]
    text = sentence(run)
    assert all(f"{name} trains " in text and f" than {other} " in text for name, other in pairs)


def test_seeds_are_paired_by_their_number() -> None:
    run = grid({("plain", 20): (1.0, 5.0, 9.0), ("plain", 56): (2.0, 6.1, 10.2)})
    run.rows[3:] = [replace(cell, seed=2 - cell.seed) for cell in run.rows[3:]]
    (one,) = contrasts(summarise(run))
    assert one.seeds == (0, 1, 2)
    assert one.test is not None
    assert one.test.differences == pytest.approx((9.2, 1.1, -7.0))


def test_only_common_finite_seeds_are_compared() -> None:
    run = grid({("plain", 20): (1.0, 2.0, 3.0), ("plain", 56): (5.0, 7.0)})
    (one,) = contrasts(summarise(run))
    assert one.seeds == (0, 1)
    run = grid({("plain", 20): (1.0, 2.0), ("plain", 56): (5.0, 7.0, 9.0)})
    (one,) = contrasts(summarise(run))
    assert one.seeds == (0, 1)
    run = grid({("plain", 20): (1.0, 2.0), ("plain", 56): (math.nan, 7.0)})
    assert "cannot be compared, as some are not finite" in sentence(run)


def test_running_errors_are_compared_with_their_like() -> None:
    """One of the networks has also the error over the whole set, which is lower."""
    run = grid({("plain", 20): (1.0, 1.2), ("plain", 56): (60.0, 62.0)})
    for cell, rows in run.epoch_rows.items():
        whole = rows[-1].train_error_pct
        kept = whole if cell < 3 else math.nan
        rows[-1] = replace(rows[-1], train_error_pct=kept, running_error_pct=whole + 10.0)
    (one,) = contrasts(summarise(run))
    assert one.is_running
    assert one.test is not None
    assert one.test.differences == pytest.approx((59.0, 60.8))
    assert "plain-56 trains worse than plain-20 (running training error +59.9 points" in sentence(run)


def test_one_seed_makes_no_claim() -> None:
    text = sentence(grid({net: errors[:1] for net, errors in FOUR.items()}))
    assert text == "One seed: no claim about depth or shortcuts."


def test_a_few_steps_are_too_early() -> None:
    run = Recorded({"data": "cifar10", "epochs": 1, "train_images": 5_000, "batch_size": 128})
    for seed in range(3):
        for family, errors in {"plain": (60.0, 85.0), "resnet": (55.0, 66.0)}.items():
            for depth, error in zip((8, 20), errors, strict=True):
                run.add(family, depth, (error + seed, error + seed), seed=seed, epochs=1)
    assert sentence(run) == (
        "After epoch 1, it is too early to compare plain-20 with plain-8 (39 steps); it is too early to compare "
        "resnet-20 with resnet-8 (39 steps); it is too early to compare resnet-20 with plain-20 (39 steps)."
    )


def test_a_difference_too_small_to_matter_is_slight() -> None:
    text = sentence(grid({("plain", 20): (1.0, 1.1, 1.2), ("plain", 56): (1.5, 1.6, 1.71)}))
    assert "plain-56 trains slightly worse than plain-20 (training error +0.5 points" in text


@pytest.mark.parametrize("run", [Recorded(), Recorded().add("plain", 20), Recorded().add("plain", 20, epochs=0)])
def test_nothing_to_compare_has_no_opening(run: Recorded) -> None:
    assert sentence(run) == ""
    assert as_dict(run)["paired_tests"] == []


def test_every_test_is_exported() -> None:
    tests = as_dict(degraded())["paired_tests"]
    assert isinstance(tests, list)
    assert [(one["net"], one["other"]) for one in tests] == [
        ("plain-56", "plain-20"),
        ("resnet-56", "resnet-20"),
        ("resnet-20", "plain-20"),
        ("resnet-56", "plain-56"),
    ]
    assert {"mean", "p_value", "effect", "interval95", "values"} == set(tests[0]["train_error_difference_pct"])
