"""Reads ``cifar10:DIR`` and ``cifar100:DIR``: the binary versions of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """One version: a record is `label_bytes` labels, of which the last one counts, and the pixels of an image."""

    folder: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    num_classes: int
    images: int
    """Images of a whole training file."""

    @property
    def record(self) -> int:
        return self.label_bytes + _PIXELS


_LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        label_bytes=1,
        num_classes=10,
        images=10_000,
    ),
    "cifar100": _Layout(
        folder="cifar-100-binary", train=("train.bin",), test="test.bin", label_bytes=2, num_classes=100, images=50_000
    ),
}


def read(spec: DataSpec) -> Raw:
    """Reads the test file and the training files that are there."""
    layout = _LAYOUTS[spec.kind]
    folder = Path(spec.place).expanduser()
    if (folder / layout.folder).is_dir():
        folder = folder / layout.folder
    present = [name for name in layout.train if (folder / name).is_file()]
    missing = [] if present else list(layout.train)
    if not (folder / layout.test).is_file():
        missing.append(layout.test)
    if missing:
        state = "has no" if folder.is_dir() else "is not a folder; it should have"
        raise ArgumentError(f"data: {folder} {state} {', '.join(missing)}")
    batches = [_read_file(folder / name, layout) for name in present]
    return Raw(
        name=spec.kind,
        source=f"{spec.kind}:{folder.resolve()}",
        train=Examples(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])),
        test=_read_file(folder / layout.test, layout),
        num_classes=layout.num_classes,
        augmented=True,
        files=(*present, layout.test),
    )


def _read_file(path: Path, layout: _Layout) -> Examples:
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ArgumentError(f"data: {path} cannot be read: {error}") from error
    if raw.size == 0 or raw.size % layout.record:
        labels = "1 label" if layout.label_bytes == 1 else f"{layout.label_bytes} labels"
        raise ArgumentError(
            f"data: {path} is damaged or truncated: needed a multiple of {layout.record:,} bytes ({labels} and "
            f"{_PIXELS:,} pixels; {layout.images * layout.record:,} for the full {layout.images:,} images), found "
            f"{raw.size:,}"
        )
    records = raw.reshape(-1, layout.record)
    labels_read = records[:, layout.label_bytes - 1]
    largest = layout.num_classes - 1
    if labels_read.max() > largest:
        first = int(np.argmax(labels_read > largest))
        raise ArgumentError(
            f"data: {path} is damaged: needed labels 0 to {largest}, found {labels_read[first]} at image {first}"
        )
    images = torch.tensor(records[:, layout.label_bytes :], dtype=torch.float32).reshape(-1, 3, 32, 32) / 255
    return Examples(images, torch.tensor(labels_read, dtype=torch.int64))
