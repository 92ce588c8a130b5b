"""`gradprobe check` with a batch of the user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradprobe.cli import commands

DOCS = Path(__file__).parents[2] / "docs"

FILE = """
import torch
from torch import nn

LOADED = []
LOADED.append(1)

class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
    def forward(self, input_ids, decoder_input_ids=None):
        assert decoder_input_ids is not None, 'needs decoder_input_ids'
        return self.head(self.words(input_ids).mean(1, keepdim=True) + self.words(decoder_input_ids))

def zero_head():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.zeros_(model[4].weight)
    return model

def keywords():
    return {'input_ids': torch.randint(9, (3, 5)), 'decoder_input_ids': torch.randint(9, (3, 2))}

def half():
    return {'input_ids': torch.randint(9, (3, 5))}

def with_loss(sign=1.0):
    return keywords(), lambda logits: sign * logits[..., 0].sum()

def with_bad_loss():
    return keywords(), lambda logits: logits

def nothing():
    return None

def broken():
    raise OSError('no such data')
"""


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `gradprobe check` beside a file of models; returns its exit status, stdout and stderr."""
    (tmp_path / "task.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprobe", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


Check = Callable[..., tuple[int, str, str]]


def test_a_model_that_takes_keywords(check: Check) -> None:
    code, out, err = check("task.py:Seq2Seq", "--batch", "task.py:keywords", "--json")
    assert (code, err) == (0, "")
    assert [layer["name"] for layer in json.loads(out)["layers"]] == ["words.weight", "head.weight", "head.bias"]


def test_a_batch_with_a_loss(check: Check) -> None:
    code, out, _ = check("task.py:Seq2Seq", "--batch", "task.py:with_loss(sign=0.5)", "--json")
    flow = json.loads(out)
    assert code == 0
    assert flow["loss"] == "the given loss"
    (bias,) = [layer for layer in flow["layers"] if layer["name"] == "head.bias"]
    assert bias["norm"] == 0.5 * 3 * 2  # the sum over 3 x 2 positions, in the first of nine classes
    assert bias["zero_fraction"] == pytest.approx(8 / 9)


def test_a_finding_names_the_source_of_its_limit_as_the_lesson_does(check: Check) -> None:
    code, out, _ = check("gradprobe.networks:deep_cnn(20)", "--input", "3,8,8")
    source = "vanishing towards the input (source: gradprobe's own limit, see docs/check.md)"
    assert (code, source in " ".join(out.split())) == (1, True)
    assert source in " ".join((DOCS / "lesson.md").read_text(encoding="utf-8").split())
    assert "Both limits are gradprobe's own" in (DOCS / "check.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "8"), "--batch: needed MODULE:CALLABLE, got '8'; for the number of examples use --batch-size 8"),
        ((), "--input: needed --input or --batch, got neither"),
        (("--input", "3", "--batch", "task.py:keywords"), "--input: needed --input or --batch, got both"),
        (("--batch", "task.py:keywords", "--batch-size", "2"), "--batch-size: needed --input, whose batch is random"),
        (("--batch", "task.py:nothing"), "--batch: needed a batch; task.py:nothing returned None"),
        (("--batch", "task.py:broken"), "--batch: task.py:broken raised OSError: no such data"),
        (("--batch", "task.py:missing"), "--batch: task.py has no missing"),
        (("--batch", "task.py:with_bad_loss"), "loss: needed a scalar that depends on a trainable parameter"),
    ],
)
def test_a_wrong_option_is_one_line(check: Check, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = check("task.py:Seq2Seq", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"gradprobe: {message}")
    assert err.count("\n") == 1


def test_an_error_of_the_model_is_reported_as_its_own(check: Check) -> None:
    code, out, err = check("task.py:Seq2Seq", "--batch", "task.py:half")
    assert (code, out) == (3, "")
    assert err.splitlines()[-1] == "gradprobe: raised: AssertionError: needs decoder_input_ids"


def test_a_head_that_starts_at_zero_is_no_fault(check: Check) -> None:
    code, out, _ = check("task.py:zero_head", "--input", "8", "--batch-size", "16")
    assert code == 0
    assert "verdict: healthy" in out
    assert "note: all gradients behind '4' are 0, because 4.weight is 0; the first step changes that" in out
    assert "vanishing" not in out


def test_model_and_batch_come_from_one_run_of_their_file(check: Check) -> None:
    code, _, _ = check("task.py:Seq2Seq", "--batch", "task.py:keywords")
    assert code == 0
    assert sys.modules["task"].LOADED == [1]
    Path("task.py").write_text("raise SystemExit('run twice')")
    assert check("task.py:Seq2Seq", "--batch", "task.py:keywords")[0] == 0
