"""The page on performance has the tables of what was measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PAGE, MEASURED = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.json"


@pytest.fixture
def peers_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script(ROOT / "benchmarks" / "_peers_tables.py")


def measured() -> dict[str, object]:
    times_ms = {
        "bare step": [10.0, 12.0, 14.0],
        "a second bare copy": [10.0, 12.0, 14.0],
        "attach": [11.0, 13.5, 15.0],
        "_foreach_norm and tolist": [10.5, 12.5, 14.5],
        "wandb.watch, offline": [20.0, 22.0, 24.0],
        "clip_grad_norm_": [11.0, 13.0, 15.0],
        "attach and probe.clip_grad_norm_": [10.5, 12.5, 14.5],
    }
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    return {
        "date": "2026-01-31",
        "machine": "a processor, 1 thread",
        "versions": versions,
        "left_out": ["lightning"],
        "times_ms": {"A network": times_ms},
    }


def test_tables_have_conditions_times_and_losses(peers_tables: ModuleType) -> None:
    lines = peers_tables.tables(measured()).splitlines()
    assert lines[0] == (
        "Measured on 2026-01-31: a processor, 1 thread; python 3.11.7, torch 2.13.0. Not installed: lightning."
    )
    assert "Bare step 12.00 ms, 3 rounds." in lines
    assert "| attach | 1.00 | 1.00 … 1.50 | 8.3% |" in lines
    assert "| a second bare copy | 0.00 | 0.00 … 0.00 | 0.0% |" in lines
    losses = lines[lines.index("### Where gradprobe adds more") :]
    assert losses[2:] == ["- A network: `attach` 0.50 ms (0.50 … 1.00) more than _foreach_norm and tolist"]


def test_a_page_without_marks_is_refused(peers_tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="the page needs the lines"):
        peers_tables.fill("# Performance\n", measured())


def test_the_page_has_the_tables_of_its_measurement(peers_tables: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert peers_tables.fill(page, json.loads(MEASURED.read_text(encoding="utf-8"))) == page


def test_the_readme_has_numbers_of_the_same_measurement(peers_tables: ModuleType) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    begin = next(k for k, line in enumerate(lines) if line.startswith("| in every step |"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines[begin:])]
    times_ms = json.loads(MEASURED.read_text(encoding="utf-8"))["times_ms"]
    (_, *networks), _, *rows = table
    assert len(networks) >= 3
    assert len(rows) >= 7
    for name, *shares in rows:
        assert shares == [f"{peers_tables.added_share(times_ms[network], name):.1%}" for network in networks]
