"""Trains one cell of the sweep with the probe attached; an interrupted cell resumes to bit-identical numbers.

No random stream runs through the whole training: initialisation, order of the images and augmentation come from a
generator keyed by (seed, epoch). A cell needs one thread.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe import networks
from gradprobe.errors import ArgumentError
from gradprobe.experiments.data import Dataset, augment
from gradprobe.probe.probe import attach
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow, Status
from gradprobe.snapshot.snapshot import Snapshot

EVALUATION_BATCH = 128
# Denormals are flushed in an epoch only if in its first step no parameter's largest gradient is between 0 and this: the
# elements that flushing loses (below 1.2e-38) are then eight orders of magnitude too small to affect any norm.
FLUSH_ABOVE = 1e-30


@dataclass(frozen=True)
class Recipe:
    """Training settings of every cell of a sweep: He et al. 2015, section 4.2, scaled to the length of the run.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Images per step; the last, smaller batch of an epoch is dropped.
        learning_rate: Initial learning rate, divided by 10 at 50 % and at 75 % of the steps.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters.
        warmup_learning_rate: Learning rate of networks of ``warmup_depth`` layers or more until an epoch ends with a
            training error below ``warmup_error_pct``.
        warmup_depth: Depth from which networks warm up, in layers.
        warmup_error_pct: Training error that ends the warm-up, in percent.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_learning_rate: float = 0.01
    warmup_depth: int = 110
    warmup_error_pct: float = 80.0

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ArgumentError(f"{name}: needed at least 1, got {value}")

    def learning_rate_at(self, step: int, total_steps: int, warming: bool) -> float:
        """Returns the learning rate of a step.

        Args:
            step: Index of the step, from 0 over the whole run.
            total_steps: Number of steps of the whole run.
            warming: Whether the network is still warming up.

        Returns:
            The learning rate.

        Example:
            >>> recipe = Recipe(epochs=4, batch_size=64)
            >>> [round(recipe.learning_rate_at(step, 4, False), 6) for step in range(4)]
            [0.1, 0.1, 0.01, 0.001]
        """
        rate = self.warmup_learning_rate if warming else self.learning_rate
        drops = (2 * step >= total_steps) + (4 * step >= 3 * total_steps)
        return rate / 10.0**drops


@dataclass(frozen=True)
class EpochResult:
    """The rows of one epoch of a cell, the checkpoint for the next epoch, and the cell's status.

    The first result also has the rows of epoch 0. The residual adds are those of the epoch's first step.
    """

    epochs: tuple[EpochRow, ...]
    layers: tuple[LayerRow, ...]
    junctions: tuple[JunctionRow, ...]
    state: bytes
    status: Status


def build(family: str, depth: int, in_channels: int, num_classes: int) -> nn.Module:
    """Builds the network of a cell.

    Args:
        family: ``"plain"`` or ``"resnet"``.
        depth: Depth that `gradprobe.networks` supports.
        in_channels: Number of channels of the images.
        num_classes: Number of classes.

    Returns:
        The network.

    Raises:
        ArgumentError: The family or the depth is unknown.
    """
    makers = {"plain": networks.plain, "resnet": networks.resnet}
    if family not in makers:
        raise ArgumentError(f"families: needed one or more of {', '.join(networks.FAMILIES)}, got {family!r}")
    return makers[family](depth, in_channels=in_channels, num_classes=num_classes)


def train_cell(
    family: str, depth: int, seed: int, data: Dataset, recipe: Recipe, state: bytes | None
) -> Iterator[EpochResult]:
    """Trains a cell from its start or from a checkpoint to its end.

    Many CPUs are slow on denormals, so training flushes them to zero, unless that could hide a small gradient: the
    first step of every epoch, and so the record of epoch 0, runs without flushing, and the rest of the epoch flushes
    only if every gradient of that step was far above the denormals (`FLUSH_ABOVE`). The probe's own arithmetic sees
    denormals in either case.

    Residual adds are observed only in the first step of each epoch, to save time.

    A cell whose training loss becomes non-finite stops within that epoch: the epoch is recorded, and the status is
    ``"diverged"``.

    Args:
        family: ``"plain"`` or ``"resnet"``.
        depth: Depth that `gradprobe.networks` supports.
        seed: Seed of the initialisation, the order of the images and their augmentation.
        data: Data set to train on.
        recipe: Training settings.
        state: Checkpoint from an earlier result of the same cell, or None.

    Yields:
        One result per epoch.

    Raises:
        ArgumentError: The family or the depth is unknown.

    Source:
        He et al. 2015, section 4.2.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_generator_seed(seed, 0))
        model = build(family, depth, data.in_channels, data.num_classes)
    # On a CPU nearly twice as fast for 32x32 images, and 10 % faster for 8x8.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(model, recipe)
    batch_size = min(recipe.batch_size, len(data.train_x))
    steps = len(data.train_x) // batch_size
    first_epoch, warming = 1, depth >= recipe.warmup_depth
    if state is not None:
        saved = load_state(model, state)
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, warming = saved["epoch"] + 1, saved["warming"]

    weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    with attach(model, optimizer=optimizer, activations_every=steps, capacity=steps) as probe:
        for epoch in range(first_epoch, recipe.epochs + 1):
            began = time.perf_counter()
            start = [_measure(model, data, epoch=0, began=began)] if epoch == 1 else []
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(_generator_seed(seed, epoch))
            order = torch.randperm(len(data.train_x), generator=generator)
            finite = True
            model.train()
            torch.set_flush_denormal(False)
            for step in range(steps):
                rate = recipe.learning_rate_at((epoch - 1) * steps + step, recipe.epochs * steps, warming)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                chosen = order[step * batch_size : (step + 1) * batch_size]
                images = data.train_x[chosen]
                if data.augmented:
                    images = augment(images, generator)
                images = images.contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(images), data.train_y[chosen])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                if step == 0:
                    torch.set_flush_denormal(_may_flush(probe.history()[-1]))
                finite = bool(torch.isfinite(loss))
                if not finite:
                    break
            snapshots = probe.history()[-(step + 1) :]
            row = _measure(model, data, epoch, began)
            torch.set_flush_denormal(False)
            warming = warming and not row.train_error_pct < recipe.warmup_error_pct
            layers = (_layers(0, weights, snapshots[:1]) if epoch == 1 else ()) + _layers(epoch, weights, snapshots)
            status: Status = "diverged" if not finite else "done" if epoch == recipe.epochs else "pending"
            yield EpochResult(
                epochs=(*start, row),
                layers=layers,
                junctions=_junctions(epoch - 1, snapshots[0]),
                state=save_state(model, optimizer, epoch, warming),
                status=status,
            )
            if not finite:
                return


def _generator_seed(seed: int, epoch: int) -> int:
    """Derives an independent generator seed for each seed and epoch (0: initialisation)."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, warming: bool) -> bytes:
    """Makes the checkpoint from which `train_cell` resumes.

    Args:
        model: The network.
        optimizer: Its optimizer, from `sgd`.
        epoch: The last completed epoch.
        warming: Whether the network is still warming up.

    Returns:
        The checkpoint.
    """
    buffer = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "warming": warming}, buffer
    )
    return buffer.getvalue()


