"""The runner of cases in several processes: a faulty case is reported, and only that."""

from pathlib import Path

import pytest
from helpers.rank_cases import first_raises, last_dies, sums
from helpers.ranks import run_ranks


@pytest.mark.soak
def test_a_case_that_fails_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    cases = {"before": sums, "raises": first_raises, "after": sums, "dies": last_dies, "after it": sums}
    found = run_ranks(2, cases, tmp_path, limit_s=120)
    for name in ("before", "after", "after it"):
        assert [(outcome.value, outcome.error) for outcome in found[name]] == [(3.0, None)] * 2
    first, second = found["raises"]
    assert first.error is not None
    assert "the first rank gives up" in first.error
    assert second.error is not None
    assert "not run" not in second.error
    first, second = found["dies"]
    assert first.error is not None
    assert "not run" not in first.error
    assert second.error is not None
    assert "exit code -9" in second.error
