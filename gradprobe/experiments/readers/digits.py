"""Reads ``digits``: scikit-learn's 1,797 handwritten digits of 8x8 pixels, which are part of the library."""

from __future__ import annotations

import numpy as np
import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw


def read(spec: DataSpec) -> Raw:
    """Reads the digits, split 75/25 by class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ArgumentError("data: digits needs scikit-learn: pip install gradprobe[sweep]") from error
    bunch = load_digits()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=0.25, random_state=0, stratify=bunch.target)
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    return Raw("digits", "digits", Examples(images[train], labels[train]), Examples(images[test], labels[test]), 10)
