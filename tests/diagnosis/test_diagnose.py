"""The rules on synthetic snapshots."""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.diagnose_cases import FALLING, FLAT, course, rules_of, snapshot

from gradprobe.diagnosis.depth import flow_verdict
from gradprobe.diagnosis.diagnose import diagnose, verdict
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.errors import ArgumentError
from gradprobe.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.records import Measured


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.2, 0.56], "healthy"),  # plain-20 with BN
        ([240.0, 0.53], "exploding"),  # plain-56 with BN, at initialisation
        ([6.0e5, 0.47], "exploding"),  # plain-110 with BN
        ([2.5, 1.4], "healthy"),  # ResNet-56 with BN
        ([2.1e-6, 6.0e-3], "vanishing"),  # plain-56 without BN
        ([1.7e-11, 5.5e-3], "vanishing"),  # plain-110 without BN
        ([1e-9, 1e-9], "healthy"),  # small in all layers: a small loss, not a vanishing gradient
        ([0.0, 0.0], "vanishing"),
        ([1e-3, 1e3], "healthy"),  # the ratio alone is not enough
        ([math.nan, 1.0], "non-finite"),
        ([1.0, math.inf], "non-finite"),
        ([], "healthy"),
    ],
    ids=lambda value: str(value),
)
def test_verdict_on_norms_over_depth(norms: list[float], expected: str) -> None:
    assert flow_verdict(norms) == expected


def test_a_finding_names_sites_steps_evidence_and_source() -> None:
    (finding,) = diagnose([snapshot(step, [1e-9, 2e-7, 1e-2]) for step in (3, 4, 5)])
    assert (finding.rule, finding.where, finding.title) == ("vanishing", "backward", "vanishing (backward)")
    assert finding.sites == ("layer0.weight", "layer1.weight")
    assert finding.steps == (3, 5)
    assert finding.evidence == {"norm_first": 1e-9, "norm_last": 1e-2, "ratio": pytest.approx(1e-7)}
    assert "1.00e-09 at layer0.weight" in finding.message
    assert "AUTOTRAINER" in finding.source


def test_a_brief_dip_is_no_finding_but_a_single_nan_is() -> None:
    healthy = [snapshot(step, [1.0, 1.0]) for step in range(4)]
    assert diagnose([*healthy, snapshot(4, [1e-9, 1.0])]) == []
    assert verdict(healthy) == "healthy"
    (finding,) = diagnose([*healthy, snapshot(4, [math.nan, 1.0], nonfinite=1), *healthy[:1]])
    assert (finding.rule, finding.sites, finding.steps) == ("non-finite", ("layer0.weight",), (4, 4))
    assert verdict([*healthy, snapshot(4, [math.nan, 1.0], nonfinite=1)]) == "non-finite"


def test_a_gradient_that_explodes_first_and_then_vanishes_is_exploding() -> None:
    exploding, vanishing, healthy = [240.0, 0.53], [1e-9, 0.2], [1.0, 1.0]
    history = [snapshot(step, norms) for step, norms in enumerate([exploding] * 3 + [healthy] * 2 + [vanishing] * 15)]
    (finding,) = diagnose(history)
    assert (finding.title, finding.steps, finding.sites) == ("exploding (backward)", (0, 2), ("layer0.weight",))
    assert finding.evidence == {
        "norm_first": 240.0,
        "norm_last": 0.53,
        "ratio": pytest.approx(453, rel=1e-3),
        "vanishing_steps": 15.0,
    }
    assert "in 15 later steps it vanishes" in finding.message
    assert [one.title for one in diagnose(history[3:])] == ["vanishing (backward)"]
    assert [one.title for one in diagnose(history[3:] + history[:3])] == ["vanishing (backward)"]


def test_thresholds_can_be_set() -> None:
    norms = [10.0, 1.0]
    assert flow_verdict(norms) == "healthy"
    assert flow_verdict(norms, Thresholds(exploding_ratio=5.0)) == "exploding"


def test_a_model_with_vectors_only_is_judged_by_them() -> None:
    assert verdict([snapshot(0, [1e-9, 1.0], ndim=1)]) == "vanishing"


def test_an_empty_history_is_healthy() -> None:
    assert diagnose([]) == []
    assert verdict([]) == "healthy"


