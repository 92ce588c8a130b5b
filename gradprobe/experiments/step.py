"""One step of a training, from the indices of a batch to the optimizer's update; it never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.experiments.data import Dataset, take_batch
from gradprobe.experiments.device import Precision, autocast


class TrainingStep:
    """Trains a network on one batch per call.

    Args:
        model: The network.
        optimizer: Its optimizer.
        data: The data, on the network's device.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, precision: Precision) -> None:
        self.optimizer = optimizer
        self._model = model
        self._data = data
        self._precision = precision

    def __call__(self, batch: Tensor) -> Tensor:
        """Trains on a batch.

        Args:
            batch: One of `gradprobe.experiments.data.draw_batches`.

        Returns:
            The mean loss, and the number of images whose class was right, [2] float64 on the device.
        """
        images, labels = take_batch(self._data, batch)
        with autocast(images.device, self._precision):
            logits = self._model(images)  # [B, num_classes]
        if self._precision != "float32":
            logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        return torch.stack((loss.detach().double(), n_right(logits.detach(), labels).double()))


def n_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts the images, one per row of logits, whose class is right; never one with a non-finite logit.

    Returns:
        The number, 0-d on the device.

    Example:
        >>> n_right(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, float("inf")]]), torch.tensor([1, 1, 1])).item()
        1
    """
    return (torch.isfinite(logits).all(dim=1) & (logits.argmax(dim=1) == labels)).sum()
