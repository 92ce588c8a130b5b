"""The rule on unstable losses: a loss that falls and rises again is told from one that is only noisy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.diagnose_cases import course, rules_of

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.rules.loss import UNSTABLE_LOSS
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.diagnosis.thresholds import Thresholds


def noisy(levels: list[float], spread: float = 0.02, n_each: int = 10, seed: int = 0) -> list[float]:
    """Returns losses that stay at each level for `n_each` steps, with normal noise of this relative size."""
    rng = np.random.default_rng(seed)
    return [level * (1 + spread * rng.standard_normal()) for level in levels for _ in range(n_each)]


def test_it_names_the_rise_and_its_steps() -> None:
    (finding,) = diagnose(course(noisy([2.3, 1.0, 0.4, 0.5, 1.4, 2.2])))[:1]
    assert finding.rule == "unstable loss"
    assert finding.steps == (20, 59)
    assert finding.evidence["loss_low"] == pytest.approx(0.4, rel=0.05)
    assert finding.evidence["loss_high"] == pytest.approx(2.2, rel=0.05)
    assert "it falls and rises 2 times" in finding.message


def test_it_counts_the_swings() -> None:
    (finding,) = diagnose(course(noisy([*[2.0, 1.0] * 6, 2.0], spread=0.01)))[:1]
    assert (finding.rule, finding.evidence["turns"]) == ("unstable loss", 12.0)


def test_a_single_rise_is_reported_too() -> None:
    found = diagnose(course(noisy([2.3, 2.3, 30.0, 80.0], spread=0.05)))
    assert found[0].rule == "unstable loss"
    assert "falls and rises" not in found[0].message


@pytest.mark.parametrize(
    ("levels", "spread"),
    [
        ([2.3, 1.0, 0.4, 0.2, 0.4, 0.3], 0.02),  # converges nevertheless
        ([2.3, 2.2, 2.1, 2.2, 2.3, 2.3], 0.001),  # significant but small
        ([2.3, 1.7, 2.3, 1.7, 2.3, 2.3], 0.4),  # no more than the batches explain
        ([-2.0, -1.0, -2.0, -1.0], 0.01),
    ],
    ids=["converges", "small", "noise", "below zero"],
)
def test_other_courses_are_not_unstable(levels: list[float], spread: float) -> None:
    assert "unstable loss" not in rules_of(course(noisy(levels, spread)))


def test_losses_may_be_noiseless_or_huge() -> None:
    assert "unstable loss" in rules_of(course([1.0] * 10 + [2.0] * 20))
    assert "unstable loss" not in rules_of(course([1e200] * 10 + [2e200 + 1e199 * (-1) ** k for k in range(20)]))


def test_a_loss_that_becomes_nan_is_left_to_other_rules() -> None:
    assert "unstable loss" not in rules_of(course([*noisy([2.3, 1.0, 2.3, 2.3]), math.nan]))


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.7, 1.0])
def test_long_noisy_plateaus_give_no_false_alarm(spread: float) -> None:
    steps = course([1.0] * 1000)
    for seed in range(50):
        losses = np.random.default_rng(seed).gamma(spread**-2, spread**2, 1000).tolist()
        history = RunHistory.of([replace(one, loss=loss) for one, loss in zip(steps, losses, strict=True)])
        assert UNSTABLE_LOSS.check(history) is None, seed


def test_the_limit_can_be_set() -> None:
    losses = noisy([2.3, 1.7, 2.3, 1.7, 2.3, 2.3], 0.2)
    assert "unstable loss" not in rules_of(course(losses))
    assert "unstable loss" in [one.rule for one in diagnose(course(losses), Thresholds(swing_errors=2.0))]
