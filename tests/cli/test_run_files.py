"""Every command that takes a run's file names one that it cannot use, in one line."""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.report_cases import degraded

from gradprobe.cli import commands
from gradprobe.experiments.sweep.store import start_run

COMMANDS: dict[str, list[str]] = {
    "report": ["report", "RUN"],
    "json": ["report", "RUN", "--json"],
    "csv": ["report", "RUN", "--csv", "OUT"],
    "png": ["report", "RUN", "--png", "OUT"],
    "html": ["report", "RUN", "--html", "OUT/page.html"],
    "compare": ["compare", "RUN", "RUN"],
    "sweep": ["sweep", "--depths", "8", "--epochs", "1", "--jobs", "1", "--out", "RUN"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a sweep with a finished and an unfinished network."""
    path = tmp_path_factory.mktemp("good") / "run.sqlite"
    source = degraded(seeds=1)
    with start_run(path, source.config, {"torch_version": "2.13.0"}) as run:
        run.add_cells([(cell.family, cell.depth, cell.seed, cell.parameters) for cell in source.cells()])
        for cell in source.cells():
            for row in source.epochs(cell.id):
                layers, junctions = source.layers(cell.id, row.epoch), source.junctions(cell.id, row.epoch)
                run.save(cell.id, [row], layers, junctions, bytes(range(256)), "done" if row.epoch == 4 else "pending")
    return path


def text(path: Path) -> None:
    path.write_text("the notes of somebody else\n" * 200)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs(x)")
    database.close()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9000])


def damaged_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:-4096] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)


def wrong_value(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE cell SET parameters = 'many'")
        database.execute("UPDATE meta SET value = 'x' WHERE key = 'config'")
    database.close()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def run_command(arguments: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    values = {
        "RUN": str(path),
        "OUT": str(path.parent / "out"),
        "OUT/page.html": str(path.parent / "out" / "page.html"),
    }
    monkeypatch.setattr(sys, "argv", ["gradprobe", *(values.get(one, one) for one in arguments)])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code


@pytest.mark.parametrize(
    "make",
    [text, empty, other_database, cut_short, damaged_in_the_middle, wrong_value, folder],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_file_that_is_no_run_is_named_in_one_line(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    make: Callable[[Path], None],
) -> None:
    if arguments[0] == "sweep" and make is empty:
        pytest.skip("an empty file becomes a new run")
    path = tmp_path / "run.sqlite"
    shutil.copy(good, path)
    make(path)
    assert run_command(arguments, path, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"gradprobe: {path}: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seed", range(8))
def test_changed_bytes_never_raise_anything_but_one_line(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    changes = random.Random(seed)
    for number in range(12):
        content = bytearray(good.read_bytes())
        for _ in range(changes.randint(1, 30)):
            content[changes.randrange(100, len(content))] ^= 1 << changes.randrange(8)
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(content[: changes.randrange(len(content))] if number % 4 == 0 else content)
        for name in ("json", "csv", "report"):
            code = run_command(COMMANDS[name], path, monkeypatch)
            err = capsys.readouterr().err
            assert code in (None, 0, 2), (seed, number, name)
            assert code != 2 or (err.startswith(f"gradprobe: {path}: ") and err.count("\n") == 1)


def test_a_file_name_cannot_act_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "[bold]\x1b[31m\u202e\udcff.sqlite"
    path.write_text("notes")
    for arguments in COMMANDS.values():
        assert run_command(arguments, path, monkeypatch) == 2
        assert "[bold]\\x1b[31m\\u202e\\udcff.sqlite: needed a file" in capsys.readouterr().err
