"""Loads data for the experiments, preprocessed and augmented as in He et al. 2015, section 4.2.

`gradprobe.experiments.readers` has a module for each kind of data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers import cifar, digits, hf, imagefolder, npz
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw, first_of_each, scaled, take

# Each kind of data: what follows its colon, and its reader.
_KINDS: dict[str, tuple[str, Callable[[DataSpec], Raw]]] = {
    "digits": ("", digits.read),
    "cifar10": ("DIR", cifar.read),
    "cifar100": ("DIR", cifar.read),
    "imagefolder": ("DIR", imagefolder.read),
    "hf": ("NAME_OR_PATH", hf.read),
    "npz": ("FILE", npz.read),
}
_PAD = 4  # pixels on each side of an image before it is cropped at random
_SOURCES = ", ".join(f"{kind}:{place}" if place else kind for kind, (place, _) in _KINDS.items())


@dataclass(frozen=True)
class Dataset:
    """Examples and labels in memory, with the training set's mean subtracted from both sets, pixel by pixel.

    Attributes:
        name: Short name, such as ``"digits"`` or ``"npz:f.npz"``.
        spec: Argument of `load` that loads the same data from any working folder.
        train_x: Images [N, C, H, W] or features [N, F], float32.
        train_y: [N] int64.
        test_x: [M, C, H, W] or [M, F], float32.
        test_y: [M] int64.
        num_classes: Number of classes; labels are 0 to num_classes - 1.
        augmented: Whether training images should go through `augment`.
        files: Names of the files read; empty for an embedded set.
    """

    name: str
    spec: DataSpec
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    augmented: bool
    files: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Dataset:
        """Returns the data set on a device; itself if it is there."""
        if self.train_x.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)

    @property
    def in_channels(self) -> int:
        """Number of channels of the images, or of features."""
        return self.train_x.shape[1]

    @property
    def summary(self) -> str:
        """The sizes and files in one line."""
        shape = "x".join(map(str, self.train_x.shape[1:]))
        source = f" from {', '.join(self.files)}" if self.files else ""
        kind = "images of" if self.train_x.ndim == 4 else "rows of"
        return f"{self.name}: {len(self.train_x):,} training and {len(self.test_x):,} test {kind} {shape}{source}"

    @property
    def sha256(self) -> str:
        """Hash of all examples and labels."""
        digest = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def load(spec: DataSpec | str) -> Dataset:
    """Loads a data set.

    Args:
        spec: The data set, or only its `DataSpec.source`:

            - ``"digits"``: scikit-learn's 1,797 handwritten digits of 8x8, embedded, split 75/25 by class.
            - ``"cifar10:DIR"``, ``"cifar100:DIR"``: the binary files; of CIFAR-10 test_batch.bin and any of
              data_batch_1.bin to data_batch_5.bin.
            - ``"imagefolder:DIR"``: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*.
            - ``"hf:NAME_OR_PATH"``: a folder of Hugging Face's ``datasets``, or a name on its hub.
            - ``"npz:FILE"``: NumPy arrays x and y, or x_train, y_train, x_test and y_test.

            Where there is no test set, every fourth example of a class is a test example, except for the digits.

    Returns:
        The data set. Pixels are scaled to 0..1 before the mean is subtracted.

    Raises:
        ArgumentError: The data set is unknown, a library or files are missing, or a file is damaged or truncated.

    Example:
        >>> load("digits").summary
        'digits: 1,347 training and 450 test images of 1x8x8'
        >>> load(DataSpec("digits", image_size=4, per_class=10)).summary
        'digits: 100 training and 100 test images of 1x4x4'
    """
    if isinstance(spec, str):
        spec = DataSpec(spec)
    if spec.kind not in _KINDS:
        raise ArgumentError(f"data: needed one of {_SOURCES}, got {spec.source!r}")
    needed, read = _KINDS[spec.kind]
    if bool(needed) != bool(spec.place):
        form = f"{spec.kind}:{needed}" if needed else spec.kind
        raise ArgumentError(f"data: needed {form}, got {spec.source!r}; the kinds are {_SOURCES}")
    raw = read(spec)
    train, test = (_cut(examples, spec) for examples in (raw.train, raw.test))
    is_images = train.x.ndim == 4
    if spec.augment and not is_images:
        raise ArgumentError(f"augment: needed images, got features of shape {list(train.x.shape)}")
    mean = train.x.mean(dim=0)
    return Dataset(
        name=raw.name,
        spec=replace(spec, source=raw.source),
        train_x=train.x - mean,
        train_y=train.y,
        test_x=test.x - mean,
        test_y=test.y,
        num_classes=raw.num_classes,
        augmented=raw.augmented if spec.augment is None else spec.augment,
        files=raw.files,
    )


def channels_last(inputs: Tensor) -> Tensor:
    """Lays images out with the channels last, on which convolutions are faster; features stay as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def draw_batches(data: Dataset, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draws the batches of an epoch on the CPU, so that every device gets the same ones.

    Args:
        data: The data set; a last, smaller batch is dropped.
        batch_size: Images per batch, B.
        generator: Source of the random numbers.

    Returns:
        For each batch the indices of its images, and if they are augmented, the first row and the first column of each
        crop and whether it is flipped: [steps, 1 or 4, B] int64, on the device of the data.

    Example:
        >>> draw_batches(load("digits"), 64, torch.Generator().manual_seed(0)).shape
        torch.Size([21, 1, 64])
    """
    order = torch.randperm(len(data.train_x), generator=generator)
    steps = len(order) // batch_size
    batches = order[: steps * batch_size].view(steps, 1, batch_size)
    if data.augmented:
        crops = [_draw_crops(batch_size, generator) for _ in range(steps)]
        batches = torch.cat((batches, torch.stack(crops)), dim=1)
    return batches.to(data.train_x.device)


def take_batch(data: Dataset, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers a batch on the device of the data, without waiting for the device.

    Args:
        data: The data set.
        batch: One of `draw_batches`, [1 or 4, B].

    Returns:
        Images [B, C, H, W] with the channels last or features [B, F], and labels [B].
    """
    images = data.train_x[batch[0]]
    if len(batch) > 1:
        images = _crop(images, batch[1:])
    return channels_last(images), data.train_y[batch[0]]


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
    return _crop(images, _draw_crops(len(images), generator).to(images.device)).contiguous()


def _draw_crops(count: int, generator: torch.Generator) -> Tensor:
    """Draws the first row, the first column and whether to flip for each image, [3, N] int64."""
    top = torch.randint(0, 2 * _PAD + 1, (count,), generator=generator)
    left = torch.randint(0, 2 * _PAD + 1, (count,), generator=generator)
    return torch.stack((top, left, (torch.rand(count, generator=generator) < 0.5).long()))


def _crop(images: Tensor, crops: Tensor) -> Tensor:
    """Crops and flips padded images as drawn; returns them with the channels last in memory."""
    count, _, height, width = images.shape
    top, left, flipped = crops[:, :, None]  # [N, 1] each
    device = images.device
    rows = top + torch.arange(height, device=device)  # [N, H]
    columns = torch.arange(width, device=device)
    columns = left + torch.where(flipped > 0, columns.flip(0), columns)  # [N, W]
    padded = F.pad(images, (_PAD, _PAD, _PAD, _PAD))
    # Index arrays on both sides of the channel slice put the channels last: [N, H, W, C].
    nth = torch.arange(count, device=device)[:, None, None]
    return padded[nth, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cut(examples: Examples, spec: DataSpec) -> Examples:
    examples = take(examples, first_of_each(examples.y.tolist(), spec.per_class))
    if spec.image_size is None:
        return examples
    if examples.x.ndim != 4:
        raise ArgumentError(f"image_size: needed images, got features of shape {list(examples.x.shape)}")
    return Examples(scaled(examples.x, spec.image_size), examples.y)