class TestCourse:
    def test_ratios_over_depth_are_no_fault_if_the_loss_falls(self) -> None:
        assert rules_of(course(FALLING, [1e-9, 1.0])) == []
        assert rules_of(course(FLAT, [1e-9, 1.0])) == ["vanishing", "not learning"]
        assert rules_of(course(FLAT, [1e3, 1.0])) == ["exploding", "not learning"]
        assert rules_of(course(FALLING[:5], [1e3, 1.0])) == ["exploding"]  # too early to tell

    def test_a_bias_before_the_last_normalisation_does_not_tell_the_number_of_classes(self) -> None:
        """As in GPT-2, whose head has no bias and shares the weights of the embedding, the first parameter."""

        def normalised(one: Snapshot) -> Snapshot:
            names = (*one.table.names, "norm.weight", "norm.bias")
            table = SiteTable(
                names, ("parameter",) * len(names), (*one.table.ndims, 1, 1), {name: k for k, name in enumerate(names)}
            )
            measured = Measured(np.append(one.measured.present, [True] * 2), np.append(one.measured.numels, [10] * 2))
            return replace(one, table=table, rows=one.rows[[*range(len(one.rows)), 0, 0]], measured=measured)

        steps = course(FLAT)
        assert rules_of(steps) == ["not learning"]
        diagnosis = diagnose([normalised(one) for one in steps])
        assert [finding.rule for finding in diagnosis] == []
        assert diagnosis.unjudged["not learning"].startswith("a bias in the last layer")

    def test_a_level_low_loss_without_the_first_steps_is_no_finding(self) -> None:
        assert rules_of(course([0.01 + 1e-4 * (-1) ** step for step in range(40)], first=5000)) == []

    def test_a_loss_that_blew_up_and_came_down_is_reported(self) -> None:
        losses = [2.3, 2e3, 3e13, 68.0, *[80.0 + (-1) ** step for step in range(36)]]
        assert rules_of(course(losses))[0] == "loss blow-up"
        (finding,) = [finding for finding in diagnose(course(losses)) if finding.rule == "loss blow-up"]
        assert finding.steps == (1, 2)
        assert finding.evidence == {"loss": 2e3, "loss_at_start": 2.3}
        assert finding.remedies[0] == "a lower learning rate or a warm-up"

    def test_a_huge_loss_that_falls_is_no_fault(self) -> None:
        huge = [1e5 * loss for loss in FALLING]
        assert rules_of(course(huge)) == []
        (finding,) = diagnose(course(huge[:5]))  # too early to tell; only the first step counts
        assert (finding.rule, finding.steps) == ("loss blow-up", (0, 0))

    def test_a_loss_that_becomes_nan_is_reported(self) -> None:
        assert rules_of(course([*FALLING[:30], math.nan])) == ["loss blow-up"]

    def test_a_spike_is_reported_with_its_step_and_a_slow_rise_is_not(self) -> None:
        history = [snapshot(step, [1.0 + 0.1 * (-1) ** step]) for step in range(30)]
        (finding,) = diagnose([*history, snapshot(30, [9.0]), *history[:5]])
        assert (finding.rule, finding.steps) == ("spike", (30, 30))
        assert finding.evidence["value"] == pytest.approx(9.0)
        rising = [1.0 + 0.001 * (-1) ** step + 0.1 * max(0, step - 25) for step in range(60)]
        assert rules_of([snapshot(step, [norm]) for step, norm in enumerate(rising)]) == []

    def test_a_spike_after_constant_steps(self) -> None:
        (finding,) = diagnose(course([1.0] * 25 + [5.0], first=500))
        assert (finding.rule, finding.steps, finding.evidence["sigma"]) == ("spike", (525, 525), 0.0)
        assert rules_of(course([-100.0 + 0.1 * (-1) ** step for step in range(30)] + [-99.0], first=500)) == []

    def test_a_step_that_a_scaler_skipped_is_no_fault_and_hides_no_fault(self) -> None:
        first = replace(snapshot(0, [math.inf], nonfinite=1), skipped=True)
        healthy = [snapshot(step, [1.0 + 0.1 * (-1) ** step]) for step in range(1, 40)]
        assert diagnose([first, *healthy]) == []
        (finding,) = diagnose([first, *healthy, snapshot(40, [99.0])])
        assert (finding.rule, finding.steps) == ("spike", (40, 40))
        assert rules_of([replace(one, skipped=True) for one in (first, first)] + healthy[:1]) == ["non-finite"]

    def test_a_run_that_learns_in_its_first_steps_counts_as_learning(self) -> None:
        assert rules_of(course([2.3] + [0.01] * 39)) == []
        assert rules_of(course([2.3 * 0.5**step for step in range(40)])) == []

    def test_a_history_that_starts_late_in_a_run_shows_neither_blow_up_nor_lack_of_learning(self) -> None:
        assert rules_of(course([5e3 + 10.0 * (-1) ** step for step in range(40)], first=5000)) == []
        late = [snapshot(step, [1.0], n_classes=10) for step in range(60)]
        assert rules_of(late + course([0.01 + 1e-4 * (-1) ** step for step in range(40)], [1.0], first=60)) == []

    def test_a_negative_loss_hides_no_exploding_gradient(self) -> None:
        falling = [-2.3 - 0.01 * step for step in range(40)]
        assert rules_of(course(falling, [1e3, 1.0])) == ["exploding"]

    def test_snapshots_of_different_probes_are_rejected(self) -> None:
        with pytest.raises(ArgumentError, match="snapshots: needed the history of one probe"):
            diagnose([snapshot(0, [1.0]), snapshot(1, [1.0, 1.0])])

    @pytest.mark.parametrize(("name", "value"), [("window", 1), ("spike_warm_up", 0), ("spike_window", 0)])
    def test_limits_that_are_too_small_are_rejected(self, name: str, value: int) -> None:
        with pytest.raises(ArgumentError, match=f"{name}: needed at least"):
            Thresholds(**{name: value})

    def test_layers_of_zeros_are_dying_and_a_lone_embedding_is_not(self) -> None:
        assert rules_of([snapshot(step, [1.0] * 6, zeros=0.8) for step in range(9)]) == []  # not long enough
        assert rules_of([snapshot(step, [1.0] * 6, zeros=0.8) for step in range(10)]) == ["dying"]
        history = [snapshot(step, [1.0] * 6) for step in range(10)]
        for one in history:
            one.rows[0, 4] = 0.9
        assert diagnose(history) == []
        few = [snapshot(step, [1.0] * 3) for step in range(10)]
        for one in few:
            one.rows[0, 4] = 0.9
        assert diagnose(few) == []
        assert rules_of([snapshot(step, [1.0] * 4, zeros=0.8, loss=loss) for step, loss in enumerate(FALLING)]) == []

    @pytest.mark.parametrize(
        ("n_healthy", "cause", "remedy"),
        [(0, "before the first update", "He initialisation"), (1, "too large an update", "a lower learning rate")],
    )
    def test_units_that_are_dead_before_the_first_update_died_of_no_update(
        self, n_healthy: int, cause: str, remedy: str
    ) -> None:
        history = [snapshot(step, [1.0] * 6, zeros=0.0 if step < n_healthy else 0.8) for step in range(60)]
        (finding,) = diagnose(history)
        assert cause in finding.cause
        assert finding.remedies[0].startswith(remedy)
        assert len(set(finding.remedies)) == 4

    def test_a_parameter_that_never_gets_a_gradient_is_silent(self) -> None:
        (finding,) = diagnose([snapshot(step, [1.0, 0.0, 1.0, 1.0, 1.0]) for step in range(12)])
        assert (finding.rule, finding.sites, finding.steps) == ("silent parameter", ("layer1.weight",), (0, 11))
        assert rules_of([snapshot(step, [1.0, float(step > 0), 1.0]) for step in range(12)]) == []

    def test_a_parameter_whose_gradient_stops_is_silent_although_the_loss_falls(self) -> None:
        history = [snapshot(step, [1.0, float(step < 20)], loss=loss) for step, loss in enumerate(FALLING)]
        (finding,) = diagnose(history)
        assert (finding.rule, finding.sites, finding.steps) == ("silent parameter", ("layer1.weight",), (20, 39))
        assert rules_of(history[:29]) == []

    def test_a_gradient_that_is_zero_everywhere_is_compared_with_nothing(self) -> None:
        (finding, *_) = diagnose([snapshot(step, [0.0, 0.0, 0.0]) for step in range(12)])
        assert finding.message.startswith("step 11: no gradient at all reaches layer0.weight: it is exactly zero there")
