"""The type of a run of benchmarks/diagnosis.py, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import gradprobe

Fault = str  # title of a finding: the rule, and the pass in brackets where it needs one

BATCH_SIZE = 64
IMAGES, LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES = (IMAGES.float() / 16 - 0.3).view(-1, 1, 8, 8)  # [N, 1, 8, 8]

SGD = partial(torch.optim.SGD, momentum=0.9)
ADAM = torch.optim.Adam
ADAMW = torch.optim.AdamW


def classify(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The loss of a classifier."""
    return functional.cross_entropy(model(images), labels, label_smoothing=smoothing)


@dataclass(frozen=True)
class Run:
    """A network, how it is trained, and the fault it has.

    Steps are counted from the one at which the probe is attached.

    Attributes:
        name: Name in the table.
        build: Builds the network.
        fault: The planted fault, None for a healthy run.
        follows: Faults that may follow from the planted one.
        learning_rate: Learning rate.
        disturb: Changes the images of a batch, given the step.
        alter: Changes the network before a step, given the step.
        activations: Whether to observe activations.
        dtype: Dtype of autocast, None for no autocast.
        weights: Dtype of the parameters.
        loss_factor: Factor on the loss; the learning rate is divided by it.
        n_steps: Number of steps.
        optimizer: Makes the optimizer from parameters and learning rate.
        warm_up: Number of steps in which the learning rate rises from zero.
        n_before: Number of steps trained before the probe is attached.
        clears_gradients: Whether each step starts without the gradients of the last.
        labels: Changes the labels of a batch.
        loss: The loss of the network, given images and labels.
        observed: Name of the module that is trained and observed; "" is the whole network.
        is_slow: Whether it takes so long that only the long tests train it.
    """

    name: str
    build: Callable[[], nn.Module]
    fault: Fault | None = None
    follows: tuple[Fault, ...] = ()
    learning_rate: float = 0.02
    disturb: Callable[[torch.Tensor, int], torch.Tensor] = field(default=lambda images, step: images)
    alter: Callable[[nn.Module, int], None] = field(default=lambda model, step: None)
    activations: bool = True
    dtype: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    loss_factor: float = 1.0
    n_steps: int = 40
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    warm_up: int = 0
    n_before: int = 0
    clears_gradients: bool = True
    labels: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda labels: labels)
    loss: Callable[..., torch.Tensor] = classify
    observed: str = ""
    is_slow: bool = False


def train(run: Run, seed: int) -> gradprobe.Probe:
    """Trains one run.

    Args:
        run: The run.
        seed: Seed of the weights and of the order of the images.

    Returns:
        The attached probe, which holds the history.
    """
    torch.manual_seed(seed)
    model = run.build().to(run.weights)
    part = model.get_submodule(run.observed)
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    optimizer = run.optimizer(trained, lr=run.learning_rate / run.loss_factor)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (run.warm_up + 1)))
    probe = None
    for step, chosen in enumerate(batches(run.n_before + run.n_steps), start=-run.n_before):
        if step == 0:
            probe = gradprobe.attach(
                part, optimizer=optimizer, activations=run.activations, junctions=run.activations, updates=True
            )
        run.alter(model, step)
        images = run.disturb(IMAGES[chosen], step).to(run.weights)
        with torch.autocast("cpu", run.dtype, enabled=run.dtype is not None):
            loss = run.loss(model, images, run.labels(LABELS[chosen]))
        if run.clears_gradients:
            optimizer.zero_grad()
        (run.loss_factor * loss).backward()
        if probe is not None:
            probe.step(loss=loss)
        optimizer.step()
        ramp.step()
    assert probe is not None
    return probe


def batches(n_steps: int) -> Iterator[torch.Tensor]:
    """Yields the indices of the images of each batch. Shape [BATCH_SIZE]."""
    n_epochs = math.ceil(n_steps * BATCH_SIZE / len(IMAGES))
    order = torch.cat([torch.randperm(len(IMAGES)) for _ in range(n_epochs)])
    yield from order[: n_steps * BATCH_SIZE].view(n_steps, BATCH_SIZE)
