"""The page on sharded models names each tested layout, and no other."""

import re
from pathlib import Path

from helpers.layouts import LAYOUTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded.md"


def test_the_table_names_every_layout_once() -> None:
    rows = [
        line.split("|") for line in PAGE.read_text().split("## Which layouts work")[1].splitlines() if line[:2] == "| "
    ]
    named = [name for row in rows[1:] if len(row) == 5 for name in re.findall("`([^`]+)`", row[2])]
    assert sorted(named) == sorted(LAYOUTS)
