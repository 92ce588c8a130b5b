"""Residual networks that train without normalisation, by starting every block as the identity or close to it.

At initialisation, a residual block x + F(x) without normalisation doubles the variance of x, so the signal grows as
2^blocks; with normalisation inside F, each block adds the same variance to it, and the signal grows linearly (De and
Smith 2020, arXiv 2002.10444, section 3). All four networks here reach such a start by a small or zero factor on F or by
zero weights. They have the CIFAR layout of He et al. 2015 (arXiv 1512.03385) with its parameter-free shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gradprobe.networks.common import check_sizes, initialise
from gradprobe.networks.layouts import cifar_blocks, pad_shortcut, stages
from gradprobe.nn.convolution import Conv2d
from gradprobe.nn.residual import ResidualAdd


def fixup(depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Module:
    """Builds a residual network with Fixup initialisation: y = relu(x + a conv(relu(conv(x + b1) + b2) + b3) + b4).

    In a network of L blocks with m weight layers each (m = 2 here), the last convolution of every block and the
    classifier start at zero; the other convolutions of a block start as He's, scaled by L^(-1/(2m - 2)). The factor a
    starts at 1 and the scalar biases at 0, one before each convolution, the classifier and each ReLU. A block whose
    input is not negative, as behind a ReLU, starts as the identity, and only the classifier has a gradient at first.
    The authors' code trains factors and biases with a tenth of the learning rate, the sweep trains all with the same.

    Args:
        depth: Weight layers along the longest path: 6n+2 (8, 14, 20, 32, 44, 50, 56, 110, …).
        in_channels: Channels of the input images.
        num_classes: Number of outputs.
        width: Channels of the first stage; each later stage doubles it.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes], for any H and W. Its weights are drawn
        from torch's global random generator.

    Raises:
        ArgumentError: The layout has no such depth, or a size is not a whole number of at least 1.

    Source:
        Zhang, Dauphin and Ma 2019, arXiv 1901.09321, section 3, "Fixup initialization".

    Example:
        >>> fixup(8, in_channels=1)(torch.zeros(2, 1, 8, 8)).abs().max().item()
        0.0
    """
    blocks = cifar_blocks(depth)
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), ScalarBias(), nn.ReLU())
    body = stages((blocks,) * 3, width, 1, FixupBlock)
    fc = nn.Linear(4 * width, num_classes)
    model = _WithoutNorm(stem, body, nn.Identity(), nn.Sequential(ScalarBias(), fc))
    initialise(model, "he")
    with torch.no_grad():
        fc.weight.zero_()
        fc.bias.zero_()
        for block in body.modules():
            if isinstance(block, FixupBlock):
                block.first.weight.mul_((3 * blocks) ** -0.5)
                block.second.weight.zero_()
    return model


def skipinit(depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Module:
    """Builds a residual network with SkipInit: y = x + a conv(relu(conv(relu(x)))), with a learnable scalar a = 0.

    The ReLUs are before the convolutions, as in He et al. 2016 (arXiv 1603.05027); the convolutions have biases and
    start as He's. Arguments, result and errors are those of `fixup`.

    Source:
        De and Smith 2020, arXiv 2002.10444, section 4.

    Example:
        >>> block = skipinit(8).stages[0][0]
        >>> x = torch.randn(1, 16, 4, 4)
        >>> torch.equal(block(x), x)
        True
    """
    return _scaled(depth, in_channels, num_classes, width, per_channel=False, initial=0.0, relu_first=True)


def rezero(depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Module:
    """Builds a residual network with ReZero: y = relu(x + a conv(relu(conv(x)))), with a learnable scalar a = 0.

    The only difference to SkipInit is the place of the ReLUs, which are where He et al. 2015 have them. The
    convolutions have biases and start as He's. Arguments, result and errors are those of `fixup`.

    Source:
        Bachlechner et al. 2020, arXiv 2003.04887, equation 1: x + a F(x), for any F; here a block without
        normalisation.

    Example:
        >>> block = rezero(8).stages[0][0]
        >>> x = torch.rand(1, 16, 4, 4)
        >>> torch.equal(block(x), x)
        True
    """
    return _scaled(depth, in_channels, num_classes, width, per_channel=False, initial=0.0, relu_first=False)


def layerscale(depth: int, *, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Module:
    """Builds a residual network with LayerScale: y = relu(x + s conv(relu(conv(x)))), with a learnable s per channel.

    The factors start small, at `layerscale_start`. The source has layer normalisation in F and is about transformers;
    this is the factor alone, on convolutions, which have biases and start as He's. Arguments, result and errors are
    those of `fixup`.

    Source:
        Touvron et al. 2021, arXiv 2103.17239, section 2.

    Example:
        >>> layerscale(8).stages[0][0].factors[:2]
        tensor([0.1000, 0.1000], grad_fn=<SliceBackward0>)
    """
    start = layerscale_start(3 * cifar_blocks(depth))
    return _scaled(depth, in_channels, num_classes, width, per_channel=True, initial=start, relu_first=False)


def layerscale_start(blocks: int) -> float:
    """Returns the initial factor of LayerScale in a network of this many residual blocks.

    Source:
        Touvron et al. 2021, arXiv 2103.17239, section 2: 0.1 up to 18 blocks, 1e-5 for 24, 1e-6 for deeper networks.

    Example:
        >>> [layerscale_start(blocks) for blocks in (3, 18, 24, 48)]
        [0.1, 0.1, 1e-05, 1e-06]
    """
    return 0.1 if blocks <= 18 else 1e-5 if blocks <= 24 else 1e-6


class ScalarBias(nn.Module):
    """Adds one learnable number, which starts at 0, to all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum."""
        return x + self.bias


class FixupBlock(nn.Module):
    """A residual block with the scalar biases and the factor of Fixup; `fixup` initialises it."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.second = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.biases = nn.ModuleList(ScalarBias() for _ in range(4))
        self.factor = nn.Parameter(torch.ones(1))
        self.shortcut = pad_shortcut(in_channels, channels, stride)
        self.join = ResidualAdd(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the block."""
        before_first, before_relu, before_second, at_end = self.biases
        f = torch.relu(before_relu(self.first(before_first(x))))
        f = at_end(self.factor * self.second(before_second(f)))
        y: Tensor = self.join(self.shortcut(x), f)
        return y


class ScaledBlock(nn.Module):
    """A residual block of two convolutions, whose result is multiplied by learnable factors before it is added.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        per_channel: One factor per channel instead of one for all.
        initial: Initial value of the factors.
        relu_first: ReLUs before the convolutions; otherwise behind them, the last one behind the addition.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, per_channel: bool, initial: float, relu_first: bool
    ) -> None:
        super().__init__()
        self.first = Conv2d(in_channels, channels, 3, stride, padding=1)
        self.second = Conv2d(channels, channels, 3, padding=1)
        self.factors = nn.Parameter(torch.full((channels if per_channel else 1,), initial))
        self.relu_first = relu_first
        self.shortcut = pad_shortcut(in_channels, channels, stride)
        self.join = ResidualAdd(relu=not relu_first)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the block."""
        f = self.first(torch.relu(x) if self.relu_first else x)
        f = self.factors.view(-1, 1, 1) * self.second(torch.relu(f))
        y: Tensor = self.join(self.shortcut(x), f)
        return y


def _scaled(
    depth: int, in_channels: int, num_classes: int, width: int, *, per_channel: bool, initial: float, relu_first: bool
) -> nn.Module:
    blocks = cifar_blocks(depth)
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    block_of: Callable[[int, int, int], nn.Module] = partial(
        ScaledBlock, per_channel=per_channel, initial=initial, relu_first=relu_first
    )
    first, last = (nn.Identity(), nn.ReLU()) if relu_first else (nn.ReLU(), nn.Identity())
    model = _WithoutNorm(
        nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), first),
        stages((blocks,) * 3, width, 1, block_of),
        last,
        nn.Linear(4 * width, num_classes),
    )
    initialise(model, "he")
    return model


class _WithoutNorm(nn.Module):
    def __init__(self, stem: nn.Module, body: nn.Module, last: nn.Module, fc: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = body
        self.last = last
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.last(self.stages(self.stem(x))).mean(dim=(2, 3)))
        return logits
