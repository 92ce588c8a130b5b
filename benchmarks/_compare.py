"""Compares a training with a probe to the same training without one: every bit, and every number against float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

import gradprobe

TOLERANCE = 1e-6  # relative
CLIP_TOLERANCE = 1e-5  # of the clip factor, which the gradients carry in float32
MAX_NORM = 0.01  # low enough to clip in every step of every model

Kind = Literal["error", "training", "steps", "numbers", "labels"]


@dataclass(frozen=True)
class Truth:
    """What a snapshot must say of one optimizer step.

    Attributes:
        gradients: float64 statistics of every gradient before clipping, by the parameter's first name.
        skipped: The gradient scaler skipped the step.
    """

    gradients: Mapping[str, Mapping[str, float]]
    skipped: bool = False

    @property
    def total_norm(self) -> float:
        """Norm of all gradients together."""
        norms = [values["norm"] for values in self.gradients.values()]
        return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)


@dataclass
class Training:
    """One training, with or without a probe.

    Attributes:
        truths: One per optimizer step, noted only without a probe.
        history: The probe's snapshots; empty without one.
        bits: What must be the same bit for bit at the end.
        max_norm: What the total norm was clipped to, None without clipping.
    """

    truths: list[Truth] = field(default_factory=list)
    history: list[gradprobe.Snapshot] = field(default_factory=list)
    bits: dict[str, torch.Tensor] = field(default_factory=dict)
    max_norm: float | None = None


@dataclass(frozen=True)
class Check:
    """One training to run with a probe and without.

    Attributes:
        name: Name of the model or trainer.
        setting: How it is trained, and how the probe is attached.
        packages: The packages that it needs.
        train: Trains, given whether to attach a probe and whether to clip.
    """

    name: str
    setting: str
    packages: tuple[str, ...]
    train: Callable[[bool, bool], Training]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it must be."""

    kind: Kind
    message: str


