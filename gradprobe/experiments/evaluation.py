"""Evaluates a network over a whole set of examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.experiments.data import channels_last
from gradprobe.experiments.device import Precision, autocast
from gradprobe.experiments.folding import folded
from gradprobe.experiments.step import n_right

EVALUATION_BATCH = 256  # on a CPU the fastest of 128, 256 and 512 for 56 layers and 8x8 pixels
DEVICE_EVALUATION_BATCH = 2048
BATCH_OF_STATISTICS = 128  # an evaluation that is normalised by batch statistics depends on it


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, *, by_batch: bool = False, precision: Precision = "float32"
) -> tuple[float, float]:
    """Computes a network's loss and error over a whole set, and leaves the network unchanged.

    Args:
        model: The network.
        images: [N, C, H, W] or [N, F] float32, on the network's device.
        labels: [N] int64, there too.
        by_batch: Normalise by batch statistics instead of running averages.
        precision: As in a `Recipe`.

    Returns:
        Mean cross-entropy, and the error in percent. An image with a non-finite logit counts as an error.
    """
    training = model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(by_batch)
    forward = (None if by_batch else folded(model)) or model
    size = EVALUATION_BATCH if images.device.type == "cpu" else DEVICE_EVALUATION_BATCH
    size = BATCH_OF_STATISTICS if by_batch else size
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    with torch.no_grad(), autocast(images.device, precision):
        for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            logits = forward(channels_last(x))  # [B, num_classes]
            loss += F.cross_entropy(logits.double(), y, reduction="sum")
            right += n_right(logits, y)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.train(training)
    return loss.item() / len(labels), 100.0 * (1 - right.item() / len(labels))
