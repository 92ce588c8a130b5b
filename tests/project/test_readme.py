"""The README: its code runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from gradprobe.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    return re.findall(rf"^{program} ([\w-]+)", "\n".join(blocks("sh")), flags=re.MULTILINE)


def test_python_blocks_run_one_after_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 4
    names: dict[str, object] = {}
    for number, block in enumerate(blocks("python"), start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No fault so far")
    assert any(line.startswith("2 ") for line in lines)
    assert any(".weight " in line for line in lines)
    assert lines[-1] == "vanishing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html", "run.png"]


def test_make_targets_exist() -> None:
    targets = commands("make")
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", sorted({*commands("gradprobe")}))
def test_command_has_the_options_that_are_shown(command: str) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(f"gradprobe {command}")]
    known = {option for parameter in get_command(app).commands[command].params for option in parameter.opts}
    assert {option for line in lines for option in re.findall(r"--[\w-]+", line)} <= known


def test_files_that_are_named_exist() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert pictures
    named = re.findall(r"`((?:gradprobe|csrc|tests|benchmarks)/[\w/.]*|CONTRIBUTING\.md)`", TEXT)
    assert "gradprobe/probe/" in named
    assert [name for name in (*pictures, *named) if not (ROOT / name).exists()] == []


def test_extras_exist() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = [extra for group in re.findall(r"\.\[([\w,]+)\]", TEXT) for extra in group.split(",")]
    assert extras
    assert all(re.search(rf"^{extra} = \[", declared, flags=re.MULTILINE) for extra in extras)
