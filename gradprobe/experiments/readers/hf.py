"""Reads ``hf:NAME_OR_PATH`` with Hugging Face's ``datasets``: a folder on this machine, or a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.pictures import decode, require_pillow
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw, first_of_each, split_by_class

_TEST_SPLITS = ("test", "validation", "valid", "val")


def read(spec: DataSpec) -> Raw:
    """Reads the first column of pictures, the first of class labels, and the splits train and test (or validation).

    Without a test split, every fourth picture of a class is a test picture. A folder is read without the network: one
    that ``save_to_disk`` wrote, or one with files for ``load_dataset``.
    """
    path = Path(spec.place).expanduser()
    folder = path.resolve() if path.is_dir() else None
    splits = _load(spec, folder)
    if "train" not in splits:
        raise ArgumentError(f"data: needed a split train in {spec.source}, found {', '.join(splits)}")
    train = splits["train"]
    picture, label = _columns(train, spec)
    test = next((splits[name] for name in _TEST_SPLITS if name in splits), None)
    if test is None:
        inside, outside = split_by_class(train[label][:], spec.source)
        train, test = train.select(inside), train.select(outside)
    train, test = (part.select(first_of_each(part[label][:], spec.per_class)) for part in (train, test))
    named = getattr(train.features[label], "names", None)
    count = len(train)
    images = decode(
        count + len(test),
        lambda position: (train[position] if position < count else test[position - count])[picture],
        lambda position: f"{spec.source}, {f'train {position}' if position < count else f'test {position - count}'}",
        spec,
    )
    labels = torch.tensor([*train[label][:], *test[label][:]], dtype=torch.int64)
    if labels.min() < 0:
        raise ArgumentError(f"data: needed a label of every picture in {spec.source}, got {int(labels.min())}")
    return Raw(
        name=f"hf:{folder.name if folder else spec.place}",
        source=f"hf:{folder}" if folder else spec.source,
        train=Examples(images[:count], labels[:count]),
        test=Examples(images[count:], labels[count:]),
        num_classes=len(named) if named else 1 + int(labels.max()),
    )


def _load(spec: DataSpec, folder: Path | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ArgumentError("data: hf needs datasets: pip install 'gradprobe[hf]'") from error
    require_pillow("hf", "hf")
    try:
        if folder is not None and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder else spec.place)
    except Exception as error:  # errors of the network, of formats and of the hub
        raise ArgumentError(f"data: {spec.source} cannot be loaded: {type(error).__name__}: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _columns(split: Any, spec: DataSpec) -> tuple[str, str]:
    """Finds the columns of pictures and of labels."""
    kinds = {name: type(feature).__name__ for name, feature in split.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if not labels:
        dtypes = {name: str(getattr(feature, "dtype", "")) for name, feature in split.features.items()}
        labels = [name for name, dtype in dtypes.items() if "label" in name.lower() and dtype.startswith("int")]
    if not pictures or not labels:
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ArgumentError(f"data: needed columns of pictures (Image) and of labels in {spec.source}, found {found}")
    return pictures[0], labels[0]