def is_whole(state: bytes) -> bool:
    """Checks a checkpoint of `save_state` against its checksums, which `torch.load` does not read.

    Args:
        state: The checkpoint, as read back.

    Returns:
        Whether no byte that counts has changed.

    Example:
        >>> is_whole(b"something else")
        False
    """
    try:
        with zipfile.ZipFile(io.BytesIO(state)) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001  a changed header raises errors of many kinds
        return False


def load_state(model: nn.Module, state: bytes) -> dict[str, Any]:
    """Loads the weights and running averages of a checkpoint into a network.

    Args:
        model: Network of the checkpoint's family and depth.
        state: Checkpoint from `save_state`.

    Returns:
        The rest of the checkpoint: ``optimizer``, ``epoch`` and ``warming``.
    """
    saved: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True)
    model.load_state_dict(saved.pop("model"))
    return saved


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Makes a network's optimizer as the recipe says."""
    return torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _measure(model: nn.Module, data: Dataset, epoch: int, began: float) -> EpochRow:
    # The running averages of an untrained network are meaningless.
    train_loss, train_error_pct = evaluate(model, data.train_x, data.train_y, by_batch=epoch == 0)
    _, test_error_pct = evaluate(model, data.test_x, data.test_y, by_batch=epoch == 0)
    return EpochRow(epoch, train_loss, train_error_pct, test_error_pct, time.perf_counter() - began)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, *, by_batch: bool = False) -> tuple[float, float]:
    """Computes a network's loss and error over a whole set, and leaves the network unchanged.

    Args:
        model: The network.
        images: [N, C, H, W] float32.
        labels: [N] int64.
        by_batch: Normalise by batch statistics instead of running averages.

    Returns:
        Mean cross-entropy, and the error in percent. An image with a non-finite logit counts as an error.
    """
    training = model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(by_batch)
    loss, right = 0.0, 0
    with torch.no_grad():
        for x, y in zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True):
            logits = model(x.contiguous(memory_format=torch.channels_last))  # [B, num_classes]
            loss += F.cross_entropy(logits.double(), y, reduction="sum").item()
            right += int((torch.isfinite(logits).all(dim=1) & (logits.argmax(dim=1) == y)).sum())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.train(training)
    return loss / len(labels), 100.0 * (1 - right / len(labels))


def _may_flush(snapshot: Snapshot) -> bool:
    return not any(0 < site.abs_max < FLUSH_ABOVE for site in snapshot.sites.values())


def _layers(epoch: int, weights: Sequence[str], snapshots: Sequence[Snapshot]) -> tuple[LayerRow, ...]:
    """Summarises the weights' gradients over several steps: the median of each statistic, NaN if any step has NaN."""
    rows = []
    for position, name in enumerate(weights):
        seen = [snapshot[name] for snapshot in snapshots]
        rows.append(
            LayerRow(
                epoch=epoch,
                position=position,
                site=name,
                norm_l2=float(np.median([site.norm for site in seen])),
                rms=float(np.median([site.rms for site in seen])),
                abs_max=float(np.median([site.abs_max for site in seen])),
                zero_fraction=float(np.median([site.zero_fraction for site in seen])),
                nonfinite=max(site.nonfinite for site in seen),
                numel=seen[0].numel,
            )
        )
    return tuple(rows)


def _junctions(epoch: int, snapshot: Snapshot) -> tuple[JunctionRow, ...]:
    """Makes the rows of the residual adds of one step, the first one after ``epoch`` completed epochs."""
    return tuple(
        JunctionRow(
            epoch=epoch,
            position=position,
            site=junction.name,
            shortcut_norm_l2=math.nan if junction.shortcut is None else junction.shortcut.norm,
            branch_norm_l2=math.nan if junction.branch is None else junction.branch.norm,
            cosine=junction.cosine,
            shortcut_share=junction.shortcut_share,
        )
        for position, junction in enumerate(snapshot.junctions.values())
    )
