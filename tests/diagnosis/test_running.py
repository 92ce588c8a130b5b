"""A diagnosis that is made as the steps come: findings stay, and time and memory per step do not grow."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable

import pytest
from helpers.diagnose_cases import FALLING, course, layers, passing, snapshot

from gradprobe.diagnosis.causes import causes_first
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.rules.activations import DEAD_RELU
from gradprobe.diagnosis.rules.gradients import VANISHING
from gradprobe.diagnosis.running import RunningDiagnosis
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.snapshot import Snapshot


def running(steps: Iterable[Snapshot]) -> RunningDiagnosis:
    found = RunningDiagnosis()
    for step in steps:
        found.take(step)
    return found


def noisy(n_steps: int, first: int = 0) -> list[Snapshot]:
    return [snapshot(first + step, [1.0 + 0.1 * (-1) ** step, 1.0]) for step in range(n_steps)]


def titles(diagnosis: Diagnosis) -> list[str]:
    return [finding.title for finding in diagnosis]


class TestFindingsStay:
    def test_a_spike_of_long_ago_keeps_its_step(self) -> None:
        steps = [*noisy(60), snapshot(60, [90.0, 1.0]), *noisy(3000, first=61)]
        (finding,) = diagnose(steps)
        assert (finding.rule, finding.steps) == ("spike", (60, 60))
        assert "step 60: total norm 90" in finding.message

    def test_a_nan_of_long_ago_is_told_with_all_steps_that_had_one(self) -> None:
        broken = [snapshot(step, [1.0, 1.0], nonfinite=step in (40, 700)) for step in range(2000)]
        (finding,) = diagnose(broken)
        assert (finding.rule, finding.steps) == ("non-finite", (40, 700))

    def test_a_lasting_fault_says_when_it_was_gone(self) -> None:
        steps = [snapshot(step, [1e-9, 1.0] if step < 300 else [1.0, 1.0]) for step in range(1000)]
        (finding,) = diagnose(steps)
        assert (finding.title, finding.steps[0]) == ("vanishing (backward)", 0)
        assert 200 <= finding.steps[1] <= 299
        assert finding.message.endswith(f"not found any more after step {finding.steps[1]}")

    def test_a_fault_is_not_gone_because_gradients_are_nan(self) -> None:
        def step_of(step: int) -> Snapshot:
            return snapshot(step, [1e-9, 1.0]) if step < 300 else snapshot(step, [math.nan, math.nan], nonfinite=1)

        findings = diagnose([step_of(step) for step in range(1000)])
        (message,) = [one.message for one in findings if one.title == "vanishing (backward)"]
        assert "any more" not in message

    def test_units_that_were_dead_before_the_first_update_still_are_later(self) -> None:
        steps = [snapshot(step, [1.0] * 6, zeros=0.8) for step in range(1000)]
        (finding,) = diagnose(steps)
        assert "before the first update" in finding.cause
        assert finding.remedies[0].startswith("He initialisation")

    def test_a_fault_that_lasts_is_told_with_its_newest_numbers(self) -> None:
        steps = [snapshot(step, [1e-9 * (step + 1), 1.0]) for step in range(400)]
        (finding,) = diagnose(steps)
        assert finding.steps == (0, 399)
        assert finding.evidence["norm_first"] == pytest.approx(4e-7)
        assert "any more" not in finding.message

    def test_a_fault_that_begins_late_need_not_fill_half_of_the_run(self) -> None:
        steps = [snapshot(step, [1.0, 1.0] if step < 5000 else [1e-9, 1.0]) for step in range(5100)]
        (finding,) = diagnose(steps)
        assert (finding.title, finding.steps) == ("vanishing (backward)", (5000, 5099))

    def test_a_layer_that_is_cut_off_between_two_windows_is_found(self) -> None:
        for cut in range(100, 260, 10):
            steps = [snapshot(step, [1.0, 1.0, 1.0, 1.0 if step < cut else 1e-7]) for step in range(600)]
            assert "layer drift" in titles(diagnose(steps)), cut

    def test_an_excused_fault_is_dropped_once_the_loss_has_fallen(self) -> None:
        losses = [2.3] * 150 + [2.3 * 0.98**step for step in range(150)]
        assert titles(diagnose(course(losses[:150], [1e-9, 1.0]))) == ["vanishing (backward)", "not learning"]
        assert titles(diagnose(course(losses, [1e-9, 1.0]))) == []

    def test_a_model_that_changes_keeps_its_findings(self) -> None:
        found = running([*noisy(40), snapshot(40, [1.0, 1.0], nonfinite=1), *noisy(5, first=41)])
        for step in range(46, 90):
            found.take(snapshot(step, [1.0, 1.0, 1.0]))
        assert titles(found.read()) == ["non-finite"]
        assert found.read().n_steps == 90


class TestReading:
    def test_reading_changes_nothing(self) -> None:
        steps = [snapshot(step, [1.0, 1.0], loss=loss, n_classes=10) for step, loss in enumerate(FALLING * 8)]
        once, often = running(steps), RunningDiagnosis()
        for step in steps:
            often.take(step)
            often.read()
        assert once.read().to_dict() == often.read().to_dict()

    def test_the_newest_step_counts_without_being_taken(self) -> None:
        found = running(noisy(30))
        newest = snapshot(30, [1.0, 1.0], nonfinite=1)
        assert titles(found.read(newest)) == ["non-finite"]
        assert titles(found.read()) == []

    def test_a_step_that_is_taken_back_does_not_count(self) -> None:
        found = running([*noisy(30), snapshot(30, [1.0, 1.0], nonfinite=1)])
        found.forget(30)
        assert (titles(found.read()), found.read().n_steps) == ([], 30)

    def test_rules_that_were_judged_once_stay_judged(self) -> None:
        with_loss = course(FALLING)
        diagnosis = diagnose([*with_loss, *(snapshot(step, [1.0, 1.0], n_classes=10) for step in range(40, 400))])
        assert "not learning" in diagnosis.judged
        assert "not learning" not in diagnosis.unjudged


class TestCost:
    def test_memory_does_not_grow_with_the_run(self) -> None:
        def kept(found: RunningDiagnosis) -> int:
            course = found._state.course
            return sum(map(len, (found._recent, found._observed, found._updated, course.losses, course.norms)))

        found = running(course([1.0 + 0.1 * (-1) ** step for step in range(2000)]))
        before = kept(found)
        for step in course([1.0 + 0.1 * (-1) ** step for step in range(4000)], first=2000):
            found.take(step)
        assert kept(found) == before

    def test_late_steps_cost_no_more_than_early_ones(self) -> None:
        steps = course([1.0 + 0.1 * (-1) ** step for step in range(6000)])
        found = running(steps[:1500])  # all windows are full

        def cost(some: list[Snapshot]) -> float:
            start = time.process_time()
            for step in some:
                found.take(step)
            return time.process_time() - start

        early, late = cost(steps[1500:3000]), cost(steps[4500:6000])
        assert late < 3 * early


class TestCauses:
    def test_a_cause_stands_before_its_symptoms(self) -> None:
        losses = [2.3 + 0.001 * (-1) ** step for step in range(40)]
        findings = diagnose(course(losses, [1e-9, 1.0]))
        assert [(found.title, found.follows) for found in findings] == [
            ("vanishing (backward)", ""),
            ("not learning", "vanishing (backward)"),
        ]
        text = str(findings)
        assert text.startswith("1 fault in 40 steps")
        assert "   It explains:\n   - not learning, steps 0 to 39: the loss is that of a guess\n" in text

    def test_of_nan_gradients_and_a_nan_loss_the_first_is_the_cause(self) -> None:
        gradients_first = [*course([2.3] * 3), snapshot(3, [math.nan, 1.0], nonfinite=1, loss=2.3, n_classes=10)]
        gradients_first.append(snapshot(4, [math.nan, 1.0], nonfinite=1, loss=math.nan, n_classes=10))
        assert titles(diagnose(gradients_first)) == ["non-finite", "loss blow-up"]
        assert diagnose(gradients_first)[1].follows == "non-finite"
        loss_first = [*course([2.3, 2.3, 1e9]), snapshot(3, [math.nan, 1.0], nonfinite=1, loss=math.nan, n_classes=10)]
        findings = diagnose(loss_first)
        assert [(found.title, found.follows) for found in findings] == [
            ("loss blow-up", ""),
            ("non-finite", "loss blow-up"),
        ]

    def test_the_text_fits_a_terminal_and_rich_marks_the_titles(self) -> None:
        diagnosis = diagnose(course([2.3] * 40, [1e-9, 1.0]))
        assert max(map(len, str(diagnosis).splitlines())) <= 100
        assert diagnosis.__rich__().plain == str(diagnosis)
        assert any("bold" in str(span.style) for span in diagnosis.__rich__().spans)


def test_the_diagnosis_needs_no_torch_to_import() -> None:
    import subprocess

    code = "import sys, gradprobe.diagnosis.diagnose; print('torch' in sys.modules, 'rich' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]


class TestOddRuns:
    """Found by a review of trainings that do not look like the tests'."""

    def test_a_change_of_parameters_leaves_rules_without_data_unjudged(self) -> None:
        observed = passing([2.3] * 40, layers([1.0] * 3), n_weights=3)
        found = running([*observed, *(snapshot(step, [1.0] * 5) for step in range(40, 45))])
        assert "precision loss" in found.read().judged

    def test_one_step_after_a_change_is_no_silence(self) -> None:
        found = running(noisy(60))
        found.take(snapshot(60, [1.0, 0.0, 1.0]))
        assert titles(found.read()) == []

    def test_a_loss_of_exactly_zero_is_solved(self) -> None:
        losses = [max(0.0, 1.0 - 0.01 * step) for step in range(400)]
        steps = [snapshot(step, [loss, loss], loss=loss, n_classes=10) for step, loss in enumerate(losses)]
        assert titles(diagnose(steps)) == []

    def test_a_cause_does_not_come_after_its_symptom(self) -> None:
        steps = [snapshot(step, [1.0, 1.0], nonfinite=step == 12) for step in range(600)]
        steps += [snapshot(step, [1e4, 1.0]) for step in range(600, 1000)]
        found = {found.title: found.follows for found in diagnose(steps)}
        assert (found["non-finite"], found["exploding (backward)"]) == ("", "")

    def test_a_fault_that_lasts_says_since_when(self) -> None:
        dead = passing([2.3] * 600, layers([1.0] * 3, zeros=0.999), n_weights=3)
        (finding,) = [found for found in diagnose(dead) if found.rule == "dead ReLU"]
        assert finding.message.endswith("; first found in step 88")

    def test_norms_of_any_magnitude_are_judged_without_a_warning(self, recwarn: pytest.WarningsRecorder) -> None:
        for norms in ([1e150] * 6 + [1e-150] * 8, [1e-150] * 14, [0.0] * 14, [1e150] + [math.inf] * 13):
            steps = [snapshot(step, norms, loss=1e308, n_classes=10) for step in range(40)]
            assert diagnose(steps).n_steps == 40
        assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(("first", "follows"), [(100, "dead ReLU"), (186, "")])
def test_what_begins_long_after_a_fault_does_not_explain_it(first: int, follows: str) -> None:
    dead = DEAD_RELU.finding(("0",), (first, 299), {}, "")
    vanishing = VANISHING.finding(("0.weight",), (0, 299), {}, "")
    found = {one.title: one.follows for one in causes_first([vanishing, dead])}
    assert found == {"dead ReLU": "", "vanishing (backward)": follows}


def test_how_long_before_depends_on_the_thresholds() -> None:
    found = [VANISHING.finding(("0.weight",), (0, 299), {}, ""), DEAD_RELU.finding(("0",), (186, 299), {}, "")]
    wide = Thresholds(spike_warm_up=100)
    assert wide.n_recent > 186
    assert {one.title: one.follows for one in causes_first(found, wide)}["vanishing (backward)"] == "dead ReLU"
