"""Reads ``npz:FILE``: arrays that ``numpy.savez`` wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.raw import DataSpec, Examples, Raw, existing, split_by_class, take

_SPLIT = ("x_train", "y_train", "x_test", "y_test")
_NEEDED = f"x and y, or {', '.join(_SPLIT[:-1])} and {_SPLIT[-1]}"
_CHANNELS = (1, 3, 4)

_Array = npt.NDArray[Any]


def read(spec: DataSpec) -> Raw:
    """Reads the arrays x and y, or a training and a test set.

    x holds images [N, C, H, W], [N, H, W, C] (C: 1, 3 or 4) or [N, H, W], or features [N, F]; uint8 is scaled to 0..1,
    floating point numbers are taken as they are. y holds a whole number from 0 for each.
    """
    path = existing(spec.place, spec, folder=False)
    arrays: dict[str, _Array] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(file.files)
            wanted = _SPLIT if set(_SPLIT) <= set(names) else ("x", "y")
            if not set(wanted) <= set(names):
                found = ", ".join(names) or "none"
                raise ArgumentError(f"data: {path}: needed the arrays {_NEEDED}, found {found}")
            for name in wanted:
                arrays[name] = file[name]
    except ArgumentError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise errors of many kinds
        raise ArgumentError(f"data: {path} is damaged or no .npz file: {type(error).__name__}: {error}") from error
    source = f"npz:{path}"
    if "x" in arrays:
        whole = _examples(arrays, "x", "y", source)
        _check_gaps({"y": whole}, source)
        inside, outside = split_by_class(whole.y.tolist(), source)
        train, test = take(whole, inside), take(whole, outside)
    else:
        train, test = (_examples(arrays, f"x_{part}", f"y_{part}", source) for part in ("train", "test"))
        if train.x.shape[1:] != test.x.shape[1:]:
            shapes = [tuple(part.x.shape[1:]) for part in (train, test)]
            raise ArgumentError(f"data: {source}: needed x_test of the shape of x_train, {shapes[0]}, got {shapes[1]}")
        _check_gaps({"y_train": train, "y_test": test}, source)
    num_classes = 1 + int(max(train.y.max(), test.y.max()))
    return Raw(f"npz:{path.name}", source, train, test, num_classes, files=(path.name,))


def _examples(arrays: dict[str, _Array], x_name: str, y_name: str, source: str) -> Examples:
    x, y = arrays[x_name], arrays[y_name]
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ArgumentError(
            f"data: {source}: needed {x_name} of shape [N, C, H, W], [N, H, W, C], [N, H, W] or [N, F], got "
            f"{list(x.shape)}"
        )
    if y.shape != x.shape[:1]:
        raise ArgumentError(
            f"data: {source}: needed {y_name} of shape [{len(x)}], one label for each of {x_name}, got {list(y.shape)}"
        )
    if y.dtype.kind not in "iu":
        raise ArgumentError(f"data: {source}: needed whole numbers from 0 in {y_name}, got {y.dtype}")
    if y.min() < 0:
        raise _wrong_label(y_name, int(y.min()), source)
    return Examples(_inputs(x, x_name, source), torch.from_numpy(y.astype(np.int64)))


def _check_gaps(parts: dict[str, Examples], source: str) -> None:
    """Checks that there are no more classes than examples; a small test set may lack many of them."""
    limit = max(sum(len(part.y) for part in parts.values()), 2)
    for name, part in parts.items():
        if part.y.max() >= limit:
            raise _wrong_label(name, int(part.y.max()), source)


def _wrong_label(name: str, label: int, source: str) -> ArgumentError:
    return ArgumentError(f"data: {source}: needed labels from 0 without large gaps in {name}, got {label}")


def _inputs(x: _Array, name: str, source: str) -> Tensor:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ArgumentError(f"data: {source}: needed uint8 or floating point numbers in {name}, got {x.dtype}")
    inputs = torch.from_numpy(x.astype(np.float32)) / (255 if x.dtype == np.uint8 else 1)
    if not torch.isfinite(inputs).all():
        first = int((~torch.isfinite(inputs.flatten(1)).all(dim=1)).nonzero()[0])
        raise ArgumentError(f"data: {source}: needed finite numbers in {name}, got NaN or infinity at example {first}")
    if inputs.ndim == 3:
        return inputs[:, None]
    if inputs.ndim == 4 and inputs.shape[1] not in _CHANNELS:
        if inputs.shape[3] not in _CHANNELS:
            raise ArgumentError(
                f"data: {source}: needed 1, 3 or 4 channels in {name}, [N, C, H, W] or [N, H, W, C], got "
                f"{list(inputs.shape)}"
            )
        inputs = inputs.permute(0, 3, 1, 2)
    return inputs.contiguous()
