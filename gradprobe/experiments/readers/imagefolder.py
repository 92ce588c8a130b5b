"""Reads ``imagefolder:DIR``: pictures in one folder per class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.pictures import decode, require_pillow
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw, existing, first_of_each, split_by_class

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: int


def read(spec: DataSpec) -> Raw:
    """Reads DIR/train/CLASS/* and DIR/test/CLASS/* (also val, valid, validation), or DIR/CLASS/*; labels follow names.

    Without a test folder, every fourth picture of a class, by name, is a test picture.
    """
    require_pillow("imagefolder", "images")
    folder = existing(spec.place, spec, folder=True)
    tests = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
    if (folder / "train").is_dir():
        if not tests:
            raise ArgumentError(f"data: needed beside {folder / 'train'} one of {', '.join(_TEST_FOLDERS)}, found none")
        classes = _classes(folder / "train")
        train, test = _pictures(folder / "train", classes, all_needed=True), _pictures(tests[0], classes)
    else:
        classes = _classes(folder)
        pictures = _pictures(folder, classes, all_needed=True)
        inside, outside = split_by_class([one.label for one in pictures], f"imagefolder:{folder}")
        train, test = [pictures[i] for i in inside], [pictures[i] for i in outside]
    # Before pictures are decoded, which takes long.
    train, test = (_first_of_each(part, spec.per_class) for part in (train, test))
    images = _decode([*train, *test], spec)
    labels = torch.tensor([one.label for one in (*train, *test)], dtype=torch.int64)
    count = len(train)
    return Raw(
        name=f"imagefolder:{folder.name}",
        source=f"imagefolder:{folder}",
        train=Examples(images[:count], labels[:count]),
        test=Examples(images[count:], labels[count:]),
        num_classes=len(classes),
    )


def _classes(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(found) < 2:
        raise ArgumentError(f"data: needed a folder per class in {folder}, at least 2, found {len(found)}")
    return found


def _pictures(folder: Path, classes: list[str], *, all_needed: bool = False) -> list[_Picture]:
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    unknown = sorted(folders - {*classes})
    if unknown:
        raise ArgumentError(f"data: needed in {folder} only classes of the training set, found {unknown[0]}")
    pictures: list[_Picture] = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if all_needed and not files:
            raise _no_pictures(folder / name)
        pictures += [_Picture(path, label) for path in files]
    if not pictures:
        raise _no_pictures(folder)
    return pictures


def _no_pictures(folder: Path) -> ArgumentError:
    return ArgumentError(f"data: needed pictures ({', '.join(sorted(_SUFFIXES))}) in {folder}, found none")


def _first_of_each(pictures: list[_Picture], per_class: int | None) -> list[_Picture]:
    return [pictures[i] for i in first_of_each([one.label for one in pictures], per_class)]


def _decode(pictures: list[_Picture], spec: DataSpec) -> torch.Tensor:
    from PIL import Image

    return decode(
        len(pictures),
        lambda position: Image.open(pictures[position].path),
        lambda position: str(pictures[position].path),
        spec,
    )
