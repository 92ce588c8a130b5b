"""Plants bugs in Python code: each must be caught by the check that is named for it."""

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, sgd
from torch import nn

import gradprobe
from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import RunWriter, start_run
from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.ring_buffer import RingBuffer, Slot
from gradprobe.probe.history import History
from gradprobe.probe.step_recorder import StepRecorder
from gradprobe.report.records import EpochRow, LayerRow
from gradprobe.snapshot.records import Measured, Provenance

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` in the source of a method becomes `new`, and `check` must fail."""

    name: str
    owner: type
    method: str
    old: str
    new: str
    check: Callable[[Path], None]


def plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the bug into the class.

    Raises:
        ValueError: The text to change does not occur exactly once.
    """
    method = inspect.unwrap(vars(mutant.owner)[mutant.method])
    source = textwrap.dedent(inspect.getsource(method))
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: needed once in {mutant.method}, got {source.count(mutant.old)} times: {mutant.old!r}"
        )
    scope: dict[str, object] = {}
    code = compile("from __future__ import annotations\n" + source.replace(mutant.old, mutant.new), mutant.name, "exec")
    exec(code, method.__globals__ | {"__name__": method.__module__}, scope)
    monkeypatch.setattr(mutant.owner, mutant.method, scope[mutant.method])


def a_pause_inside_a_pause_does_not_end_it(_: Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:
        for is_paused in (True, False):
            with probe.paused():
                with probe.paused():
                    pass
                if is_paused:
                    loss_of(model).backward()
                    optimizer.step()
            optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert [snapshot.step for snapshot in probe.history()] == [1]


def a_moved_model_has_no_more_steps_than_the_capacity(_: Path) -> None:
    model = mlp()
    with gradprobe.attach(model, capacity=3, strict=True) as probe:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            for seed in range(3):
                model.zero_grad()
                loss_of(model, seed, dtype).backward()
                probe.step()
                assert len(probe.history()) <= 3
        assert [snapshot.step for snapshot in probe.history()] == [3, 4, 5]


def a_step_is_seen_only_when_it_is_complete(_: Path) -> None:
    class Watched(RingBuffer):
        """Reads, as another thread may do, between any two values that are written."""

        def _write(self, position: int, slot: Slot, column: int, value: torch.Tensor | float) -> None:
            seen.append([finished.loss for place in self.positions() if (finished := self.read(place, wait=True))])
            super()._write(position, slot, column, value)

    measured = Measured(torch.ones(1, dtype=torch.bool).numpy(), torch.ones(1, dtype=torch.int64).numpy())
    ring = Watched(1, {CPU: 1})
    for loss in (1.0, 2.0, 3.0):
        seen: list[list[float | None]] = []
        before = [loss - 1.0] if loss > 1.0 else []
        slot = Slot(int(loss), Provenance("unscaled", "local", "raw"), measured)
        ring.commit(slot, torch.tensor(loss), 1.0, 0.0, 1.0)
        assert all(losses == before for losses in seen), (seen, before)


def a_gradient_that_is_gone_does_not_count_when_clipping(_: Path) -> None:
    weights = {"of_reals": torch.ones(2), "of_complex": torch.ones(2, dtype=torch.complex64)}
    model = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in weights.items()})
    with gradprobe.attach(model, capacity=1, strict=True) as probe:
        for step in range(4):
            model.zero_grad()
            (model["of_reals"].sum() + (1e3 * model["of_complex"].abs().sum() if step < 2 else 0.0)).backward()
            total = probe.clip_grad_norm_(1.0).item()
            assert total == pytest.approx(math.sqrt(2 + (2e6 if step < 2 else 0)), rel=1e-5)
            probe.step()


def an_epoch_that_fails_is_not_saved_in_part(folder: Path) -> None:
    row, layer = EpochRow(1, 2.3, 90.0, 89.5, 1.25), LayerRow(1, 0, "weight", 0.5, 0.01, 0.2, 0.0, 0, 144)
    with start_run(folder / "run.sqlite", {"epochs": 1}, {}) as run:
        run.add_cells([("plain", 8, 0, 75_002)])
        with pytest.raises(StoreError, match="UNIQUE constraint"):
            run.save(1, [row], [layer, layer], [], b"state")
        assert list(run.epochs(1)) == []


MUTANTS = (
    Mutant(
        "nested_pause",
        StepRecorder,
        "paused",
        "self._recording.n_pauses -= 1",
        "self._recording.n_pauses = 0",
        a_pause_inside_a_pause_does_not_end_it,
    ),
    Mutant(
        "archive_not_trimmed",
        History,
        "all",
        "snapshots[-self._capacity :]",
        "snapshots",
        a_moved_model_has_no_more_steps_than_the_capacity,
    ),
    Mutant(
        "commit_before_the_values",
        RingBuffer,
        "commit",
        "position = self._next\n",
        "position = self._next\n    self._slots[position] = slot\n",
        a_step_is_seen_only_when_it_is_complete,
    ),
    Mutant(
        "stale_row",
        GradientMeter,
        "_measure_irregular",
        "out.zero_()",
        "pass",
        a_gradient_that_is_gone_does_not_count_when_clipping,
    ),
    Mutant(
        "commit_in_the_middle_of_a_save",
        RunWriter,
        "save",
        "                [(cell_id, *astuple(row)) for row in rows],\n            )\n",
        "                [(cell_id, *astuple(row)) for row in rows],\n            )\n            self._db.commit()\n",
        an_epoch_that_fails_is_not_saved_in_part,
    ),
)
BY_NAME = pytest.mark.parametrize("mutant", [pytest.param(mutant, id=mutant.name) for mutant in MUTANTS])


@BY_NAME
def test_the_check_passes_without_the_bug(mutant: Mutant, tmp_path: Path) -> None:
    mutant.check(tmp_path)


@BY_NAME
def test_the_bug_is_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    with pytest.raises(AssertionError):
        mutant.check(tmp_path)


def test_a_mutant_that_no_longer_matches_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = Mutant("stale", StepRecorder, "paused", "no such text", "", a_pause_inside_a_pause_does_not_end_it)
    with pytest.raises(ValueError, match="needed once in paused, got 0 times"):
        plant(stale, monkeypatch)
