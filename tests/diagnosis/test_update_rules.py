"""Rules on the optimizer's updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.diagnose_cases import FALLING, FLAT, course
from torch import nn
from torch.nn import functional

import gradprobe
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.finding import Finding
from gradprobe.snapshot.updates import Updates

N_VALUES = 1000


def moving(
    losses: list[float],
    ratio: float,
    still: float = 0.0,
    zeros: float = 0.0,
    norm: float = 2.0,
    last_ratio: float = 1e-3,
) -> list[gradprobe.Snapshot]:
    """Returns steps of three weights: `still` of the first two does not move, `zeros` of all has no gradient."""
    measured = gradprobe.snapshot.Measured(np.ones(3, dtype=np.bool_), np.full(3, N_VALUES))

    def rows(norms: list[float], n_zero: list[float]) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([[0.0, a, a**2, a, n, 0.0] for a, n in zip(norms, n_zero, strict=True)])

    weight = rows([norm] * 3, [0.0] * 3)
    update = rows([ratio * norm] * 2 + [last_ratio * norm], [still * N_VALUES] * 2 + [0.0])
    gradients = rows([1.0] * 3, [zeros * N_VALUES] * 3)
    return [
        replace(
            one, rows=gradients, measured=measured, parameter_updates=Updates(one.table.names, weight, update, measured)
        )
        for one in course(losses, [1.0] * 3, n_classes=0)
    ]


def titles(history: list[gradprobe.Snapshot]) -> list[str]:
    return [found.title for found in diagnose(history)]


@pytest.mark.parametrize(
    ("ratio", "still", "zeros", "expected"),
    [
        (1e-3, 0.0, 0.0, []),
        (9.9, 0.0, 0.0, []),
        (10.1, 0.0, 0.0, ["updates too large"]),
        (1.1e-8, 0.0, 0.0, []),
        (0.9e-8, 0.0, 0.0, ["updates too small"]),
        (0.0, 1.0, 0.0, ["updates too small"]),
        (1e-3, 0.51, 0.0, ["updates too small"]),
        (1e-3, 0.49, 0.0, []),
        (1e-3, 0.9, 0.6, []),  # most unmoved elements have no gradient
    ],
)
def test_thresholds(ratio: float, still: float, zeros: float, expected: list[str]) -> None:
    assert titles(moving(FLAT[:10], ratio, still, zeros)) == expected


def test_a_run_that_converges_has_healthy_updates() -> None:
    assert titles(moving(FALLING, 20.0)) == []
    assert titles(moving(FALLING, 0.0, still=1.0)) == []


def test_one_weight_is_too_few_for_large_updates_but_enough_for_small_ones() -> None:
    assert titles(moving(FLAT[:10], 1e-3, last_ratio=50.0)) == []
    (finding,) = diagnose(moving(FLAT[:10], 1e-3, last_ratio=1e-9))
    assert (finding.title, finding.sites) == ("updates too small", ("layer2.weight",))
    assert "by 1e-09 of its norm in a step" in finding.message


def test_one_step_with_large_updates_is_enough() -> None:
    history = moving(FLAT[:10], 1e-3)
    history[4] = replace(moving(FLAT[:5], 300.0)[4])
    (finding,) = diagnose(history)
    assert (finding.title, finding.steps) == ("updates too large", (4, 4))
    assert finding.message.startswith("step 4: layer0.weight is moved by 300 times its own norm")


def test_the_first_update_of_a_zero_weight_is_not_too_large() -> None:
    history = moving(FLAT[:10], 1e-3)
    history[0] = replace(
        history[0],
        parameter_updates=replace(history[0].parameter_updates, weight_rows=np.zeros((3, 6))),  # type: ignore[type-var]
    )
    assert titles(history) == []


def test_a_skipped_step_does_not_count() -> None:
    assert titles([replace(one, skipped=k < 6) for k, one in enumerate(moving(FLAT[:10], 0.0, still=1.0))]) == []


def train(model: nn.Module, rate: float, n_steps: int = 20) -> list[Finding]:
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    with gradprobe.attach(model, optimizer=optimizer, updates=True) as probe:
        for _ in range(n_steps):
            optimizer.zero_grad()
            x = torch.randn(32, 8, generator=generator).to(dtype)
            loss = functional.mse_loss(model(x), x[:, :1])
            loss.backward()
            optimizer.step()
            probe.step(loss=loss)
        return probe.findings()


def test_bfloat16_weights_lose_small_updates() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    lost = {found.rule: found for found in train(network().bfloat16(), 1e-4)}["updates too small"]
    assert lost.sites == ("0.weight", "2.weight")
    assert lost.evidence["lost_share"] > 0.9
    assert "weights in float32" in lost.remedies[0]
    assert "updates too small" not in {found.rule for found in train(network(), 1e-4)}
