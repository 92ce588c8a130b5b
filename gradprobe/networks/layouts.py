"""Plain and residual networks of equal depth, in two layouts.

Sources: He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2 for the CIFAR
layout and table 1 for the ImageNet layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import ArgumentError, not_among
from gradprobe.networks.common import INITS, Init, check_sizes, initialise, is_whole, joined
from gradprobe.nn.batch_norm import BatchNorm2d, calls_are_watched
from gradprobe.nn.convolution import Conv2d
from gradprobe.nn.residual import ResidualAdd

Layout = Literal["cifar", "imagenet"]
Norm = Literal["batch", "none"]
Shortcut = Literal["none", "pad", "projection"]

LAYOUTS = ("cifar", "imagenet")
NORMS = ("batch", "none")

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
        init: Initialisation of the weights: ``"he"`` (normal, fan-in), ``"xavier"`` (uniform), ``"orthogonal"`` or
            ``"default"`` (PyTorch's). Biases keep PyTorch's initialisation.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes], for any H and W. Its weights are drawn
        from torch's global random generator.

    Raises:
        ArgumentError: An option is not one of the above; the message lists the valid ones.

    Example:
        >>> sum(parameter.numel() for parameter in plain(56).parameters())
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
        >>> sum(parameter.numel() for parameter in resnet(20).parameters())
        269722
        >>> resnet(8, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _build(True, depth, layout, in_channels, num_classes, width, norm, init)


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
    if is_whole(depth) and depth >= 8 and depth % 6 == 2:
        return "cifar"
    raise ArgumentError(
        f"depth: needed 6n+2 (8, 14, 20, 32, 44, 56, 110, 1202, …) or one of {joined(IMAGENET_DEPTHS)}, got {depth!r}"
    )


def cifar_blocks(depth: int) -> int:
    """Returns the number of blocks of each stage of the CIFAR layout.

    Raises:
        ArgumentError: The layout has no such depth.

    Example:
        >>> cifar_blocks(56)
        9
    """
    if not is_whole(depth) or depth < 8 or depth % 6 != 2:
        raise ArgumentError(f"depth: the CIFAR layout has 6n+2 (8, 14, 20, 32, 44, 56, 110, 1202, …), got {depth!r}")
    return (depth - 2) // 6


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
            raise not_among(name, value, allowed)
    if layout == "imagenet" and natural != "imagenet":
        raise ArgumentError(f"depth: the ImageNet layout has {joined(IMAGENET_DEPTHS)}, got {depth}")
    blocks_of_cifar = cifar_blocks(depth) if layout == "cifar" else 0
    if num_classes is None:
        num_classes = 10 if layout == "cifar" else 1000
    if width is None:
        width = 16 if layout == "cifar" else 64
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    model: nn.Module
    if layout == "cifar":
        model = CifarNet(blocks_of_cifar, residual, in_channels, num_classes, width, norm)
    else:
        blocks, bottleneck = _IMAGENET_STAGES[depth]
        model = _ImageNetNet(blocks, bottleneck, residual, in_channels, num_classes, width, norm)
    initialise(model, init)
    return model


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = [Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=norm == "none")]
    if norm == "batch":
        layers.append(BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


def _relu_of(conv: nn.Module, x: Tensor) -> Tensor:
    """Computes `relu(conv(x))`; normalisation and ReLU in one pass unless a hook waits for their modules."""
    parts = _parts(conv)
    if parts is None:
        return torch.relu(conv(x))
    convolution, norm = parts
    f = convolution(x)
    y = norm.in_one_pass(f, relu=True)
    return torch.relu(norm(f)) if y is None else y


def _joined(conv: nn.Module, f: Tensor, shortcut: nn.Module, x: Tensor, join: ResidualAdd) -> Tensor:
    """Computes `join(shortcut(x), conv(f))`; in one pass unless the residual add is observed or a hook waits for it."""
    is_other = type(join) is not ResidualAdd or join.inplace or join.is_observed()
    parts = None if is_other else _parts(conv, join)
    convolution, norm = parts or (conv, None)
    f, x = convolution(f), shortcut(x)
    y = None if norm is None else norm.in_one_pass(f, x, join.relu)
    if y is None:
        y = join(x, f if norm is None else norm(f))
    return y


def _parts(conv: nn.Module, *others: nn.Module) -> tuple[nn.Module, BatchNorm2d] | None:
    """Returns a convolution and its normalisation if it trains and no hook waits for a call of conv, norm or others."""
    if type(conv) is not nn.Sequential or len(conv) != 2:
        return None
    convolution, norm = conv
    if type(norm) is not BatchNorm2d or not norm.training or calls_are_watched(conv, norm, *others):
        return None
    return convolution, norm


class PadShortcut(nn.Module):
    """Option A: takes every second pixel and pads the new channels with zeros."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Returns the shortcut of an input."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Normalised convolutions with ReLUs in between; the shortcut, if any, is added before the last ReLU."""

    def __init__(self, convs: list[nn.Sequential], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.shortcut = shortcut
        self.join = None if shortcut is None else ResidualAdd(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the block."""
        f = x
        for conv in self.convs[:-1]:
            f = _relu_of(conv, f)
        if self.shortcut is None or self.join is None:
            return _relu_of(self.convs[-1], f)
        return _joined(self.convs[-1], f, self.shortcut, x, self.join)


