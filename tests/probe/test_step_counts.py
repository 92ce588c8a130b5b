"""The work that a probe adds to a step: no count rises by a tenth above the recorded one."""

from __future__ import annotations

import json

import pytest
from helpers.step_counts import RECORDED, Counts, count_all

TOLERANCE = 1.1


def rises(counted: dict[str, dict[str, Counts]], recorded: dict[str, dict[str, Counts]]) -> list[str]:
    return [
        f"{workload}, {hooks}, {quantity}: {recorded[workload][hooks][quantity]} -> {n}"
        for workload, ways in counted.items()
        for hooks, counts in ways.items()
        for quantity, n in counts.items()
        if n > TOLERANCE * recorded[workload][hooks][quantity]
    ]


@pytest.mark.soak
def test_a_step_does_not_do_more_than_before() -> None:
    risen = rises(count_all(), json.loads(RECORDED.read_text(encoding="utf-8")))
    assert not risen, "if that is worth it: python tests/helpers/step_counts.py\n" + "\n".join(risen)
