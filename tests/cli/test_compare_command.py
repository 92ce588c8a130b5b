"""`gradprobe compare` on trainings that are equal, rounded otherwise, changed on the way, or unrelated."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.probe_cases import loss_of, mlp
from torch import nn

import gradprobe
from gradprobe.cli import commands
from gradprobe.experiments.sweep.store import start_run
from gradprobe.report.records import EpochRow

NAMES = {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}

Change = Callable[[nn.Module], None]


def nudge(model: nn.Module) -> None:
    """Moves 2.weight by 1e-3 of its norm."""
    weight = model.get_parameter("2.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        weight += 1e-3 * weight.norm() / direction.norm() * direction


def one_bit(model: nn.Module) -> None:
    """Changes the last bit of one element."""
    with torch.no_grad():
        weight = model.get_parameter("2.weight")
        weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)[0, 0] += 1


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def run(
        name: str,
        change: Change | None = None,
        at: int = 17,
        steps: int = 30,
        model: nn.Module | None = None,
        with_loss: bool = True,
        dtype: torch.dtype = torch.float32,
        lr: float = 0.1,
        **options: Any,
    ) -> str:
        model = mlp(dtype=dtype) if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        with gradprobe.attach(model, optimizer=optimizer, log_dir=name, **options) as probe:
            for step in range(steps):
                if change is not None and step == at:
                    change(model)
                loss = loss_of(model, seed=step, dtype=dtype)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                probe.step(loss if with_loss else None)
        return name

    return run


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprobe", "compare", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


Train = Callable[..., str]
Compare = Callable[..., "tuple[int, str, str]"]


def test_a_weight_that_changes_at_step_17_is_named_with_all_that_differs(train: Train, compare: Compare) -> None:
    a, b = train("a", updates=True), train("b", nudge, updates=True)
    status, out, _ = compare(a, b)
    assert status == 1
    assert "The runs first differ at step 17, by more than rounding." in out
    assert "Before it, 17 steps (0 to 16) are equal, bit for bit." in out
    assert "1 differs already before the update: 2.weight." in " ".join(out.split())
    assert all(name in out for name in NAMES)
    assert "cause" not in out
    status, out, _ = compare(a, b, "--json")
    found = json.loads(out)
    first = found["first_difference"]
    assert (status, found["equal"], first["step"], first["step_before"]) == (1, False, 17, 16)
    assert found["first_beyond_rounding"]["step"] == 17
    differ = {
        kind: {one["name"] for one in first["differences"] if one["kind"] == kind} for kind in ("weight", "parameter")
    }
    assert differ == {"weight": {"2.weight"}, "parameter": NAMES}
    sizes = {one["name"]: one["difference"] for one in first["differences"] if one["kind"] == "parameter"}
    assert 1e-5 < max(sizes.values()) < 0.1


def test_it_is_named_without_losses_and_updates_too(train: Train, compare: Compare) -> None:
    _, out, _ = compare(train("a", with_loss=False), train("b", nudge, with_loss=False), "--json")
    found = json.loads(out)
    assert found["first_difference"]["step"] == 17
    assert {one["name"] for one in found["first_difference"]["differences"]} == NAMES


def test_equal_runs_are_called_equal(train: Train, compare: Compare) -> None:
    options = {"updates": True, "activations": True}
    status, out, _ = compare(train("a", **options), train("b", **options))
    assert status == 0
    assert "The runs are equal: all that both recorded is the same, bit for bit, in 30 steps (0 to 29)." in out
    assert "outputs of modules" in out


def test_one_bit_is_found_and_called_rounding(train: Train, compare: Compare) -> None:
    status, out, _ = compare(train("a", updates=True), train("b", one_bit, updates=True))
    assert status == 1
    assert "The runs first differ at step 17, and never by more than rounding." in out


def test_another_seed_differs_from_the_start(train: Train, compare: Compare) -> None:
    status, out, _ = compare(train("a"), train("b", model=mlp(seed=1)))
    assert status == 1
    assert "The runs differ from the first step that both have, step 0, by more than rounding." in out


def test_another_learning_rate_shows_in_the_first_updates(train: Train, compare: Compare) -> None:
    status, out, _ = compare(train("a", updates=True), train("b", lr=0.09, updates=True))
    text = " ".join(out.split())
    assert status == 1
    assert "step 0, by more than rounding." in text
    assert "the gradients of 0 of 6 parameters differ, the 6 updates of " in text
    assert "; the loss is equal." in text


def test_bfloat16_rounds_more(train: Train, compare: Compare) -> None:
    a, b = train("a", dtype=torch.bfloat16), train("b", one_bit, dtype=torch.bfloat16)
    found = json.loads(compare(a, b, "--json")[1])
    assert found["rounding"]["format"] == "bfloat16"
    assert found["first_difference"]["step"] == 17
    assert found["first_beyond_rounding"] is None


def test_other_parameters_other_steps_and_other_options_are_told(train: Train, compare: Compare) -> None:
    deeper = nn.Sequential(*mlp(), nn.Linear(1, 1, bias=False))
    status, out, _ = compare(train("a", updates=True), train("b", model=deeper, steps=20))
    text = " ".join(out.split())
    assert status == 1
    assert "Only B has 1 parameter 5.weight." in text
    assert "Only A has updates." in text
    assert "A has 30 steps (0 to 29)." in text
    assert compare(train("c", every=5), "a")[0] == 0
    _, out, _ = compare("c", train("d", nudge))
    assert "The runs first differ at step 20, " in out
    assert "Steps 16 to 19 are not in both runs." in out


def test_a_page_is_written(train: Train, compare: Compare) -> None:
    pytest.importorskip("altair")
    status, _, err = compare(train("a"), train("b", nudge), "--html", "pages/compare.html")
    assert (status, err) == (1, "wrote pages/compare.html\n")
    assert "The runs first differ at step 17" in Path("pages/compare.html").read_text(encoding="utf-8")


def test_sweeps_are_compared_network_by_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: Compare
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, losses in (("a", [0.5, 0.25]), ("b", [0.5, 0.25]), ("c", [0.5, math.nan])):
        with start_run(Path(f"{name}.sqlite"), {"data": "digits", "epochs": 2}, {}) as run:
            run.add_cells([("plain", 8, 0, 100), *([("resnet", 8, 0, 100)] if name == "c" else [])])
            rows = [EpochRow(epoch, loss, 10.0, 20.0 - len(name), epoch) for epoch, loss in enumerate(losses)]
            run.save(run.cells()[0].id, rows, [], [], b"", "done")
    status, out, _ = compare("a.sqlite", "b.sqlite")
    assert status == 0
    assert "The sweeps are equal" in out
    status, out, _ = compare("a.sqlite", "c.sqlite", "--json")
    found = json.loads(out)
    assert (status, found["equal"], found["only_b"]) == (1, False, ["resnet-8 seed 0"])
    assert found["networks"][0]["first_different_epoch"] == 1
    status, out, _ = compare("a.sqlite", "c.sqlite")
    assert "1 of the 1 networks that both sweeps have differ." in out
    assert "Only B has resnet-8 seed 0." in out
    status, _, err = compare("a.sqlite", "missing.sqlite")
    assert status == 2
    assert err.startswith("gradprobe: missing.sqlite: needed a run folder or the file of a sweep, found nothing there")


def test_what_cannot_be_compared_is_named_in_one_line(train: Train, compare: Compare) -> None:
    train("a", steps=3)
    Path("b.sqlite").write_text("notes")
    for other, told in (
        ("b.sqlite", "b.sqlite: "),
        ("missing", "missing: needed a run folder or the file of a sweep, found nothing there"),
        (train("late", steps=3, start_step=100), "runs: needed two runs with a step in common, got A steps 0 to 2, B "),
        (train("other", steps=3, model=nn.Linear(6, 1), with_loss=False), "runs: needed two runs with a parameter or "),
    ):
        status, out, err = compare("a", other)
        assert (status, out) == (2, "")
        assert err.startswith(f"gradprobe: {told}")
        assert err.count("\n") == 1
