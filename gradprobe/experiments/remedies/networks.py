"""The nets that `remedies` compares: linear or convolutional layers of one width, with some remedies built in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gradprobe.errors import ArgumentError
from gradprobe.networks import Init, initialise
from gradprobe.nn.residual import ResidualAdd

LAYERS = ("linear", "conv")
WIDTH = 64
CHANNELS = 32
# Of group normalisation. A group has to have many features: of two, normalisation leaves nothing but the signs.
GROUPS = 4
INITS: tuple[Init, ...] = ("xavier", "he")
NORMS = ("batchnorm", "layernorm", "groupnorm")
PARTS = ("none", "clipping", *INITS, *NORMS, "residual")

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
# Variance of a weight times its fan-in. PyTorch's own start is uniform within 1 / sqrt(fan-in), biases too.
_GAINS = {"he": 2.0, "xavier": 1.0, "default": 1 / 3}


@dataclass(frozen=True, slots=True)
class Remedy:
    """A remedy, taken apart.

    Attributes:
        init: ``"he"``, ``"xavier"`` or ``"default"``, PyTorch's own.
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
        residual: whether hidden layers have shortcuts.
        clipped: whether the gradient is clipped.
    """

    init: Init
    norm: str
    residual: bool
    clipped: bool

    @property
    def weight_gain(self) -> float:
        """Variance of a weight at the start, times its fan-in."""
        return _GAINS[self.init]

    @property
    def bias_variance(self) -> float:
        """Variance of a bias of a hidden layer at the start."""
        return _GAINS["default"] / WIDTH if self.init == "default" else 0.0


def parse_remedy(text: str) -> Remedy:
    """Reads a remedy.

    Args:
        text: parts of `PARTS` with + between: one init and one normalisation at most, and no part twice.

    Returns:
        The remedy.

    Raises:
        ArgumentError: the text is no such thing; the message lists what there is.

    Example:
        >>> parse_remedy("he+residual")
        Remedy(init='he', norm='none', residual=True, clipped=False)
    """
    parts = text.split("+")
    inits, norms = [init for init in INITS if init in parts], [part for part in parts if part in NORMS]
    clash = len(set(parts)) < len(parts) or len(inits) > 1 or len(norms) > 1 or ("none" in parts and len(parts) > 1)
    if clash or any(part not in PARTS for part in parts):
        raise ArgumentError(
            f"remedies: needed some of {', '.join(PARTS)}, or several with + between, with one of {', '.join(INITS)} "
            f"and one of {', '.join(NORMS)} at most; got {text!r}"
        )
    init: Init = inits[0] if inits else "default"
    norm = norms[0].removesuffix("norm") if norms else "none"
    return Remedy(init, norm, "residual" in parts, "clipping" in parts)


def network(
    remedy: str, activation: str, depth: int, shape: Sequence[int], num_classes: int, layers: str = "linear"
) -> nn.Module:
    """Builds the net of a cell: layers of one width, normalised or not, each hidden one with its activation.

    A plain hidden layer is f(norm(Wx + b)). A residual one, from the second on, is x + W f(norm(x)) + b, with nothing
    on the shortcut. Convolutions are 3x3 with zero padding, the first with stride 2, the others on its map; a global
    average pool and a linear layer follow.

    Args:
        remedy: parts of `PARTS` with + between.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        depth: weight layers, at least 2.
        shape: of one example, without the batch; channels, height and width for convolutions.
        num_classes: outputs.
        layers: ``"linear"`` or ``"conv"``.

    Returns:
        A module that maps [N, *shape] to logits [N, num_classes]. Its weights come from torch's global random stream.

    Raises:
        ArgumentError: an option is not one of those above; the message lists what there is.

    Source:
        He et al. 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027, for the order in residual nets.
        Ioffe and Szegedy 2015, arXiv 1502.03167; Ba et al. 2016, arXiv 1607.06450; Wu and He 2018, arXiv 1803.08494,
        for the normalisations; over a map, the layer is all channels and places of an example, a group some channels.

    Example:
        >>> import torch
        >>> network("he+residual", "relu", 5, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    chosen = parse_remedy(remedy)
    for name, value, there_is in (("activation", activation, tuple(_ACTIVATIONS)), ("layers", layers, LAYERS)):
        if value not in there_is:
            raise ArgumentError(f"{name}: needed one of {', '.join(there_is)}, got {value!r}")
    if depth < 2:
        raise ArgumentError(f"depth: needed a whole number of at least 2, got {depth}")
    is_conv = layers == "conv"
    width = CHANNELS if is_conv else WIDTH
    modules: list[nn.Module] = [] if is_conv else [nn.Flatten()]
    for k in range(depth - 1):
        if is_conv:
            # Half the map makes the other layers four times as fast.
            weighted: nn.Module = nn.Conv2d(width if k else shape[0], width, 3, stride=1 if k else 2, padding=1)
        else:
            weighted = nn.Linear(width if k else math.prod(shape), width)
        norm = _normalisation(chosen.norm, is_conv, width)
        modules.append(_Layer(weighted, norm, _ACTIVATIONS[activation](), chosen.residual and k > 0))
    if is_conv:
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*modules, nn.Linear(width, num_classes))
    if chosen.init != "default":
        initialise(model, chosen.init)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    return model


class _Layer(nn.Module):
    def __init__(self, weighted: nn.Module, norm: nn.Module, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.weighted = weighted
        self.norm = norm
        self.activation = activation
        self.join = ResidualAdd() if residual else None

    def forward(self, x: Tensor) -> Tensor:
        if self.join is not None:
            joined: Tensor = self.join(x, self.weighted(self.activation(self.norm(x))))
            return joined
        plain: Tensor = self.activation(self.norm(self.weighted(x)))
        return plain


def _normalisation(norm: str, is_conv: bool, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width) if is_conv else nn.BatchNorm1d(width)
    if norm in ("layer", "group"):
        return nn.GroupNorm(1 if norm == "layer" else GROUPS, width)
    return nn.Identity()
