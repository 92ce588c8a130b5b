"""Trainings of a layout with and without a probe, reduced to what can be sent to the process of the tests."""

from __future__ import annotations

import math
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from helpers.layout_parts import Gradients, Part
from helpers.layouts import LAYOUTS, Layout
from torch import nn
from torch.distributed.tensor import DTensor

import gradprobe

Statistics = dict[str, float]
"""As the fields of `SiteStats`."""

MAX_NORM = 0.02
_N_STEPS = 3
_SEED = 7
_SIZES = ((1e-73, 1.0), (1.0, 1e73), (1e-140, 1e80))
_OPTIONS: dict[str, dict[str, Any]] = {
    "activations": {"activations": True},
    "at step": {"when": "step"},
    "in hooks": {"when": "hook"},
    "updates": {"updates": True},
}


@dataclass
class Truth:
    """One step of a training without a probe.

    Attributes:
        sites: Statistics of the whole gradients before clipping, by name.
        total: Their norm together.
        returned: What torch's clipping returned, if it clipped.
        weights: The bytes of this rank's parameters after the step.
        values: The same as numbers.
    """

    sites: dict[str, Statistics]
    total: float
    returned: float | None = None
    weights: dict[str, bytes] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Seen:
    """One snapshot. Of the weights and updates, the norms."""

    step: int
    sites: dict[str, Statistics]
    total_norm: float
    reduction: str
    state: str
    clip_factor: float | None
    skipped: bool
    scale: str
    weights: dict[str, float]
    updates: dict[str, float]


@dataclass
class Trained:
    """What one rank saw.

    Attributes:
        bare: The steps without a probe.
        alone: The steps in one process, on the batches of all ranks together.
        initial: Norms of the weights at the start, by the names in one process.
        parts: Which parameters of the one process make up a parameter.
        snapshots: What the probe recorded.
        returned: What `Probe.clip_grad_norm_` returned.
        weights: The bytes of this rank's parameters after each step with the probe.
        values: The same as numbers.
        warned: Warnings while the probe was attached.
        error: The traceback if the training with the probe failed.
    """

    bare: list[Truth]
    alone: list[Truth]
    initial: dict[str, float]
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    snapshots: list[Seen] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    weights: list[dict[str, bytes]] = field(default_factory=list)
    values: list[dict[str, list[float]]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    error: str | None = None


def statistics(gradient: torch.Tensor) -> Statistics:
    """Computes in float64 what a snapshot should say of a gradient."""
    x = gradient.detach().double().flatten()
    n = max(1, x.numel())
    n_zero = int((x == 0).sum())
    largest = x.abs().max().item() if x.numel() else 0.0
    unit = largest if math.isfinite(largest) and largest > 0 else 1.0
    x = x / unit
    mean = x.sum().item() / n
    return {
        "norm": x.square().sum().sqrt().item() * unit,
        "rms": (x.square().sum() / n).sqrt().item() * unit,
        "abs_max": largest,
        "abs_mean": x.abs().sum().item() / n * unit,
        "mean": mean * unit,
        "std": (x - mean).square().mean().sqrt().item() * unit if x.numel() > 1 else 0.0,
        "zero_fraction": n_zero / n,
        "nonfinite": int((~torch.isfinite(x)).sum()),
        "numel": x.numel(),
    }


def train_case(layout: str, variant: str, rank: int, n_ranks: int) -> Trained:
    """Trains a layout without and with a probe."""
    one = LAYOUTS[layout]
    alone_model = _fresh(one, variant)
    initial = {name: statistics(parameter)["norm"] for name, parameter in alone_model.named_parameters()}
    alone = _train_bare(one, Part(alone_model, alone_model), variant, clips_by_hand=True)
    bare_part = one.build(_fresh(one, variant), rank, n_ranks, variant == "bfloat16")
    trained = Trained(_train_bare(one, bare_part, variant), alone, initial, dict(bare_part.parts or {}))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _train_probed(one, one.build(_fresh(one, variant), rank, n_ranks, variant == "bfloat16"), variant, trained)
        trained.warned = [str(each.message) for each in caught if issubclass(each.category, gradprobe.GradprobeWarning)]
    except Exception:  # noqa: BLE001
        trained.error = traceback.format_exc()
    return trained


def _fresh(layout: Layout, variant: str) -> nn.Module:
    torch.manual_seed(_SEED)
    model = layout.model()
    return model.double() if variant == "wide" else model


def _optimizer(part: Part, variant: str) -> torch.optim.SGD:
    return torch.optim.SGD(part.model.parameters(), lr=0.0 if variant == "wide" else 0.1)


def _scaler(variant: str) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=1024.0) if variant == "scaler" else None


