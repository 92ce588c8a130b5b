"""The JSON Lines file is whole or absent, and names are read back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.diagnose_cases import snapshot
from helpers.full_disk import full_disk

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
