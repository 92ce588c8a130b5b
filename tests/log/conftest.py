"""Runs a test of run folders with each of their file formats."""

from __future__ import annotations

import pytest

from gradprobe.log import formats, writer


@pytest.fixture(params=["parquet", "jsonl"])
def _format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setattr(writer, "best_format", formats.JsonLines)
    return str(request.param)
