"""Trainers that step and clip by themselves: Lightning's, transformers', accelerate. Skipped where they are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, sgd

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _compare import MAX_NORM, Check, Training, bits_of, differences, truth_of
from _real_models import prepare_imports
from _trainers import TRAINER_CHECKS

import gradprobe


@pytest.mark.usefixtures("probe_warnings_are_errors")
@pytest.mark.parametrize("check", TRAINER_CHECKS, ids=lambda check: f"{check.name.split('/')[1]}-{check.setting}")
def test_the_training_stays_and_the_numbers_are_those_before_clipping(check: Check) -> None:
    prepare_imports()
    for package in check.packages:
        pytest.importorskip(package)
    assert differences(check.train(False, True), check.train(True, True)) == []


def trained(probed: bool = False, when: str = "backward", fault: str = "") -> Training:
    """Trains for two clipped steps, with a fault that a probe might have."""
    model = mlp()
    optimizer = sgd(model)
    training = Training(max_norm=MAX_NORM)
    probe = gradprobe.attach(model, optimizer=optimizer, when=when) if probed else None  # type: ignore[arg-type]
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        if not probed:
            training.truths.append(truth_of(model))
        if fault == "changes a gradient":
            model[0].weight.grad[0, 0] += 1e-6
        if fault == "draws a random number":
            torch.rand(1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    training.bits = bits_of(model, optimizer)
    if fault == "records a step too many":
        loss_of(model).backward()
        optimizer.step()
    training.history = [] if probe is None else probe.history()
    return training


@pytest.mark.parametrize(
    ("fault", "kind", "part"),
    [
        ("changes a gradient", "training", "parameter 0.weight differs"),
        ("draws a random number", "training", "random numbers of torch differs"),
        ("records a step too many", "steps", "[0, 1, 2]"),
    ],
)
def test_the_comparison_sees_a_fault(fault: str, kind: str, part: str) -> None:
    found = differences(trained(), trained(probed=True, fault=fault))
    assert any(each.kind == kind and part in each.message for each in found)


def test_the_comparison_sees_numbers_after_clipping() -> None:
    found = differences(trained(), trained(probed=True, when="step"))
    assert {"norm", "rms", "abs_max", "abs_mean", "mean", "std", "total"} <= {
        each.message.split(": ")[1].split()[0] for each in found if each.kind == "numbers"
    }