def _basic_convs(in_channels: int, channels: int, stride: int, norm: Norm) -> list[nn.Sequential]:
    return [_conv(in_channels, channels, 3, stride, norm), _conv(channels, channels, 3, 1, norm)]


def _bottleneck_convs(in_channels: int, channels: int, stride: int, norm: Norm) -> list[nn.Sequential]:
    # The first 1x1 convolution has the stride, as in the paper.
    return [
        _conv(in_channels, channels, 1, stride, norm),
        _conv(channels, channels, 3, 1, norm),
        _conv(channels, 4 * channels, 1, 1, norm),
    ]


def pad_shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Returns the parameter-free shortcut (option A), which is the identity where the shape stays."""
    return nn.Identity() if stride == 1 and in_channels == channels else PadShortcut(channels - in_channels)


def _blocks_of(
    convs_of: Callable[[int, int, int, Norm], list[nn.Sequential]], expansion: int, shortcut: Shortcut, norm: Norm
) -> Callable[[int, int, int], nn.Module]:
    """Returns the function that builds a block from its input channels, its channels and its stride."""

    def block(in_channels: int, channels: int, stride: int) -> nn.Module:
        out_channels = channels * expansion
        connection: nn.Module | None = None
        if shortcut == "projection" and (stride != 1 or in_channels != out_channels):
            connection = _conv(in_channels, out_channels, 1, stride, norm)
        elif shortcut != "none":
            connection = pad_shortcut(in_channels, out_channels, stride)
        return Block(convs_of(in_channels, channels, stride, norm), connection)

    return block


def stages(
    blocks_per_stage: tuple[int, ...], width: int, expansion: int, block_of: Callable[[int, int, int], nn.Module]
) -> nn.Sequential:
    """Builds the body of a layout: each stage after the first doubles the channels and halves the resolution.

    Args:
        blocks_per_stage: Number of blocks of each stage.
        width: Channels of the first stage.
        expansion: Output channels of a block over its channels.
        block_of: Builds a block from its input channels, its channels and its stride.

    Returns:
        The stages, each a sequence of blocks.
    """
    built: list[nn.Module] = []
    in_channels = width
    for index, blocks in enumerate(blocks_per_stage):
        channels = width * 2**index
        stage: list[nn.Module] = []
        for block in range(blocks):
            stage.append(block_of(in_channels, channels, 2 if index > 0 and block == 0 else 1))
            in_channels = channels * expansion
        built.append(nn.Sequential(*stage))
    return nn.Sequential(*built)


class CifarNet(nn.Module):
    """The CIFAR layout; `plain` and `resnet` build it."""

    def __init__(self, blocks: int, residual: bool, in_channels: int, num_classes: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.stem = _conv(in_channels, width, 3, 1, norm)
        self.stages = stages((blocks,) * 3, width, 1, _blocks_of(_basic_convs, 1, "pad" if residual else "none", norm))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images."""
        x = self.stages(_relu_of(self.stem, x))
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
        shortcut: Shortcut = "projection" if residual else "none"
        self.stages = stages(blocks, width, expansion, _blocks_of(convs_of, expansion, shortcut, norm))
        self.fc = nn.Linear(8 * width * expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(_relu_of(self.stem, x), kernel_size=3, stride=2, padding=1)
        x = self.stages(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
