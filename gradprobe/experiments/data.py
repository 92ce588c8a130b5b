"""Loads images for the experiments, preprocessed and augmented as in He et al. 2015, section 4.2."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradprobe.errors import ArgumentError

_SPECS = "digits, cifar10:DIR"
_PLANNED = ("imagefolder", "hf")

_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_RECORD = 1 + _CIFAR_PIXELS
_CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_FOLDER = "cifar-10-batches-bin"


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory, with the training images' per-pixel mean subtracted from both sets.

    Attributes:
        name: ``"digits"`` or ``"cifar10"``.
        spec: Argument of `load` that loads the same data from any working folder.
        train_x: [N, C, H, W] float32.
        train_y: [N] int64.
        test_x: [M, C, H, W] float32.
        test_y: [M] int64.
        num_classes: Number of classes; labels are 0 to num_classes - 1.
        augmented: Whether training images should go through `augment`.
        files: Names of the files read; empty for an embedded set.
    """

    name: str
    spec: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    augmented: bool
    files: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        """Number of channels of the images."""
        return self.train_x.shape[1]

    @property
    def summary(self) -> str:
        """The sizes and files in one line."""
        shape = "x".join(map(str, self.train_x.shape[1:]))
        source = f" from {', '.join(self.files)}" if self.files else ""
        return f"{self.name}: {len(self.train_x):,} training and {len(self.test_x):,} test images of {shape}{source}"

    @property
    def sha256(self) -> str:
        """Hash of all images and labels."""
        digest = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load(spec: str) -> Dataset:
    """Loads a data set.

    Args:
        spec: ``"digits"`` (scikit-learn's 1,797 handwritten digits of 8x8, embedded, split 75/25 by class) or
            ``"cifar10:DIR"`` (CIFAR-10's binary files: test_batch.bin and any of data_batch_1.bin to data_batch_5.bin).

    Returns:
        The data set. Pixels are scaled to 0..1 before the mean is subtracted.

    Raises:
        ArgumentError: The data set is unknown, files are missing, or a file is damaged or truncated.

    Example:
        >>> load("digits").summary
        'digits: 1,347 training and 450 test images of 1x8x8'
    """
    kind, _, place = spec.partition(":")
    if spec == "digits":
        return _digits()
    if kind == "cifar10" and place:
        return _cifar10(Path(place).expanduser())
    if kind == "cifar10":
        raise ArgumentError(f"data: needed cifar10:DIR with DIR the folder of the binary files, got {spec!r}")
    if kind in _PLANNED:
        raise ArgumentError(f"data: {kind} is not supported yet; needed one of {_SPECS}, got {spec!r}")
    raise ArgumentError(f"data: needed one of {_SPECS}, got {spec!r}")


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pads by 4, crops at random to the original size, and flips with probability 1/2.

    Args:
        images: [N, C, H, W], mean already subtracted, so that the zero padding is the mean.
        generator: Source of the random numbers.

    Returns:
        New images [N, C, H, W].

    Source:
        He et al. 2015, section 4.2.

    Example:
        >>> augment(torch.ones(5, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 32, 32])
    """
    pad = 4
    count, _, height, width = images.shape
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)  # [N, H]
    columns = left + torch.where(flipped, torch.arange(width - 1, -1, -1), torch.arange(width))  # [N, W]
    padded = F.pad(images, (pad, pad, pad, pad))
    # Index arrays on both sides of the channel slice put the channels last: [N, H, W, C].
    crops = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


def _centred(
    name: str,
    spec: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    augmented: bool,
    files: tuple[str, ...] = (),
) -> Dataset:
    mean = train[0].mean(dim=0)  # [C, H, W]
    return Dataset(name, spec, train[0] - mean, train[1], test[0] - mean, test[1], 10, augmented, files)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ArgumentError("data: digits needs scikit-learn: pip install gradprobe[sweep]") from error
    bunch = load_digits()
    train, test = train_test_split(np.arange(len(bunch.target)), test_size=0.25, random_state=0, stratify=bunch.target)
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    return _centred("digits", "digits", (images[train], labels[train]), (images[test], labels[test]), augmented=False)


def _cifar10(folder: Path) -> Dataset:
    if (folder / _CIFAR_FOLDER).is_dir():
        folder = folder / _CIFAR_FOLDER
    present = [name for name in _CIFAR_TRAIN if (folder / name).is_file()]
    missing = [name for name in _CIFAR_TRAIN if name not in present] if not present else []
    if not (folder / _CIFAR_TEST).is_file():
        missing.append(_CIFAR_TEST)
    if missing:
        state = "has no" if folder.is_dir() else "is not a folder; it should have"
        raise ArgumentError(f"data: {folder} {state} {', '.join(missing)}")
    batches = [_cifar10_file(folder / name) for name in present]
    train = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    test = _cifar10_file(folder / _CIFAR_TEST)
    spec = f"cifar10:{folder.resolve()}"
    return _centred("cifar10", spec, train, test, augmented=True, files=(*present, _CIFAR_TEST))


def _cifar10_file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ArgumentError(f"data: {path} cannot be read: {error}") from error
    if raw.size == 0 or raw.size % _CIFAR_RECORD:
        raise ArgumentError(
            f"data: {path} is damaged or truncated: needed a multiple of {_CIFAR_RECORD:,} bytes (1 label and "
            f"{_CIFAR_PIXELS:,} pixels; {10_000 * _CIFAR_RECORD:,} for the full 10,000 images), found {raw.size:,}"
        )
    records = raw.reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        first = int(np.argmax(labels > 9))
        raise ArgumentError(f"data: {path} is damaged: needed labels 0 to 9, found {labels[first]} at image {first}")
    images = torch.tensor(records[:, 1:], dtype=torch.float32).reshape(-1, 3, 32, 32) / 255
    return images, torch.tensor(labels, dtype=torch.int64)
