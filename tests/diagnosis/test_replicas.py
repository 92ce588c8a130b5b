"""Copies of one gradient on several ranks that are not the same."""

from dataclasses import replace

import numpy as np
from helpers.diagnose_cases import FALLING, course

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.snapshot import Snapshot


def history(differ: list[list[bool]]) -> list[Snapshot]:
    steps = course(FALLING[: len(differ)])
    return [replace(one, differ=np.array(flags)) for one, flags in zip(steps, differ, strict=True)]


def test_copies_that_differ_in_most_steps_are_found_and_named() -> None:
    (finding,) = diagnose(history([[False, False], *[[False, True]] * 9]))
    assert (finding.rule, finding.sites, finding.steps) == ("replicas differ", ("layer1.weight",), (1, 9))
    assert finding.message.startswith("steps 1 to 9: the copies of the gradient of layer1.weight that several ranks")


def test_a_step_now_and_then_is_no_finding() -> None:
    assert diagnose(history([[False, True], *[[False, False]] * 9])) == []


def test_a_model_without_copies_is_not_judged() -> None:
    assert diagnose(course(FALLING)) == []
