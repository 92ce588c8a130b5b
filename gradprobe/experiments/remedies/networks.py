"""Networks that `remedies` compares: linear or convolutional layers of one width, with remedies built in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradprobe.errors import ArgumentError, not_among
from gradprobe.networks import Init, initialise
from gradprobe.networks.without_norm import ScalarBias, layerscale_start
from gradprobe.nn.residual import ResidualAdd

LAYERS = ("linear", "conv")
WIDTH = 64
CHANNELS = 32
# Groups of group normalisation. A group needs many features: normalising two leaves only their signs.
GROUPS = 4
INITS: tuple[Init, ...] = ("xavier", "he", "orthogonal")
NORMS = ("batchnorm", "layernorm", "groupnorm")
SHORTCUTS = ("residual", "fixup", "skipinit", "rezero", "layerscale")
PARTS = ("none", "clipping", *INITS, *NORMS, *SHORTCUTS)

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
# Variance of a weight times its fan-in; of orthogonal ones, in a square matrix. PyTorch's default is uniform within
# 1 / sqrt(fan-in), also for biases.
_GAINS = {"he": 2.0, "xavier": 1.0, "orthogonal": 2.0, "default": 1 / 3}


@dataclass(frozen=True, slots=True)
class Remedy:
    """The parts of a remedy.

    Attributes:
        init: ``"he"``, ``"xavier"``, ``"orthogonal"`` or ``"default"`` (PyTorch's own).
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
        shortcut: One of `SHORTCUTS`, or ``"none"``.
        clipped: Whether the gradient is clipped.
    """

    init: Init
    norm: str
    shortcut: str
    clipped: bool

    @property
    def weight_gain(self) -> float:
        """Initial variance of a weight times its fan-in."""
        return _GAINS[self.init]

    @property
    def bias_variance(self) -> float:
        """Initial variance of a bias of a hidden layer."""
        return _GAINS["default"] / WIDTH if self.init == "default" else 0.0

    def branch_factor(self, depth: int) -> float:
        """Returns what the weights of a residual layer are multiplied by at first; a network of this depth has them."""
        return {"residual": 1.0, "layerscale": layerscale_start(depth - 2)}.get(self.shortcut, 0.0)


def parse_remedy(text: str) -> Remedy:
    """Parses a remedy.

    Args:
        text: Parts of `PARTS` joined by +, each at most once, with at most one init, normalisation and shortcut.

    Returns:
        The remedy.

    Raises:
        ArgumentError: The text is not such a combination; the message lists the parts.

    Example:
        >>> parse_remedy("he+residual")
        Remedy(init='he', norm='none', shortcut='residual', clipped=False)
    """
    parts = text.split("+")
    inits, norms = [init for init in INITS if init in parts], [part for part in parts if part in NORMS]
    shortcuts = [part for part in parts if part in SHORTCUTS]
    repeated = len(set(parts)) < len(parts) or any(len(kind) > 1 for kind in (inits, norms, shortcuts))
    if repeated or ("none" in parts and len(parts) > 1) or any(part not in PARTS for part in parts):
        raise ArgumentError(
            f"remedies: needed one or more of {', '.join(PARTS)}, several joined by +, with at most one of "
            f"{', '.join(INITS)}, one of {', '.join(NORMS)} and one of {', '.join(SHORTCUTS)}, got {text!r}"
        )
    init: Init = inits[0] if inits else "default"
    norm = norms[0].removesuffix("norm") if norms else "none"
    return Remedy(init, norm, shortcuts[0] if shortcuts else "none", "clipping" in parts)


def network(
    remedy: str, activation: str, depth: int, shape: Sequence[int], num_classes: int, layers: str = "linear"
) -> nn.Module:
    """Builds a network of layers of one width, each hidden one with an activation and perhaps a normalisation.

    A plain hidden layer is f(norm(Wx + b)). A layer with a shortcut, from the second on, is

        residual    x + W f(norm(x)) + b
        fixup       x + a (W (f(norm(x) + b1) + b2) + b), where a = 1, and W and the classifier start at zero
        skipinit    x + a (W f(norm(x)) + b), where the scalar a starts at 0
        rezero      x + a f(norm(Wx + b)), where the scalar a starts at 0
        layerscale  x + s (W f(norm(x)) + b), where s, one number per feature, starts at `layerscale_start`

    Fixup scales only what is before a branch's last layer, which here is its only one. Convolutions are 3x3 with zero
    padding, the first with stride 2; a global average pool and a linear layer follow.

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
        Zhang et al. 2019, arXiv 1901.09321 (Fixup); De and Smith 2020, arXiv 2002.10444 (SkipInit); Bachlechner et al.
        2020, arXiv 2003.04887 (ReZero); Touvron et al. 2021, arXiv 2103.17239 (LayerScale).

    Example:
        >>> import torch
        >>> network("he+residual", "relu", 5, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    chosen = parse_remedy(remedy)
    for name, value, supported in (("activation", activation, tuple(_ACTIVATIONS)), ("layers", layers, LAYERS)):
        if value not in supported:
            raise not_among(name, value, supported)
    if depth < 2:
        raise ArgumentError(f"depth: needed a whole number of at least 2, got {depth}")
    is_conv = layers == "conv"
    width = CHANNELS if is_conv else WIDTH
    modules: list[nn.Module] = [] if is_conv else [nn.Flatten()]
    for k in range(depth - 1):
        if is_conv:
            # Halving the map makes the other layers four times as fast.
            weighted: nn.Conv2d | nn.Linear = nn.Conv2d(
                width if k else shape[0], width, 3, stride=1 if k else 2, padding=1
            )
        else:
            weighted = nn.Linear(width if k else math.prod(shape), width)
        norm = _normalisation(chosen.norm, is_conv, width)
        is_residual = k > 0 and chosen.shortcut != "none"
        layer = (weighted, norm, _ACTIVATIONS[activation]())
        modules.append(_ResidualLayer(*layer, chosen, depth) if is_residual else _Layer(*layer))
    if is_conv:
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*modules, nn.Linear(width, num_classes))
    if chosen.init != "default":
        initialise(model, chosen.init)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    if chosen.shortcut == "fixup":
        branches = [module.weighted for module in model if isinstance(module, _ResidualLayer)]
        for module in (*branches, model[-1]):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return model


class _Layer(nn.Module):
    def __init__(self, weighted: nn.Module, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.weighted = weighted
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.norm(self.weighted(x)))
        return y


class _ResidualLayer(_Layer):
    def __init__(
        self, weighted: nn.Conv2d | nn.Linear, norm: nn.Module, activation: nn.Module, remedy: Remedy, depth: int
    ) -> None:
        super().__init__(weighted, norm, activation)
        self.join = ResidualAdd()
        self.weight_first = remedy.shortcut == "rezero"
        self.factor: nn.Parameter | None = None
        if remedy.shortcut == "fixup":
            self.activation = nn.Sequential(ScalarBias(), activation, ScalarBias())
            self.factor = nn.Parameter(torch.ones(1))
        elif remedy.shortcut != "residual":
            count = weighted.weight.shape[0] if remedy.shortcut == "layerscale" else 1
            self.factor = nn.Parameter(torch.full((count,), remedy.branch_factor(depth)))

    def forward(self, x: Tensor) -> Tensor:
        f = super().forward(x) if self.weight_first else self.weighted(self.activation(self.norm(x)))
        if self.factor is not None:
            f = self.factor.view(-1, *[1] * (f.ndim - 2)) * f
        y: Tensor = self.join(x, f)
        return y


def _normalisation(norm: str, is_conv: bool, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width) if is_conv else nn.BatchNorm1d(width)
    if norm in ("layer", "group"):
        return nn.GroupNorm(1 if norm == "layer" else GROUPS, width)
    return nn.Identity()
