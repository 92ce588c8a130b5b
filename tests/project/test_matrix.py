"""What `make test-matrix` runs is there."""

from __future__ import annotations

from pathlib import Path

from helpers.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_of_the_matrix_exists() -> None:
    names = load_script(ROOT / "tests" / "matrix.py").TESTS
    assert len(names) > 5
    for name in names:
        path, _, function = name.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {function}(" in text if function else "def test_" in text, name
