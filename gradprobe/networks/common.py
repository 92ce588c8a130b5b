"""What the networks share: initialisation, counting, and the checks of their arguments."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gradprobe.errors import ArgumentError

Init = Literal["he", "xavier", "orthogonal", "default"]

INITS = ("he", "xavier", "orthogonal", "default")


def count_parameters(model: nn.Module) -> int:
    """Counts the trainable elements of a model, tied parameters once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def initialise(model: nn.Module, init: Init) -> None:
    """Reinitialises the weights of all convolutions and linear layers from torch's global random generator.

    Args:
        model: Any module, a single layer included; changed in place.
        init: ``"he"`` (normal, fan-in), ``"xavier"`` (uniform), ``"orthogonal"`` (W'W = 2; of a convolution, the middle
            of its kernel, and zero around it: delta-orthogonal), or ``"default"``, which keeps PyTorch's weights.

    Source:
        He et al. 2015, arXiv 1502.01852; Glorot and Bengio 2010 (AISTATS), equation 16; Saxe et al. 2014, arXiv
        1312.6120; Xiao et al. 2018, arXiv 1806.05393, algorithm 1. The gain of 2 is that of He's, for ReLUs.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> initialise(layer, "xavier")
        >>> bool(layer.weight.abs().max() <= 1)
        True
    """
    if init == "default":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if init == "he":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif init == "orthogonal":
                _orthogonal(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)


@torch.no_grad()
def _orthogonal(weight: Tensor) -> None:
    middle = weight
    if weight.ndim == 4:
        weight.zero_()
        middle = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
    middle.copy_(nn.init.orthogonal_(torch.empty(middle.shape), gain=math.sqrt(2)))


def is_whole(value: object) -> bool:
    """Returns whether a value is a whole number; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(**sizes: int) -> None:
    """Checks that sizes are whole numbers of at least 1."""
    for name, value in sizes.items():
        if not is_whole(value) or value < 1:
            raise ArgumentError(f"{name}: needed a whole number of at least 1, got {value!r}")


def joined(names: tuple[object, ...]) -> str:
    """Joins names by commas."""
    return ", ".join(map(str, names))
