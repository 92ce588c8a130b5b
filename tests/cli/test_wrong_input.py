"""What the command line says to input that it cannot use, and its help."""

import re
import shlex

import pytest
from typer.main import get_command

from gradprobe.cli.commands import app


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "sweep --families resnet,plian",
            "--families: needed one or more of plain, .*; did you mean plain?",
        ),
        ("sweep --precision bf16", "--precision: needed one of float32, bfloat16, got 'bf16'; did you mean bfloat16?"),
        ("sweep --norm layer", "--norm: needed one of batch, none, got 'layer'"),
        ("sweep --optimizer adm", "--optimizer: needed one of .*, got 'adm'; did you mean adam?"),
        ("sweep --depths 21 --families plain", "--depths: needed 6n+2 .*, got 21"),
        ("sweep --batch-size 0", "--batch-size: needed at least 1, got 0"),
        ("sweep --model my", "--model: needed MODULE:CALLABLE or FILE.py:CALLABLE, got 'my'"),
        ("sweep --spec nowhere.toml", "--spec: nowhere.toml cannot be read: No such file or directory"),
        ("check 'torch.nn:Linear(3, 2)' --input 4", r"--input: Linear cannot take inputs of shape (1, 4) .*"),
        (
            "check 'torch.nn:Linear(3, 2)' --input 3 --batch-size 0",
            "--batch-size: needed an integer of at least 1, got 0",
        ),
        ("check torch.nn:Linea --input 3", "target: torch.nn has no Linea, got 'torch.nn:Linea'"),
        ("identity --depths 56,20", "--depths: needed a smaller and then a larger depth, got 56, 20"),
        ("remedies --activations rleu", "--activations: needed one or more of sigmoid, .*; did you mean relu?"),
        ("explain vanshing", "topic: needed one of vanishing, .*, got 'vanshing'; did you mean vanishing?"),
        ("report nowhere", "nowhere: needed a run folder or the file of a sweep, found nothing there"),
        ("compare nowhere .", "nowhere: needed a run folder or the file of a sweep, found nothing there"),
        ("diagnose nowhere", "nowhere: needed a run folder, found nothing there"),
        ("diagnose file", "file: needed a run folder, found a file; gradprobe report shows that of a sweep"),
    ],
)
def test_an_error_names_the_option_as_the_user_wrote_it(gradprobe, command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, printed, err = gradprobe(*shlex.split(command))
    assert (code, printed) == (2, "")
    pattern = re.escape(f"gradprobe: {message}\n").replace(re.escape(".*"), ".*")
    assert re.fullmatch(pattern, err), err


@pytest.mark.parametrize(("typed", "meant"), [("swep", "sweep"), ("chek", "check"), ("explian", "explain")])
def test_a_mistyped_command_is_told_the_right_one(gradprobe, typed, meant):
    code, _, err = gradprobe(typed)
    assert (code, f"Did you mean '{meant}'?" in err) == (2, True)


@pytest.mark.parametrize("command", ["", *get_command(app).commands])
def test_help_has_an_example_and_fits_80_columns(gradprobe, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = gradprobe(*command.split(), "--help")
    assert code == 0
    assert "Usage" in printed
    assert f"Example: gradprobe {command}" in printed
    assert "…" not in printed  # a word that is cut
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("command", get_command(app).commands)
def test_help_shows_defaults_as_plain_values(gradprobe, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, printed, _ = gradprobe(command, "--help")
    assert "[default: (" not in printed
    assert "\\" not in printed  # what keeps rich from reading a default as markup
    defaults = {"check": ["1"], "sweep": ["20,56", "batch", "he", "64 for digits, else 128"], "watch": ["1, or 10 if"]}
    for default in defaults.get(command, []):
        assert f"[default: {default}" in printed