def seed_all() -> None:
    """Sets every seed that a model or a trainer may draw from."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def truth_of(model: nn.Module, skipped: bool = False) -> Truth:
    """Measures the gradients as they are now.

    Args:
        model: The model, after its backward and before clipping.
        skipped: As in `Truth`.

    Returns:
        The truth of this step.
    """
    return Truth({name: _exact(p.grad) for name, p in model.named_parameters() if p.grad is not None}, skipped)


def bits_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, losses: Iterable[float] = ()
) -> dict[str, torch.Tensor]:
    """Copies the state of a training.

    Args:
        model: Its parameters and buffers.
        optimizer: Its state.
        losses: One per batch.

    Returns:
        Tensors by name, with the states of the random number generators of torch, numpy and Python.
    """
    held = {f"parameter {name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    held |= {f"buffer {name}": tensor.detach().clone() for name, tensor in model.named_buffers()}
    states = optimizer.state_dict()["state"] if optimizer is not None else {}
    for key, state in states.items():
        held |= {f"{name} of parameter {key}": value.clone() for name, value in state.items() if torch.is_tensor(value)}
    held["losses"] = torch.tensor(list(losses), dtype=torch.float64)
    held["random numbers of torch"] = torch.get_rng_state()
    held["random numbers of numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    held["random numbers of Python"] = torch.tensor(random.getstate()[1])
    return held


def differences(bare: Training, probed: Training) -> list[Difference]:
    """Compares two runs of the same training.

    Args:
        bare: Without a probe.
        probed: With one.

    Returns:
        Everything that differs, the training first.
    """
    found = [Difference("training", f"{name} differs") for name in changed(bare, probed)]
    steps, expected = [snapshot.step for snapshot in probed.history], list(range(len(bare.truths)))
    if steps != expected:
        return [*found, Difference("steps", f"needed snapshots of the steps {expected}, got {steps}")]
    for truth, snapshot in zip(bare.truths, probed.history, strict=True):
        found += _wrong_numbers(truth, snapshot)
        found += _wrong_labels(truth, snapshot, bare.max_norm)
    return found


def changed(one: Training, other: Training) -> list[str]:
    """Lists what does not have the same bits at the end of two trainings.

    Args:
        one: A training.
        other: Another.

    Returns:
        Names, as `bits_of` gives them.
    """
    names = dict.fromkeys([*one.bits, *other.bits])
    return [name for name in names if not _same_bits(one.bits.get(name), other.bits.get(name))]


def _exact(gradient: torch.Tensor) -> dict[str, float]:
    values = gradient.detach().double()
    n = max(values.numel(), 1)
    mean, mean_square = (values.sum() / n).item(), (values.square().sum() / n).item()
    return {
        "norm": values.norm().item(),
        "rms": math.sqrt(mean_square),
        "abs_max": values.abs().max().item() if values.numel() else 0.0,
        "abs_mean": (values.abs().sum() / n).item(),
        "mean": mean,
        "std": values.std(correction=0).item() if values.numel() else 0.0,
        "zero_fraction": (values == 0).sum().item() / n,
        "nonfinite": (~values.isfinite()).sum().item(),
        "numel": values.numel(),
    }


def _same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _wrong_numbers(truth: Truth, snapshot: gradprobe.Snapshot) -> Iterator[Difference]:
    step = snapshot.step
    if missing := truth.gradients.keys() - snapshot.sites.keys():
        yield Difference("numbers", f"step {step}: {len(missing)} gradients missing, such as {min(missing)}")
    if invented := snapshot.sites.keys() - truth.gradients.keys():
        yield Difference("numbers", f"step {step}: {len(invented)} gradients invented, such as {min(invented)}")
    for name, exact in truth.gradients.items():
        for column, value in exact.items() if name in snapshot else ():
            got = getattr(snapshot[name], column)
            if not _is_close(column, got, exact):
                yield Difference("numbers", f"step {step}: {column} of {name}: needed {value!r}, got {got!r}")
    if not _is_near(snapshot.total_norm, truth.total_norm, TOLERANCE * truth.total_norm):
        message = f"step {step}: total norm: needed {truth.total_norm!r}, got {snapshot.total_norm!r}"
        yield Difference("numbers", message)


def _is_close(column: str, got: float, exact: Mapping[str, float]) -> bool:
    value = exact[column]
    if column in ("zero_fraction", "nonfinite", "numel"):
        return got == value
    if column == "mean":  # positive and negative elements cancel
        return _is_near(got, value, TOLERANCE * exact["abs_mean"])
    if column == "std":  # computed as the mean square less the square of the mean
        return _is_near(got * got, value * value, 2 * TOLERANCE * exact["rms"] ** 2)
    return _is_near(got, value, TOLERANCE * abs(value))


def _is_near(got: float, value: float, tolerance: float) -> bool:
    if not math.isfinite(value):
        return got == value or (math.isnan(got) and math.isnan(value))
    return abs(got - value) <= tolerance


def _wrong_labels(truth: Truth, snapshot: gradprobe.Snapshot, max_norm: float | None) -> Iterator[Difference]:
    if snapshot.skipped != truth.skipped:
        yield Difference("labels", f"step {snapshot.step}: needed skipped {truth.skipped}, got {snapshot.skipped}")
    if truth.skipped:
        return  # the optimizer read nothing
    coefficient = 1.0 if max_norm is None else max_norm / (truth.total_norm + 1e-6)
    is_clipped = coefficient < 1.0
    needed = ("unscaled", "local", "clipped" if is_clipped else "raw")
    if (got := tuple(snapshot.provenance)) != needed:
        yield Difference("labels", f"step {snapshot.step}: provenance: needed {needed}, got {got}")
    factor = getattr(snapshot, "clip_factor", None)
    expected = min(coefficient, 1.0)
    if factor is None or not _is_near(factor, expected, CLIP_TOLERANCE * expected):
        yield Difference("labels", f"step {snapshot.step}: clip factor: needed {expected:.7g}, got {factor}")
