"""Decodes picture files with Pillow, for the readers of folders and of Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.experiments.readers.raw import DataSpec, scaled

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY = ("1", "L")


def decode(count: int, image_at: Callable[[int], Image], name_of: Callable[[int], str], spec: DataSpec) -> Tensor:
    """Decodes pictures into one tensor: a single channel if all are grey, else red, green and blue.

    Args:
        count: Number of pictures.
        image_at: Opens a picture by its position.
        name_of: Names a picture by its position, for messages.
        spec: The data set; its `image_size` is required if the pictures differ in size.

    Returns:
        [N, C, H, W] float32 from 0 to 1.

    Raises:
        ArgumentError: A picture is damaged or not of 8 bits, or the sizes differ.
    """
    from PIL import ImageOps

    decoded: list[Tensor] = []
    for position in range(count):
        try:
            image = image_at(position)
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise ArgumentError(f"data: {name_of(position)}: needed 8 bits per channel, got mode {mode}")
            upright = ImageOps.exif_transpose(image).convert("L" if mode in _GREY else "RGB")
            pixels = torch.from_numpy(np.array(upright, dtype=np.uint8))
        except ArgumentError:
            raise
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise ArgumentError(
                f"data: {name_of(position)} is damaged: needed a picture, got {type(error).__name__}: {error}"
            ) from error
        planes = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if spec.image_size is not None:
            planes = (scaled(planes[None] / 255, spec.image_size)[0] * 255).round().to(torch.uint8)
        if decoded and planes.shape[1:] != decoded[0].shape[1:]:
            sizes = ["x".join(map(str, one.shape[1:])) for one in (decoded[0], planes)]
            raise ArgumentError(
                f"image_size: needed a size, since the pictures differ: {name_of(0)} has {sizes[0]} pixels, "
                f"{name_of(position)} has {sizes[1]}"
            )
        decoded.append(planes)
    return _stacked(decoded)


def _stacked(decoded: Sequence[Tensor]) -> Tensor:
    channels = max(len(planes) for planes in decoded)
    return torch.stack([planes.expand(channels, -1, -1) for planes in decoded]).float() / 255


def require_pillow(kind: str, extra: str) -> None:
    """Raises an `ArgumentError` with the pip command if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"data: {kind} needs Pillow: pip install 'gradprobe[{extra}]'") from error
