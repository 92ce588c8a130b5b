"""The line fitted over depth, and a layer compared with its own running mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.diagnose_cases import FALLING, FLAT, rules_of, snapshot

from gradprobe.diagnosis.depth import flow_verdict
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.errors import ArgumentError


def slope(factor: float, n_layers: int = 20, scale: float = 1.0) -> list[float]:
    """Returns norms that grow by a factor per layer towards the input; the first and the last are 1."""
    return [1.0, *(scale * factor**k for k in range(n_layers - 1, -1, -1)), 1.0]


# plain-34 of the ImageNet layout with batch normalisation on the digits, in epochs 2 of 2 and 4 of 20 of the sweep:
# the gradient exploded in the first steps and left the weights near the input with norms up to 1,000.
STANDING_OUT = {
    "2-of-2": "5.8e-4 3.3e-4 6.4e-4 4.6e-4 6.4e-4 2.9e-3 3.2e-3 1.5e-3 6.6e-4 7.7e-4 7.8e-4 7.7e-4 7.5e-4 9.7e-4 "
    "1.1e-3 1.7e-3 1.7e-3 2.1e-3 2.2e-3 3.1e-3 3.2e-3 3.8e-3 6.6e-3 6.3e-3 9.6e-3 1.4e-2 8.9e-3 1.5e-2 1.2e-2 1.6e-2 "
    "2.8e-2 1.1e-2 5.9e-3 2.5",
    "4-of-20": "2.8e-5 1.5e-5 1.7e-5 1.9e-5 3.8e-5 6.4e-5 1.4e-4 1.2e-4 2.6e-5 1.7e-5 1.8e-5 1.7e-5 1.7e-5 2.3e-5 "
    "2.9e-5 4.4e-5 4.4e-5 5.0e-5 6.4e-5 6.1e-5 8.4e-5 1.3e-4 2.2e-4 4.5e-4 3.8e-4 4.3e-4 6.1e-4 6.8e-4 1.7e-3 3.4e-4 "
    "3.7e-4 5.3e-4 2.2e-4 1.7e-1",
}


class TestLastLayer:
    @pytest.mark.parametrize("profile", STANDING_OUT.values(), ids=STANDING_OUT)
    def test_alone_with_a_large_norm_is_no_vanishing_gradient(self, profile: str) -> None:
        norms = [float(norm) for norm in profile.split()]
        assert norms[0] < 1e-3 * norms[-1]
        assert flow_verdict(norms) == "healthy"
        assert flow_verdict(norms, Thresholds(vanishing_norm=math.inf)) == "healthy"  # whatever its absolute size

    @pytest.mark.parametrize("factor", [0.55, 0.74], ids=["fast", "slow"])
    def test_on_a_gradual_slope_hides_nothing(self, factor: float) -> None:
        assert flow_verdict([1e-2 * factor**k for k in range(24, -1, -1)]) == "vanishing"

    def test_a_fall_over_a_few_of_many_layers_is_found(self) -> None:
        (finding,) = diagnose([snapshot(0, [*[1e-6] * 12, 1e-4, 1e-2, 1.0])])
        assert finding.title == "vanishing (backward)"
        assert "first/last 1.00e-06 is < 0.001" in finding.message

    def test_alone_counts_in_a_network_of_few_layers(self) -> None:
        assert flow_verdict([1e-5, 1e-5, 1e-5, 1.0]) == "vanishing"


class TestLine:
    @pytest.mark.parametrize(
        ("norms", "expected"),
        [
            (slope(1.5), "exploding"),
            (slope(1.1), "healthy"),  # 1.1^19 = 6
            (slope(0.5), "vanishing"),
            (slope(0.5, scale=1e6), "healthy"),  # nowhere small
            (slope(1.5, 9, scale=1.0), "healthy"),  # too few weights to trust a line
            (slope(100.0, 9), "healthy"),
            (slope(1.0), "healthy"),
            ([1.0, *[0.0] * 20, 1.0], "healthy"),  # other rules judge zeros
            ([1.0, *([1e-9, 1.0] * 10), 1.0], "healthy"),  # alternating norms have no slope
        ],
        ids=["grows", "hardly", "shrinks", "shrinks-from-large", "few", "few-steep", "flat", "zeros", "noise"],
    )
    def test_finds_what_first_and_last_norm_do_not_show(self, norms: list[float], expected: str) -> None:
        assert flow_verdict(norms) == expected

    def test_a_slope_within_its_error_does_not_count(self) -> None:
        noise = np.random.default_rng(0).normal(size=20)
        steep = [float(math.exp(0.25 * (19 - k) + noise[k])) for k in range(20)]
        assert flow_verdict([1.0, *steep, 1.0]) == "exploding"
        wild = [float(math.exp(0.25 * (19 - k) + 20 * noise[k])) for k in range(20)]
        assert flow_verdict([1.0, *wild, 1.0], Thresholds(vanishing_norm=0.0)) == "healthy"

    def test_the_finding_gives_factor_and_error(self) -> None:
        (finding,) = diagnose([snapshot(0, slope(1.5))])
        assert finding.title == "exploding (backward)"
        assert finding.evidence["factor_per_layer"] == pytest.approx(1.5)
        assert finding.evidence["std_error"] == pytest.approx(0.0, abs=1e-9)
        assert finding.evidence["ratio"] == 1.0
        assert "the line fitted to the 20 between them goes from 2.22e+03 to 1.00e+00, by 1.5 ±" in finding.message
        assert finding.sites == tuple(f"layer{k}.weight" for k in range(1, 10))  # 1.5^11 = 86, 1.5^10 = 58

    def test_a_finding_from_first_and_last_norm_gives_the_factor_too(self) -> None:
        (finding,) = diagnose([snapshot(0, [1.5**k for k in range(20, -1, -1)])])
        assert finding.evidence["factor_per_layer"] == pytest.approx(1.5)
        assert "line" not in finding.message

    def test_a_line_needs_three_weights(self) -> None:
        with pytest.raises(ArgumentError, match="slope_sites: needed at least 3, got 2"):
            Thresholds(slope_sites=2)


class TestDrift:
    def test_names_the_layer_that_falls_and_the_steps(self) -> None:
        history = [snapshot(step, [1.0, 2.0, 1e-4 if step >= 30 else 1.0, 1.0]) for step in range(45)]
        (finding,) = diagnose(history)
        assert (finding.rule, finding.sites, finding.steps) == ("layer drift", ("layer2.weight",), (30, 44))
        assert finding.evidence == {"factor": pytest.approx(1e-4), "drifted": 1.0}

    def test_the_first_to_fall_is_named_first(self) -> None:
        starts = [99, 35, 31, 33, 99, 99, 99]
        history = [snapshot(step, [0.0 if step >= start else 1.0 for start in starts]) for step in range(60)]
        (finding,) = [finding for finding in diagnose(history) if finding.rule == "layer drift"]
        assert finding.sites == ("layer2.weight", "layer3.weight", "layer1.weight")
        assert finding.steps == (31, 59)

    def test_layers_that_all_fall_together_do_not_drift(self) -> None:
        norms = [1e-3 ** (step / 20) for step in range(60)]
        assert rules_of([snapshot(step, [norm, 2 * norm, norm]) for step, norm in enumerate(norms)]) == []

    def test_most_layers_may_die(self) -> None:
        history = [snapshot(step, [1.0, *[float(step < 30)] * 4, 1.0]) for step in range(45)]
        silent, drift = diagnose(history)
        assert (silent.rule, silent.steps, drift.rule) == ("silent parameter", (30, 44), "layer drift")
        assert silent.sites == drift.sites == tuple(f"layer{k}.weight" for k in range(1, 5))

    @pytest.mark.parametrize(
        "norm",
        [
            lambda step: 1e-4 if 30 <= step < 42 else 1.0,
            lambda step: 1e-4 if step >= 36 else 1.0,
            lambda step: 0.01 if step >= 30 else 1.0,
        ],
        ids=["comes-back", "too-short", "not-far"],
    )
    def test_other_falls_are_no_drift(self, norm) -> None:  # type: ignore[no-untyped-def]
        assert rules_of([snapshot(step, [1.0, norm(step), 1.0, 1.0]) for step in range(45)]) == []

    def test_a_rise_counts_only_if_the_run_does_not_converge(self) -> None:
        def history(losses: list[float], before: float) -> list[str]:
            norms = [[1e4, 100.0 if step >= 25 else before, 1.0, 1.0, 1.0, 1.0, 1e4] for step in range(40)]
            steps = [snapshot(step, norms[step], loss=loss, n_classes=10) for step, loss in enumerate(losses)]
            return rules_of(steps)

        assert history(FLAT, 1.0) == ["layer drift", "not learning"]
        assert history(FALLING, 1.0) == []
        assert history(FLAT, 0.0) == ["not learning"]  # a weight whose gradient starts later has no mean before

    def test_two_weights_have_no_others_to_compare_with(self) -> None:
        assert rules_of([snapshot(step, [1.0, 1.0 if step < 30 else 1e-5]) for step in range(45)]) == []


def test_a_tied_weight_has_no_place_over_depth() -> None:
    steps = [snapshot(step, [90.0, 1.0, 1.0]) for step in range(12)]
    assert [finding.title for finding in diagnose(steps)] == ["exploding (backward)"]
    tied = [replace(one, table=replace(one.table, index={**one.table.index, "head.weight": 0})) for one in steps]
    assert diagnose(tied) == []
