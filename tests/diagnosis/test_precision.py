"""Gradients that are too small for their dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.diagnose_cases import FALLING, FLAT, course
from torch import nn

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.snapshot.records import Events, Measured
from gradprobe.snapshot.signals import Signals, SignalTable

HALF, SINGLE = 2.0**-14, 2.0**-126
N_VALUES = 1000


def history(
    losses: list[float], mean: float, zeros: float = 0.0, smallest_normal: float = HALF, scale: float = 1.0
) -> list[gradprobe.Snapshot]:
    """Returns steps in which the scaled gradient at the output of module "a" has this mean magnitude."""
    table = SignalTable(("a",), (), ("Linear",))
    rows = np.array([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0, mean, mean**2, mean, zeros, 0.0]]) * N_VALUES
    measured = Measured(np.ones(2, dtype=np.bool_), np.full(2, N_VALUES))
    signals = Signals(table, rows, Events((0, 1), measured, np.full(2, smallest_normal)), scale)
    return [replace(one, signals=signals) for one in course(losses)]


@pytest.mark.parametrize(
    ("mean", "zeros", "smallest_normal", "is_lost"),
    [
        (0.4 * HALF, 0.0, HALF, True),
        (0.6 * HALF, 0.0, HALF, False),
        (0.3 * HALF, 0.5, HALF, False),  # the nonzero values have a mean of 0.6
        (0.2 * HALF, 0.5, HALF, True),
        (0.4 * HALF, 0.0, SINGLE, False),  # bfloat16, float32
        (0.4 * SINGLE, 0.0, SINGLE, True),
        (0.0, 1.0, HALF, False),  # no nonzero value to judge by
        (float("nan"), 0.0, HALF, False),
        (0.4 * HALF, 0.0, float("nan"), False),
    ],
)
def test_counts_values_below_the_smallest_normal_number(
    mean: float, zeros: float, smallest_normal: float, is_lost: bool
) -> None:
    found = [finding.rule for finding in diagnose(history(FLAT[:10], mean, zeros, smallest_normal))]
    assert found == (["precision loss"] if is_lost else [])


def test_float64_is_judged_without_a_numpy_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert diagnose(history(FLAT[:10], 10.0, smallest_normal=2.0**-1022)) == []
    assert [str(warning.message) for warning in recwarn] == []


def test_a_missing_gradient_is_not_small() -> None:
    steps = history(FLAT[:10], 0.0)
    for one in steps:
        one.signals.events.measured.present[1] = False
    assert diagnose(steps) == []


def test_the_newest_step_may_have_no_gradient() -> None:
    *steps, last = history(FLAT[:10], 0.1 * HALF)
    measured = Measured(np.array([True, False]), np.array([N_VALUES, 0]))
    forward_only = replace(last.signals, events=Events((0,), measured, np.array([HALF, math.nan])))
    (finding,) = diagnose([*steps, replace(last, signals=forward_only)])
    assert (finding.rule, finding.sites) == ("precision loss", ("a",))
    assert finding.evidence["smallest_normal"] == HALF


def test_must_persist_for_more_than_half_of_the_steps() -> None:
    small, healthy = history(FLAT[:10], 0.1 * HALF), history(FLAT[:10], HALF)
    assert diagnose([*small[:5], *healthy[5:]]) == []
    assert [one.rule for one in diagnose([*small[:6], *healthy[6:]])] == ["precision loss"]


def test_the_dtype_is_that_of_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with gradprobe.attach(model, activations=True) as probe:
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.float16, enabled=enabled):
                loss = model(torch.ones(2, 3)).sum()
            loss.backward()
            probe.step()
        seen = [one.signals.events.smallest_normal for one in probe.history()]
    assert [list(smallest[[0, 1, 5]]) for smallest in seen] == [[SINGLE] * 3, [HALF] * 3, [SINGLE] * 3]


def test_the_gradient_counts_before_loss_scaling_is_undone() -> None:
    assert diagnose(history(FLAT[:10], 100 * HALF, scale=1e-4)) == []
    (finding,) = diagnose(history(FLAT[:10], 0.1 * HALF, scale=1e4))
    assert finding.evidence == {
        "subnormal_share": pytest.approx(0.9),
        "smallest_normal": HALF,
        "modules": 1.0,
    }
    assert finding.sites == ("a",)
    assert finding.remedies[0] == "scale the loss with torch.amp.GradScaler"


def test_is_no_fault_if_the_loss_falls_and_the_limit_can_be_set() -> None:
    assert diagnose(history(FALLING, 0.1 * HALF)) == []
    assert diagnose(history(FLAT[:10], 0.1 * HALF), Thresholds(subnormal_share=0.95)) == []


class InFloat32(nn.Module):
    """A module that autocast does not touch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().tanh()


def gradients_in(dtype: torch.dtype, loss_factor: float) -> tuple[gradprobe.Snapshot, dict[str, torch.Tensor]]:
    """Returns one step under autocast, and copies of the gradients at the outputs of its modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), InFloat32(), nn.Linear(50, 10))
    seen: dict[str, torch.Tensor] = {}
    with gradprobe.attach(model, activations=True) as probe:
        for name, module in model.named_children():

            def keep(_module: nn.Module, _inputs: object, y: torch.Tensor, name: str = name) -> None:
                y.register_hook(lambda gradient: seen.setdefault(name, gradient.clone()))

            module.register_forward_hook(keep)
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(torch.randn(64, 20)), torch.arange(64) % 10)
        (loss_factor * loss).backward()
        probe.step(loss=loss)
        return probe.history()[0], seen


@pytest.mark.parametrize("loss_factor", [1e-2, 1e-3, 1e-4], ids=str)
def test_the_share_is_a_lower_bound_of_the_true_share(loss_factor: float) -> None:
    one, seen = gradients_in(torch.float16, loss_factor)
    assert [seen[name].dtype for name in "012"] == [torch.float16, torch.float32, torch.float16]
    (finding,) = diagnose([one])
    assert finding.rule == "precision loss"
    assert set(finding.sites) <= {"0", "2"}
    first = seen[finding.sites[0]].float().abs()
    truly = ((first > 0) & (first < HALF)).sum() / (first > 0).sum()
    assert 0.5 < finding.evidence["subnormal_share"] <= truly.item()


@pytest.mark.parametrize(("dtype", "loss_factor"), [(torch.float16, 100.0), (torch.bfloat16, 1e-4)], ids=str)
def test_scaling_and_bfloat16_help(dtype: torch.dtype, loss_factor: float) -> None:
    one, seen = gradients_in(dtype, loss_factor)
    assert seen["0"].dtype == dtype
    assert diagnose([one]) == []
