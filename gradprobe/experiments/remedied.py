"""The nets that `remedies` compares: linear layers of one width, with some remedies built in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gradprobe.errors import ArgumentError
from gradprobe.networks import Init, initialise
from gradprobe.nn import ResidualAdd

WIDTH = 64
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


def network(remedy: str, activation: str, depth: int, inputs: int, num_classes: int) -> nn.Module:
    """Builds the net of a cell: linear layers, normalised or not, each hidden one with its activation.

    A plain hidden layer is f(norm(Wx + b)). A residual one, from the second on, is x + W f(norm(x)) + b, with nothing
    on the shortcut.

    Args:
        remedy: parts of `PARTS` with + between.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        depth: weight layers, at least 2.
        inputs: elements of one example.
        num_classes: outputs.

    Returns:
        A module that maps [N, ...] to logits [N, num_classes]. Its weights come from torch's global random stream.

    Raises:
        ArgumentError: an option is not one of those above; the message lists what there is.

    Source:
        He et al. 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027, for the order in residual nets.
        Ioffe and Szegedy 2015, arXiv 1502.03167; Ba et al. 2016, arXiv 1607.06450; Wu and He 2018, arXiv 1803.08494,
        for the normalisations.

    Example:
        >>> import torch
        >>> network("he+residual", "relu", 5, 64, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    chosen = parse_remedy(remedy)
    if activation not in _ACTIVATIONS:
        raise ArgumentError(f"activation: needed one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if depth < 2:
        raise ArgumentError(f"depth: needed a whole number of at least 2, got {depth}")
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth - 1):
        linear = nn.Linear(WIDTH if k else inputs, WIDTH)
        _start(linear, chosen.init)
        layers.append(_Layer(linear, chosen.norm, _ACTIVATIONS[activation](), chosen.residual and k > 0))
    head = nn.Linear(WIDTH, num_classes)
    _start(head, chosen.init)
    return nn.Sequential(*layers, head)


class _Layer(nn.Module):
    def __init__(self, linear: nn.Linear, norm: str, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = _normalisation(norm)
        self.activation = activation
        self.join = ResidualAdd() if residual else None

    def forward(self, x: Tensor) -> Tensor:
        if self.join is not None:
            joined: Tensor = self.join(x, self.linear(self.activation(self.norm(x))))
            return joined
        plain: Tensor = self.activation(self.norm(self.linear(x)))
        return plain


def _normalisation(norm: str) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(GROUPS, WIDTH)
    if norm == "layer":
        return nn.LayerNorm(WIDTH)
    return nn.BatchNorm1d(WIDTH) if norm == "batch" else nn.Identity()


def _start(linear: nn.Linear, init: Init) -> None:
    initialise(linear, init)
    if init != "default":
        nn.init.zeros_(linear.bias)
