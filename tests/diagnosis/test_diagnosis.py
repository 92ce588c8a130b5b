"""What a diagnosis says of a run, and of how much it could judge."""

import json

import pytest
import torch
from helpers.diagnose_cases import FALLING, FLAT, course, layers, snapshot, with_outputs
from helpers.probe_cases import loss_of, mlp

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose


class TestHealth:
    def test_nothing_seen_is_not_healthy(self) -> None:
        diagnosis = diagnose([])
        assert (len(diagnosis), bool(diagnosis), diagnosis.healthy, diagnosis.judged) == (0, False, None, ())

    def test_a_few_steps_are_too_early(self) -> None:
        diagnosis = diagnose([snapshot(step, [1.0, 1.0]) for step in range(9)])
        assert diagnosis.healthy is None
        assert str(diagnosis).startswith("No fault so far, but too little was seen to call it healthy: 9 steps, ")

    def test_steps_without_a_fault_are_healthy(self) -> None:
        diagnosis = diagnose(course(FALLING))
        assert (diagnosis.healthy, diagnosis.n_steps, list(diagnosis)) == (True, len(FALLING), [])

    def test_a_fault_is_not_healthy_however_early(self) -> None:
        diagnosis = diagnose([snapshot(0, [1.0, 1.0], nonfinite=1)])
        assert (bool(diagnosis), diagnosis.healthy, diagnosis[0].rule) == (True, False, "non-finite")


class TestUnjudgedRules:
    def test_rules_that_lack_something_say_what(self) -> None:
        diagnosis = diagnose([snapshot(step, [1.0, 1.0]) for step in range(12)])
        assert diagnosis.unjudged["not learning"] == "probe.step(loss)"
        assert diagnosis.unjudged["dead ReLU"] == "attach(activations=True)"
        assert diagnosis.unjudged["updates too large"] == "attach(updates=True)"
        assert diagnosis.unjudged["spike"] == "21 steps (12 so far)"
        assert "vanishing (backward)" in diagnosis.judged
        assert not set(diagnosis.judged) & set(diagnosis.unjudged)

    def test_losses_count_for_the_rules_on_losses(self) -> None:
        assert diagnose(course(FALLING[:15])).unjudged["not learning"] == "20 steps (15 so far)"
        assert "not learning" in diagnose(course(FALLING[:20])).judged

    def test_the_text_lists_them_by_what_they_need(self) -> None:
        text = str(diagnose([snapshot(step, [1.0, 1.0]) for step in range(40)]))
        needs_loss = (
            "Not judged without probe.step(loss): loss blow-up, poor initialisation, unstable loss, not learning."
        )
        assert needs_loss in text


VANISHING = [snapshot(step, [1e-7, 1e-5, 1e-4, 1e-2, 0.1, 1.0], loss=loss) for step, loss in enumerate(FLAT)]
DYING = [snapshot(step, [1.0] * 6, loss=loss, zeros=0.8) for step, loss in enumerate(FLAT)]
HINT = "To learn why: attach(activations=True), which also judges"


class TestHint:
    @pytest.mark.parametrize(
        ("history", "first", "causes"),
        [
            (VANISHING, "vanishing", "poor initialisation, saturation, dead ReLU, precision loss."),
            (DYING, "dying", "exploding (forward), saturation, dead ReLU, precision loss."),
        ],
    )
    def test_a_fault_whose_causes_were_not_observed_says_how_to_observe_them(
        self, history: list[gradprobe.Snapshot], first: str, causes: str
    ) -> None:
        diagnosis = diagnose(history)
        text = " ".join(str(diagnosis).split())
        assert text.index(f"1. {first}") < text.index(f"{HINT} {causes}") < text.index("More: ")
        assert f"which also judges {causes}" in diagnosis._repr_html_()

        observed = diagnose([with_outputs(one, layers([1.0] * 6)) for one in history])
        assert observed[0].title == diagnosis[0].title
        assert "To learn why" not in f"{observed}{observed._repr_html_()}"

    def test_a_fault_that_begins_elsewhere_says_nothing_of_it(self) -> None:
        diagnosis = diagnose([snapshot(0, [1.0, 1.0], nonfinite=1)])
        assert "dead ReLU" in diagnosis.unjudged
        assert "To learn why" not in str(diagnosis)


class TestForms:
    def test_the_text_names_fault_cause_and_first_remedy(self) -> None:
        text = str(diagnose([snapshot(0, [1.0, 1.0], nonfinite=3)]))
        lines = text.splitlines()
        assert lines[0].startswith("1 fault in 1 step, ")
        assert "1. non-finite: a gradient is NaN or infinite" in lines
        assert "; the backward pass met the first in the gradient of layer0.weight." in " ".join(map(str.strip, lines))
        assert any(line.startswith("   Try first: attach(activations=True), and let") for line in lines)
        assert "   More: gradprobe explain non-finite" in lines
        assert max(map(len, lines)) <= 100

    def test_json_and_html(self) -> None:
        diagnosis = diagnose([snapshot(0, [1.0, 1.0], nonfinite=3)])
        read = json.loads(json.dumps(diagnosis.to_dict()))
        assert (read["healthy"], read["steps"], read["findings"][0]["rule"]) == (False, 1, "non-finite")
        assert "1. non-finite" in diagnosis._repr_html_()

    def test_it_equals_a_list_of_its_findings(self) -> None:
        diagnosis = diagnose([snapshot(0, [1.0, 1.0], nonfinite=3)])
        assert diagnosis == list(diagnosis)
        assert diagnosis != []
        assert diagnose([]) == []
        assert diagnosis[:1] == tuple(diagnosis)


class TestOfAProbe:
    def test_a_probe_says_why_it_has_measured_nothing(self) -> None:
        model = mlp()
        with gradprobe.attach(model, strict=True) as probe:
            assert "no backward pass has reached the model" in str(probe.findings())
            loss_of(model).backward()
            assert "no optimizer has stepped the model's parameters" in str(probe.findings())
            assert probe.findings().healthy is None

    def test_measuring_that_has_failed_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = mlp()
        with gradprobe.attach(model) as probe:
            recorder = probe._recorder
            monkeypatch.setattr(recorder._observer, "measure", _fail)
            with pytest.warns(gradprobe.GradprobeWarning, match="no memory"):
                loss_of(model).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert probe.findings().healthy is None
            assert "no memory" in str(probe.findings())


def _fail(*_: object) -> None:
    raise MemoryError("no memory")
