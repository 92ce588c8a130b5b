"""What a reader is asked for and returns, and the rules that all readers share: labels, test images, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprobe.errors import ArgumentError

TEST_EVERY = 4
"""Where a data set has no test set, every fourth example of a class is a test example."""


@dataclass(frozen=True)
class DataSpec:
    """A data set, and how much of it is used.

    Attributes:
        source: ``"digits"``, or a kind and a place as in ``"cifar10:DIR"``; see `gradprobe.experiments.data.load`.
        image_size: Height and width to which images are scaled; None keeps them as they are.
        per_class: Largest number of training images of each class, and of test images; None takes all.
        augment: Whether training images are cropped and flipped at random; None: only CIFAR's.
    """

    source: str
    image_size: int | None = None
    per_class: int | None = None
    augment: bool | None = None

    def __post_init__(self) -> None:
        for name, value in (("image_size", self.image_size), ("per_class", self.per_class)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}: needed a whole number of at least 1, got {value!r}")

    @property
    def kind(self) -> str:
        """The part before the colon, which chooses the reader."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """The part after the colon; empty without one."""
        return self.source.partition(":")[2]


class Examples(NamedTuple):
    """Inputs [N, C, H, W] or [N, F] float32, and labels [N] int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Raw:
    """A data set as its reader found it: not centred, and pixels from 0 to 1.

    Attributes:
        name: Short name, without folders; two data sets of a name are told apart by their hash.
        source: Value of `DataSpec.source` that reads the same data from any working folder.
        train: Training set.
        test: Test set.
        num_classes: Number of classes.
        augmented: Whether `gradprobe.experiments.data.augment` suits the images.
        files: Names of the files read; empty for an embedded set.
    """

    name: str
    source: str
    train: Examples
    test: Examples
    num_classes: int
    augmented: bool = False
    files: tuple[str, ...] = ()


def existing(place: str, spec: DataSpec, *, folder: bool) -> Path:
    """Returns the absolute path of a data set's file or folder.

    Raises:
        ArgumentError: There is none.
    """
    path = Path(place).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        found = "a file" if path.is_file() else "a folder" if path.is_dir() else "nothing"
        raise ArgumentError(f"data: {spec.kind} needs a {'folder' if folder else 'file'}, found {found} at {path}")
    return path.resolve()


def split_by_class(labels: Sequence[int], source: str) -> tuple[list[int], list[int]]:
    """Divides a data set without a test set: every `TEST_EVERY`-th example of a class is a test example.

    Args:
        labels: Label of each example.
        source: The data set, for the message.

    Returns:
        Positions of the training examples and of the test examples.

    Raises:
        ArgumentError: No class has enough examples.

    Example:
        >>> split_by_class([0, 0, 0, 0, 1, 1], "npz:f.npz")
        ([0, 1, 2, 4, 5], [3])
    """
    seen: Counter[int] = Counter()
    train: list[int] = []
    test: list[int] = []
    for position, label in enumerate(labels):
        seen[label] += 1
        (train if seen[label] % TEST_EVERY else test).append(position)
    if not test:
        most = max(seen.values(), default=0)
        raise ArgumentError(
            f"data: {source} has no test set, and every fourth example of a class would be one: needed at least "
            f"{TEST_EVERY} examples of a class, got {most}"
        )
    return train, test


def first_of_each(labels: Sequence[int], per_class: int | None) -> list[int]:
    """Returns the positions of the first examples of each class, in order; all without a limit.

    Example:
        >>> first_of_each([0, 1, 0, 0, 1], 2)
        [0, 1, 2, 4]
    """
    if per_class is None:
        return list(range(len(labels)))
    seen: Counter[int] = Counter()
    chosen = []
    for position, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= per_class:
            chosen.append(position)
    return chosen


def scaled(images: Tensor, size: int) -> Tensor:
    """Scales images so that the shorter side has ``size`` pixels, and crops the middle of the longer one.

    Args:
        images: [N, C, H, W] float32.
        size: New height and width.

    Returns:
        [N, C, size, size], smoothed where images shrink.

    Example:
        >>> scaled(torch.rand(2, 3, 30, 20), 10).shape
        torch.Size([2, 3, 10, 10])
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    shorter = min(height, width)
    shape = [max(size, round(side * size / shorter)) for side in (height, width)]
    images = F.interpolate(images, shape, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in shape)
    return images[:, :, top : top + size, left : left + size].contiguous()


def take(examples: Examples, positions: Sequence[int]) -> Examples:
    """Returns the examples at the positions given."""
    if len(positions) == len(examples.y):
        return examples
    index = torch.tensor(positions, dtype=torch.int64)
    return Examples(examples.x[index], examples.y[index])
