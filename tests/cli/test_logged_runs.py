"""`gradprobe diagnose` and `gradprobe report` on what a probe has logged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, sgd

import gradprobe
from gradprobe.cli import commands

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `gradprobe` beside two runs, "healthy" and "faulty"; returns its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("healthy", "faulty"):
        model = mlp()
        optimizer = sgd(model)
        with gradprobe.attach(model, optimizer=optimizer, log_dir=name) as probe:
            for step in range(40):
                loss = loss_of(model)
                optimizer.zero_grad()
                (loss * (float("nan") if name == "faulty" and step == 25 else 1.0)).backward()
                if step != 25:
                    optimizer.step()
                probe.step(loss)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprobe", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def test_diagnose_reads_what_the_probe_saw(command: Command) -> None:
    status, out, _ = command("diagnose", "healthy")
    assert (status, out.splitlines()[0].split(",")[0]) == (0, "No fault in 40 steps")
    status, out, _ = command("diagnose", "faulty")
    assert status == 1
    assert "1. non-finite: a gradient is NaN or infinite" in out
    assert "Step 25: " in out


def test_diagnose_prints_json_for_programs(command: Command) -> None:
    status, out, _ = command("diagnose", "faulty", "--json")
    read = json.loads(out)
    assert (status, read["healthy"], read["steps"]) == (1, False, 40)
    assert [(found["rule"], found["steps"]) for found in read["findings"]] == [("non-finite", [25, 25])]


def test_report_tells_a_run_folder_from_the_file_of_a_sweep(command: Command) -> None:
    pytest.importorskip("altair")
    status, out, err = command("report", "faulty", "--html", "page.html")
    assert (status, err) == (0, "wrote page.html\n")
    assert "non-finite" in out
    assert "non-finite" in Path("page.html").read_text(encoding="utf-8")
    status, _, err = command("report", "faulty", "--csv", "tables")
    assert status == 2
    assert "--csv: faulty holds tables already" in err


COMMANDS = [("diagnose",), ("report",), ("watch", "--once"), ("compare", "faulty")]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_folder_without_a_run_is_refused(command: Command, arguments: tuple[str, ...]) -> None:
    Path("empty").mkdir()
    status, _, err = command(*arguments, "empty")
    assert status == 2
    assert "empty: needed a run folder, found no about.json in it" in err


@pytest.mark.parametrize("arguments", COMMANDS[1:])
def test_a_name_that_is_too_long_is_one_line(command: Command, arguments: tuple[str, ...]) -> None:
    name = "n" * 300
    assert command(*arguments, name) == (2, "", f"gradprobe: {name}: cannot be used: File name too long\n")


def test_a_model_that_changed_is_read_as_a_whole(command: Command) -> None:
    model = mlp()
    with gradprobe.attach(model, log_dir="changed") as probe:
        for step in range(20):
            if step == 15:
                model[2] = torch.nn.Linear(5, 3)
            model.zero_grad()
            loss_of(model).backward()
            probe.step()
    status, out, _ = command("diagnose", "changed")
    assert (status, out.splitlines()[0].split(",")[0]) == (0, "No fault in 20 steps")
