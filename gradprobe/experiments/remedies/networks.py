"""Networks that `remedies` compares: linear or convolutional layers of one width, with remedies built in."""

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
# Groups of group normalisation. A group needs many features: normalising two leaves only their signs.
GROUPS = 4
INITS: tuple[Init, ...] = ("xavier", "he")
NORMS = ("batchnorm", "layernorm", "groupnorm")
PARTS = ("none", "clipping", *INITS, *NORMS, "residual")

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
# Variance of a weight times its fan-in. PyTorch's default is uniform within 1 / sqrt(fan-in), also for biases.
_GAINS = {"he": 2.0, "xavier": 1.0, "default": 1 / 3}


@dataclass(frozen=True, slots=True)
class Remedy:
    """The parts of a remedy.

    Attributes:
        init: ``"he"``, ``"xavier"`` or ``"default"`` (PyTorch's own).
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
        residual: Whether hidden layers have shortcuts.
        clipped: Whether the gradient is clipped.
    """

    init: Init
    norm: str
    residual: bool
    clipped: bool

    @property
    def weight_gain(self) -> float:
        """Initial variance of a weight times its fan-in."""
        return _GAINS[self.init]

    @property
    def bias_variance(self) -> float:
        """Initial variance of a bias of a hidden layer."""
        return _GAINS["default"] / WIDTH if self.init == "default" else 0.0


def parse_remedy(text: str) -> Remedy:
    """Parses a remedy.

    Args:
        text: Parts of `PARTS` joined by +, each at most once, with at most one init and one normalisation.

    Returns:
        The remedy.

    Raises:
        ArgumentError: The text is not such a combination; the message lists the parts.

    Example:
        >>> parse_remedy("he+residual")
        Remedy(init='he', norm='none', residual=True, clipped=False)
    """
    parts = text.split("+")
    inits, norms = [init for init in INITS if init in parts], [part for part in parts if part in NORMS]
    clash = len(set(parts)) < len(parts) or len(inits) > 1 or len(norms) > 1 or ("none" in parts and len(parts) > 1)
    if clash or any(part not in PARTS for part in parts):
        raise ArgumentError(
            f"remedies: needed one or more of {', '.join(PARTS)}, several joined by +, with at most one of "
            f"{', '.join(INITS)} and one of {', '.join(NORMS)}, got {text!r}"
        )
    init: Init = inits[0] if inits else "default"
    norm = norms[0].removesuffix("norm") if norms else "none"
    return Remedy(init, norm, "residual" in parts, "clipping" in parts)


def network(
    remedy: str, activation: str, depth: int, shape: Sequence[int], num_classes: int, layers: str = "linear"
) -> nn.Module:
    """Builds a network of layers of one width, each hidden one with an activation and perhaps a normalisation.

    A plain hidden layer is f(norm(Wx + b)). A residual one, from the second on, is x + W f(norm(x)) + b, with an
    identity shortcut. Convolutions are 3x3 with zero padding, the first with stride 2; a global average pool and a
    linear layer follow.

    Args:
        remedy: Parts of `PARTS` joined by +.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        depth: Number of weight layers, at least 2.
        shape: Shape of one example, without the batch; (C, H, W) for convolutions.
        num_classes: Number of outputs.
        layers: ``"linear"`` or ``"conv"``.

    Returns:
        A module that maps [N, *shape] to logits [N, num_classes], with weights from torch's global random stream.

    Raises:
        ArgumentError: An argument is not one of the values above; the message lists them.

    Source:
        He et al. 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027, for the order in residual layers.
        Ioffe and Szegedy 2015, arXiv 1502.03167; Ba et al. 2016, arXiv 1607.06450; Wu and He 2018, arXiv 1803.08494,
        for the normalisations; on feature maps, layer normalisation is over all channels and pixels of an example.

    Example:
        >>> import torch
        >>> network("he+residual", "relu", 5, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    chosen = parse_remedy(remedy)
    for name, value, supported in (("activation", activation, tuple(_ACTIVATIONS)), ("layers", layers, LAYERS)):
        if value not in supported:
            raise ArgumentError(f"{name}: needed one of {', '.join(supported)}, got {value!r}")
    if depth < 2:
        raise ArgumentError(f"depth: needed a whole number of at least 2, got {depth}")
    is_conv = layers == "conv"
    width = CHANNELS if is_conv else WIDTH
    modules: list[nn.Module] = [] if is_conv else [nn.Flatten()]
    for k in range(depth - 1):
        if is_conv:
            # Halving the map makes the other layers four times as fast.
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
