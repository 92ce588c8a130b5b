"""Includes in csrc go one way: a folder includes only the folders in its row, and torch only where the row says so."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MAY_INCLUDE = {
    "core": set(),
    "cpu": {"core"},
    "cuda": {"core"},
    "stable": {"core", "cpu", "cuda"},
    "hooks": {"core", "cpu"},
}
WITHOUT_TORCH = {"core", "cpu", "cuda"}
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/")


def includes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields each file of a folder with each header that it includes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
                yield path.name, header


def test_every_folder_is_in_the_table() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == set(MAY_INCLUDE)


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_a_folder_includes_only_what_the_table_allows(folder: str) -> None:
    found = list(includes(CSRC / folder))
    assert found
    ours = [(name, header) for name, header in found if (CSRC / header).is_file()]
    wrong = [(name, header) for name, header in ours if header.partition("/")[0] not in MAY_INCLUDE[folder] | {folder}]
    relative = [(name, header) for name, header in found if (CSRC / folder / header).is_file()]
    assert (wrong, relative) == ([], [])


@pytest.mark.parametrize("folder", sorted(WITHOUT_TORCH))
def test_a_folder_without_torch_includes_none_of_its_headers(folder: str) -> None:
    assert [(name, header) for name, header in includes(CSRC / folder) if TORCH.match(header)] == []
