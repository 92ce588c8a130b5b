"""Handwritten digits at the size of CIFAR's images: real data that is there without a download."""

from __future__ import annotations

from torch import Tensor, nn

from gradprobe.experiments.data import load


def enlarged_digits(batch_size: int, image_size: int = 32) -> tuple[Tensor, Tensor]:
    """Returns a batch: images [batch_size, 1, image_size, image_size], standardised, and their classes [batch_size]."""
    digits = load("digits")
    images = nn.functional.interpolate(digits.train_x[:batch_size], size=image_size, mode="bilinear")
    return images, digits.train_y[:batch_size]
