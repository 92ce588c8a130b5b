"""Networks that show what depth does: plain and residual ones of equal depth, and a deep CNN without normalisation.

Sources: He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2 for the CIFAR
layout and table 1 for the ImageNet layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import ArgumentError
from gradprobe.nn.residual import ResidualAdd

Layout = Literal["cifar", "imagenet"]
Norm = Literal["batch", "none"]
Init = Literal["he", "xavier", "default"]
Shortcut = Literal["none", "pad", "projection"]

FAMILIES = ("plain", "resnet")
LAYOUTS = ("cifar", "imagenet")
NORMS = ("batch", "none")
INITS = ("he", "xavier", "default")

# Blocks per stage, and whether they are bottlenecks (He et al. 2015, table 1).
_IMAGENET_STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
IMAGENET_DEPTHS = tuple(_IMAGENET_STAGES)


def plain(
    depth: int,
    *,
    layout: Layout | None = None,
    in_channels: int = 3,
    num_classes: int | None = None,
    width: int | None = None,
    norm: Norm = "batch",
    init: Init = "he",
) -> nn.Module:
    """Builds a plain network: the residual network of the same depth without its shortcuts.

    Args:
        depth: Weight layers along the longest path. 6n+2 (8, 14, 20, …, 1202) is He et al.'s CIFAR layout; 18, 34, 50,
            101 and 152 are their ImageNet layout. 50 and 152 fit both and mean the ImageNet networks unless
            ``layout="cifar"`` is given.
        layout: ``"cifar"`` (3x3 stem, widths 16/32/64) or ``"imagenet"`` (7x7 stem, max-pool, four stages); by default
            the one that the depth implies.
        in_channels: Channels of the input images.
        num_classes: Number of outputs; by default 10 (CIFAR layout) or 1000 (ImageNet layout).
        width: Channels of the first stage; by default 16 or 64. Each later stage doubles it.
        norm: ``"batch"`` adds batch normalisation after every convolution, which then has no bias; ``"none"`` omits it
            and gives the convolutions a bias.
        init: Initialisation of the weights: ``"he"`` (normal, fan-in), ``"xavier"`` (uniform) or ``"default"``
            (PyTorch's). Biases keep PyTorch's initialisation.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes], for any H and W. Its weights are drawn
        from torch's global random generator.

    Raises:
        ArgumentError: An option is not one of the above; the message lists the valid ones.

    Example:
        >>> count_parameters(plain(56))
        853018
    """
    return _build(False, depth, layout, in_channels, num_classes, width, norm, init)


def resnet(
    depth: int,
    *,
    layout: Layout | None = None,
    in_channels: int = 3,
    num_classes: int | None = None,
    width: int | None = None,
    norm: Norm = "batch",
    init: Init = "he",
) -> nn.Module:
    """Builds a residual network.

    The CIFAR layout has parameter-free shortcuts (option A: stride 2 and zero-padded channels), so it has exactly the
    parameters of the plain network. The ImageNet layout has projections where the shape changes (option B), and
    bottleneck blocks from 50 layers on. Arguments, result and errors are those of `plain`; with ``norm="none"`` the
    activations double with every block at initialisation.

    Example:
        >>> count_parameters(resnet(20))
        269722
        >>> resnet(8, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _build(True, depth, layout, in_channels, num_classes, width, norm, init)


def deep_cnn(num_layers: int = 20, *, in_channels: int = 3, num_classes: int = 10, width: int = 64) -> nn.Module:
    """Builds a stack of 3x3 convolutions and ReLUs whose gradients vanish: no normalisation, PyTorch's initialisation.

    Args:
        num_layers: Number of convolutions, at least 1.
        in_channels: Channels of the input images.
        num_classes: Number of outputs.
        width: Channels of every convolution.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes].

    Raises:
        ArgumentError: A size is not a whole number of at least 1.

    Example:
        >>> deep_cnn(50)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    _check_sizes(num_layers=num_layers, in_channels=in_channels, num_classes=num_classes, width=width)
    return _DeepCNN(num_layers, in_channels, num_classes, width)


def count_parameters(model: nn.Module) -> int:
    """Counts the trainable elements of a model, tied parameters once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def default_layout(depth: int) -> Layout:
    """Returns the layout that a depth implies: "imagenet" for its five depths, "cifar" for any other 6n+2.

    Args:
        depth: Number of weight layers.

    Returns:
        ``"cifar"`` or ``"imagenet"``.

    Raises:
        ArgumentError: No layout has that depth.

    Example:
        >>> default_layout(56), default_layout(50)
        ('cifar', 'imagenet')
    """
    if depth in _IMAGENET_STAGES:
        return "imagenet"
    if _is_whole(depth) and depth >= 8 and depth % 6 == 2:
        return "cifar"
    raise ArgumentError(
        f"depth: needed 6n+2 (8, 14, 20, 32, 44, 56, 110, 1202, …) or one of {_listed(IMAGENET_DEPTHS)}, got {depth!r}"
    )


def initialise(model: nn.Module, init: Init) -> None:
    """Reinitialises the weights of all convolutions and linear layers from torch's global random generator.

    Args:
        model: Any module, a single layer included; changed in place.
        init: ``"he"`` (normal, fan-in), ``"xavier"`` (uniform), or ``"default"``, which keeps PyTorch's weights.

    Source:
        He et al. 2015, arXiv 1502.01852; Glorot and Bengio 2010 (AISTATS), equation 16.

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
            else:
                nn.init.xavier_uniform_(module.weight)


def _build(
    residual: bool,
    depth: int,
    layout: Layout | None,
    in_channels: int,
    num_classes: int | None,
    width: int | None,
    norm: Norm,
    init: Init,
) -> nn.Module:
    natural = default_layout(depth)
    layout = natural if layout is None else layout
    for name, value, allowed in (("layout", layout, LAYOUTS), ("norm", norm, NORMS), ("init", init, INITS)):
        if value not in allowed:
            raise ArgumentError(f"{name}: needed one of {_listed(allowed)}, got {value!r}")
    if layout == "imagenet" and natural != "imagenet":
        raise ArgumentError(f"depth: the ImageNet layout has {_listed(IMAGENET_DEPTHS)}, got {depth}")
    if layout == "cifar" and depth % 6 != 2:
        raise ArgumentError(f"depth: the CIFAR layout has 6n+2 (8, 14, 20, 32, 44, 56, 110, 1202, …), got {depth}")
    if num_classes is None:
        num_classes = 10 if layout == "cifar" else 1000
    if width is None:
        width = 16 if layout == "cifar" else 64
    _check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    model: nn.Module
    if layout == "cifar":
        model = _CifarNet((depth - 2) // 6, residual, in_channels, num_classes, width, norm)
    else:
        blocks, bottleneck = _IMAGENET_STAGES[depth]
        model = _ImageNetNet(blocks, bottleneck, residual, in_channels, num_classes, width, norm)
    initialise(model, init)
    return model


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not _is_whole(value) or value < 1:
            raise ArgumentError(f"{name}: needed a whole number of at least 1, got {value!r}")


def _listed(names: tuple[object, ...]) -> str:
    return ", ".join(map(str, names))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=norm == "none")]
    if norm == "batch":
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


class _PadShortcut(nn.Module):
    """Option A: takes every second pixel and pads the new channels with zeros."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    """Normalised convolutions with ReLUs in between; the shortcut, if any, is added before the last ReLU."""

    def __init__(self, convs: list[nn.Sequential], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.shortcut = shortcut
        self.join = None if shortcut is None else ResidualAdd(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        f = x
        for index, conv in enumerate(self.convs):
            f = conv(torch.relu(f) if index else f)
        return torch.relu(f) if self.shortcut is None or self.join is None else self.join(self.shortcut(x), f)


def _basic_convs(in_channels: int, channels: int, stride: int, norm: Norm) -> list[nn.Sequential]:
    return [_conv(in_channels, channels, 3, stride, norm), _conv(channels, channels, 3, 1, norm)]


def _bottleneck_convs(in_channels: int, channels: int, stride: int, norm: Norm) -> list[nn.Sequential]:
    # The first 1x1 convolution has the stride, as in the paper.
    return [
        _conv(in_channels, channels, 1, stride, norm),
        _conv(channels, channels, 3, 1, norm),
        _conv(channels, 4 * channels, 1, 1, norm),
    ]


def _stages(
    blocks_per_stage: tuple[int, ...],
    convs_of: Callable[[int, int, int, Norm], list[nn.Sequential]],
    expansion: int,
    shortcut: Shortcut,
    width: int,
    norm: Norm,
) -> nn.Sequential:
    """Builds the body of both layouts: each stage after the first doubles the channels and halves the resolution."""
    stages: list[nn.Module] = []
    in_channels = width
    for index, blocks in enumerate(blocks_per_stage):
        channels = width * 2**index
        stage: list[nn.Module] = []
        for block in range(blocks):
            stride = 2 if index > 0 and block == 0 else 1
            out_channels = channels * expansion
            connection: nn.Module | None = None
            if shortcut != "none":
                if stride == 1 and in_channels == out_channels:
                    connection = nn.Identity()
                elif shortcut == "pad":
                    connection = _PadShortcut(out_channels - in_channels)
                else:
                    connection = _conv(in_channels, out_channels, 1, stride, norm)
            stage.append(_Block(convs_of(in_channels, channels, stride, norm), connection))
            in_channels = out_channels
        stages.append(nn.Sequential(*stage))
    return nn.Sequential(*stages)


class _CifarNet(nn.Module):
    def __init__(self, blocks: int, residual: bool, in_channels: int, num_classes: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.stem = _conv(in_channels, width, 3, 1, norm)
        self.stages = _stages((blocks,) * 3, _basic_convs, 1, "pad" if residual else "none", width, norm)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.stem(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class _ImageNetNet(nn.Module):
    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        bottleneck: bool,
        residual: bool,
        in_channels: int,
        num_classes: int,
        width: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        convs_of, expansion = (_bottleneck_convs, 4) if bottleneck else (_basic_convs, 1)
        self.stem = _conv(in_channels, width, 7, 2, norm)
        self.stages = _stages(blocks, convs_of, expansion, "projection" if residual else "none", width, norm)
        self.fc = nn.Linear(8 * width * expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem(x)), kernel_size=3, stride=2, padding=1)
        x = self.stages(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class _DeepCNN(nn.Module):
    def __init__(self, num_layers: int, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers += [nn.Conv2d(width if index else in_channels, width, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits
