"""The lesson has the text of its template, with the output of each command, and the commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import load_script

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def make_lesson() -> ModuleType:
    return load_script(DOCS / "make_lesson.py")


def test_the_lesson_is_the_template_with_an_output_below_each_command(make_lesson: ModuleType) -> None:
    template, lesson = ((DOCS / name).read_text() for name in ("lesson.template.md", "lesson.md"))
    without_output = re.sub(r"\n```text\n.*?\n```\n", "", lesson, flags=re.DOTALL)
    assert without_output == template
    n_outputs = len(re.findall("^```text$", lesson, flags=re.MULTILINE))
    assert n_outputs == len(make_lesson.BLOCK.findall(template)) > 7
    for image in re.findall(r"\]\((img/[^)]*)\)", lesson):
        assert (DOCS / image).stat().st_size > 10_000, image


@pytest.mark.soak
def test_a_command_that_fails_stops_the_lesson_and_a_finding_does_not(make_lesson: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--depths"):
        make_lesson.run_block("console", "$ gradprobe identity --depths 20,21\n")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        make_lesson.run_block("python", "1 / 0\n")
    check = "$ gradprobe check 'gradprobe.networks:deep_cnn(20)' --input 3,8,8\n"
    assert "verdict: vanishing" in make_lesson.run_block("console", check)


def test_its_commands_accept_their_arguments(make_lesson: ModuleType) -> None:
    from typer.main import get_command

    from gradprobe.cli.commands import app

    for kind, source in make_lesson.BLOCK.findall((DOCS / "lesson.template.md").read_text()):
        for line in source.splitlines() if kind == "console" else ():
            program, command, *arguments = shlex.split(line.removeprefix("$ "))
            assert program == "gradprobe"
            get_command(app).commands[command].make_context(command, arguments)  # raises on an unknown argument
