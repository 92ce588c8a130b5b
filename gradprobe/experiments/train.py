"""Trains one cell of the sweep with the probe attached; an interrupted cell resumes to bit-identical numbers.

No random stream runs through the whole training: initialisation, order of the images and augmentation come from a
generator keyed by (seed, epoch), and so does what a user's network draws on the device. A cell needs one thread.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gradprobe import networks
from gradprobe.errors import ArgumentError
from gradprobe.experiments import device as devices
from gradprobe.experiments import optimizers
from gradprobe.experiments.data import Dataset, draw_batches
from gradprobe.experiments.device import Precision
from gradprobe.experiments.evaluation import evaluate
from gradprobe.experiments.graphed_step import GraphedStep, may_capture
from gradprobe.experiments.models import build, trained_weights
from gradprobe.experiments.step import TrainingStep
from gradprobe.probe.probe import attach
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow, Status
from gradprobe.snapshot.snapshot import Snapshot

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
        momentum: Momentum, of an optimizer that has one.
        weight_decay: Weight decay of all parameters.
        warmup_learning_rate: Learning rate of networks of ``warmup_depth`` layers or more until an epoch ends with a
            training error below ``warmup_error_pct``.
        warmup_depth: Depth from which networks warm up, in layers.
        warmup_error_pct: Training error that ends the warm-up, in percent.
        optimizer: An optimizer of ``torch.optim``, for `gradprobe.experiments.optimizers.parse`.
        norm: Normalisation of the networks of `gradprobe.networks`.
        init: Initialisation of the networks of `gradprobe.networks`.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast; the weights are float32 in either case.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_learning_rate: float = 0.01
    warmup_depth: int = 110
    warmup_error_pct: float = 80.0
    optimizer: str = "sgd"
    norm: networks.Norm = "batch"
    init: networks.Init = "he"
    precision: Precision = "float32"

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


@dataclass(frozen=True)
class EpochProgress:
    """How far an epoch is.

    Attributes:
        share: Share of its steps that are done.
        seconds: Time since it began.
    """

    share: float
    seconds: float


def train_cell(
    family: str,
    depth: int,
    seed: int,
    data: Dataset,
    recipe: Recipe,
    state: bytes | None,
    whole_train_error: bool = False,
    progress_every_s: float = math.inf,
    *,
    device: str = "cpu",
    graph: bool = True,
) -> Iterator[EpochResult | EpochProgress]:
    """Trains a cell from its start or from a checkpoint to its end.

    Many CPUs are slow on denormals, so training there flushes them to zero, unless that could hide a small gradient:
    the first step of every epoch, and so the record of epoch 0, runs without flushing, and the rest of the epoch
    flushes only if every gradient of that step was far above the denormals (`FLUSH_ABOVE`). The probe's own arithmetic
    sees denormals in either case.

    Residual adds are observed only in the first step of each epoch, to save time. The whole training set is evaluated
    only before the first step and after the last; in between the running training error is recorded, as most training
    scripts do. The numbers of the training do not depend on that.

    A cell whose training loss becomes non-finite stops within that epoch: the epoch is recorded, and the status is
    ``"diverged"``.

    Args:
        family: ``"plain"``, ``"resnet"`` or ``MODULE:CALLABLE``; see `gradprobe.experiments.models.build`.
        depth: Depth that the family supports.
        seed: Seed of the initialisation, the order of the images and their augmentation.
        data: Data set to train on.
        recipe: Training settings.
        state: Checkpoint from an earlier result of the same cell, or None.
        whole_train_error: Evaluate the whole training set after every epoch.
        progress_every_s: Seconds of an epoch after which its progress is yielded, again and again; by default never.
        device: Device of torch to train on, such as ``"cuda"``. The batches are the same on all devices, and the
            numbers are equal within rounding.
        graph: Capture the training step as a CUDA graph, on a device that has such.

    Yields:
        One result per epoch, and the progress between its steps.

    Raises:
        ArgumentError: The family or the depth is unknown.
        BackendError: The training step cannot be captured as a CUDA graph.

    Source:
        He et al. 2015, section 4.2.
    """
    on = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_generator_seed(seed, 0))
        model = build(family, depth, data, recipe.norm, recipe.init)
    data = data.to(on)
    # On a CPU nearly twice as fast for 32x32 images, and 10 % faster for 8x8.
    model = model.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe)
    batch_size = min(recipe.batch_size, len(data.train_x))
    steps = len(data.train_x) // batch_size
    first_epoch, warming = 1, depth >= recipe.warmup_depth
    if state is not None:
        saved = load_state(model, state)
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, warming = saved["epoch"] + 1, saved["warming"]

    weights = trained_weights(family, model, data)
    stream = devices.make_stream(on)
    measure = partial(_measure, model, data, recipe.precision)
    with attach(model, optimizer=optimizer, activations_every=steps, capacity=steps) as probe:
        eager_step = TrainingStep(model, optimizer, data, recipe.precision)
        train_step = GraphedStep(eager_step, probe) if graph and may_capture(optimizer, on) else eager_step
        for epoch in range(first_epoch, recipe.epochs + 1):
            began = time.perf_counter()
            with devices.training(on, stream, _generator_seed(seed, epoch)):
                start = [measure(epoch=0, began=began)] if epoch == 1 else []
                began = told_at = time.perf_counter()
                generator = torch.Generator().manual_seed(_generator_seed(seed, epoch))
                batches = draw_batches(data, batch_size, generator)
                outcomes = torch.empty(steps, 2, dtype=torch.float64, device=on)  # loss and number right
                model.train()
                for step in range(steps):
                    rate = recipe.learning_rate_at((epoch - 1) * steps + step, recipe.epochs * steps, warming)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    outcomes[step] = train_step(batches[step])
                    if on.type == "cpu":  # to ask another device now would wait for it
                        if step == 0:
                            torch.set_flush_denormal(_may_flush(probe.history()[-1]))
                        if not torch.isfinite(outcomes[step, 0]):
                            break
                    if (now := time.perf_counter()) - told_at >= progress_every_s:
                        told_at = now
                        yield EpochProgress((step + 1) / steps, now - began)
                losses, right = outcomes[: step + 1].T.tolist()
                n_steps = next((n for n, loss in enumerate(losses, 1) if not math.isfinite(loss)), steps)
                finite = math.isfinite(losses[n_steps - 1])
                snapshots = probe.history()[-(step + 1) :][:n_steps]
                row = measure(
                    epoch,
                    began,
                    whole=whole_train_error or not finite or epoch == recipe.epochs,
                    running_loss=sum(losses[:n_steps]) / n_steps,
                    running_error_pct=100.0 * (1 - sum(right[:n_steps]) / (n_steps * batch_size)),
                )
                warming = warming and not row.running_error_pct < recipe.warmup_error_pct
                checkpoint = save_state(model, optimizer, epoch, warming)
            layers = (_layers(0, weights, snapshots[:1]) if epoch == 1 else ()) + _layers(epoch, weights, snapshots)
            status: Status = "diverged" if not finite else "done" if epoch == recipe.epochs else "pending"
            yield EpochResult(
                epochs=(*start, row),
                layers=layers,
                junctions=_junctions(epoch - 1, snapshots[0]),
                state=checkpoint,
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
        optimizer: Its optimizer, from `make_optimizer`.
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
    saved: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    model.load_state_dict(saved.pop("model"))
    return saved


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Makes a network's optimizer as the recipe says."""
    return optimizers.make(
        recipe.optimizer,
        model.parameters(),
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def _measure(
    model: nn.Module,
    data: Dataset,
    precision: Precision,
    epoch: int,
    began: float,
    *,
    whole: bool = True,
    **running: float,
) -> EpochRow:
    """Evaluates a network on the test set and, if ``whole``, on the training set, and adds the running errors."""
    # The running averages of an untrained network are meaningless.
    options: dict[str, Any] = {"by_batch": epoch == 0, "precision": precision}
    train_loss, train_error_pct = math.nan, math.nan
    if whole:
        train_loss, train_error_pct = evaluate(model, data.train_x, data.train_y, **options)
    _, test_error_pct = evaluate(model, data.test_x, data.test_y, **options)
    return EpochRow(epoch, train_loss, train_error_pct, test_error_pct, time.perf_counter() - began, **running)


def _may_flush(snapshot: Snapshot) -> bool:
    return not any(0 < site.abs_max < FLUSH_ABOVE for site in snapshot.sites.values())


def _layers(epoch: int, weights: Mapping[str, int], snapshots: Sequence[Snapshot]) -> tuple[LayerRow, ...]:
    """Summarises the weights' gradients over several steps: the median of each statistic, NaN if any step has NaN.

    A weight without a gradient in a step, as in a layer that is skipped at random, counts as one of zeros.
    """
    rows = []
    for position, (name, numel) in enumerate(weights.items()):
        seen = [snapshot[name] if name in snapshot else None for snapshot in snapshots]  # noqa: SIM401  no mapping
        rows.append(
            LayerRow(
                epoch=epoch,
                position=position,
                site=name,
                norm_l2=_median([site.norm if site else 0.0 for site in seen]),
                rms=_median([site.rms if site else 0.0 for site in seen]),
                abs_max=_median([site.abs_max if site else 0.0 for site in seen]),
                zero_fraction=_median([site.zero_fraction if site else 1.0 for site in seen]),
                nonfinite=max(site.nonfinite if site else 0 for site in seen),
                numel=numel,
            )
        )
    return tuple(rows)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


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
