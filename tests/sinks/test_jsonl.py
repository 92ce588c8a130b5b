"""The JSON Lines file is whole or absent, and names are read back as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.diagnose_cases import snapshot
from helpers.full_disk import full_disk
from helpers.names import NAMES

from gradprobe.errors import StoreError
from gradprobe.sinks import write_jsonl


def test_a_failed_export_leaves_no_file_so_that_it_can_be_tried_again(tmp_path: Path) -> None:
    history = [snapshot(step, [1.0] * 20) for step in range(20)]
    path = tmp_path / "history.jsonl"
    with full_disk(5_000), pytest.raises(StoreError, match=r"history\.jsonl: cannot write this file: File too large"):
        write_jsonl(history, path)
    assert list(tmp_path.iterdir()) == []
    write_jsonl(history, path)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 400
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_are_read_back_exactly_from_one_line_each(tmp_path: Path, name: str) -> None:
    one = snapshot(0, [1.0])
    path = tmp_path / "history.jsonl"
    write_jsonl([replace(one, table=replace(one.table, names=(name,), index={name: 0}))], path)
    (line,) = path.read_text().split("\n")[:-1]
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["site"] == name
