"""Messages for a person spell out what would act on a terminal; the names themselves stay exact."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import pytest
from helpers.diagnose_cases import snapshot
from helpers.names import NAMES

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.errors import GradprobeWarning, printable, warn_user


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_finding_names_its_site(name: str) -> None:
    one = snapshot(0, [1.0], nonfinite=1)
    (found,) = diagnose([replace(one, table=replace(one.table, names=(name,), index={name: 0}))])
    assert found.sites == (name,)
    assert printable(name) in found.message
    assert found.message == printable(found.message)


def test_a_warning_spells_names_out_and_keeps_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(GradprobeWarning) as caught:
        warn_user("layer \x1b[31m of\nthe model")
    assert str(caught[0].message) == "gradprobe: layer \\x1b[31m of\nthe model"
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        warn_user("50 % of \u202e")
    assert caplog.messages == ["50 % of \\u202e"]


def test_a_long_text_loses_its_middle() -> None:
    assert printable("abcdefgh", 8) == "abcdefgh"
    assert printable("abcdefghi", 8) == "abcd…ghi"
    assert printable("\x1b" * 9, 8) == r"\x1b…x1b"