def _backward(layout: Layout, part: Part, step: int, variant: str, scaler: torch.amp.GradScaler | None) -> None:
    n = 2 if variant == "accumulated" else 1

    def loss_of(y: torch.Tensor) -> torch.Tensor:
        if variant == "wide":
            # the rows of the last weight, which ranks share out, have gradients of other sizes: squares of these
            low, high = _SIZES[step]
            n_low = y.shape[-1] // 2
            sizes = torch.tensor([low] * n_low + [high] * (y.shape[-1] - n_low), dtype=torch.float64)
            return (y * sizes).square().mean()
        loss = y.float().square().mean() / n
        if variant == "tiny":
            return loss * 1e-25
        if scaler is not None:
            return scaler.scale(loss * (math.inf if step == 1 else 1.0))
        return loss

    for k in range(n):
        batch = layout.batch(torch.Generator().manual_seed(100 * step + k))
        if variant == "wide":
            batch = batch.double()
        if variant == "nonfinite" and step == _N_STEPS - 1:
            batch[0, ..., 0] = math.inf
        part.backward(batch, loss_of, k == n - 1)


def _train_bare(layout: Layout, part: Part, variant: str, clips_by_hand: bool = False) -> list[Truth]:
    optimizer, scaler = _optimizer(part, variant), _scaler(variant)
    steps = []
    for step in range(_N_STEPS):
        optimizer.zero_grad()
        _backward(layout, part, step, variant, scaler)
        scale = 1.0 if scaler is None else scaler.get_scale()
        truth = _truth_of({name: gradient / scale for name, gradient in part.gradients().items()})
        if variant in ("torch clip", "probe clip"):
            if part.clip is not None and not clips_by_hand:
                truth.returned = float(part.clip(MAX_NORM))
            else:
                _scale(part.model, min(1.0, MAX_NORM / (truth.total + 1e-6)))
        _step(optimizer, scaler)
        truth.weights, truth.values = weights_of(part.model)
        steps.append(truth)
    return steps


def _train_probed(layout: Layout, part: Part, variant: str, trained: Trained) -> None:
    optimizer, scaler = _optimizer(part, variant), _scaler(variant)
    is_closed_by_hand = variant in ("by hand", "in hooks")
    probe = gradprobe.attach(
        part.model,
        optimizer=None if is_closed_by_hand else optimizer,
        grad_scaler=scaler,
        process_group=part.process_group,
        strict=True,
        **_OPTIONS.get(variant, {}),
    )
    with probe:
        for step in range(_N_STEPS):
            optimizer.zero_grad()
            _backward(layout, part, step, variant, scaler)
            if variant == "probe clip":
                # the two ways of clipping may round the weights before differently
                truth = _truth_of(part.gradients())
                trained.bare[step].sites, trained.bare[step].total = truth.sites, truth.total
                trained.returned.append(float(_plain(probe.clip_grad_norm_(MAX_NORM))))
            elif variant == "torch clip":
                assert part.clip is not None
                part.clip(MAX_NORM)
            if is_closed_by_hand:
                with torch.no_grad():
                    for parameter in part.model.parameters():
                        if parameter.grad is not None:
                            parameter.add_(parameter.grad, alpha=-0.1)
                probe.step()
            else:
                _step(optimizer, scaler)
            bits, values = weights_of(part.model)
            trained.weights.append(bits)
            trained.values.append(values)
        trained.snapshots = [_seen(snapshot) for snapshot in probe.history()]


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _seen(snapshot: gradprobe.Snapshot) -> Seen:
    sites = {}
    for name, stats in snapshot.sites.items():
        values: dict[str, Any] = asdict(stats)
        assert values.pop("name") == name
        values.pop("kind")
        sites[name] = values
    provenance = snapshot.provenance
    return Seen(
        snapshot.step,
        sites,
        snapshot.total_norm,
        provenance.reduction,
        provenance.state,
        snapshot.clip_factor,
        snapshot.skipped,
        provenance.scale,
        {name: update.weight.norm for name, update in snapshot.updates.items()},
        {name: update.update.norm for name, update in snapshot.updates.items()},
    )


def _truth_of(gradients: Gradients) -> Truth:
    sites = {name: statistics(gradient) for name, gradient in gradients.items()}
    norms = torch.tensor([site["norm"] for site in sites.values()], dtype=torch.float64)
    return Truth(sites, statistics(norms)["norm"])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _scale(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            local_of(parameter.grad).mul_(factor)


def weights_of(model: nn.Module) -> tuple[dict[str, bytes], dict[str, list[float]]]:
    local = {name: local_of(parameter).contiguous().flatten() for name, parameter in model.named_parameters()}
    # the bits of NaN may differ from run to run
    plain = {name: torch.where(tensor.isnan(), math.nan, tensor) for name, tensor in local.items()}
    bits = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in plain.items()}
    return bits, {name: tensor.tolist() for name, tensor in local.items()}
