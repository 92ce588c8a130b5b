"""Small transformers for images, by depth: with the normalisation before or behind the residual add, or without it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import ArgumentError, not_among
from gradprobe.networks.common import check_sizes, initialise, is_whole
from gradprobe.nn.residual import ResidualAdd

Arrangement = Literal["pre", "post", "plain"]

ARRANGEMENTS = ("pre", "post", "plain")

HEAD_WIDTH = 16
MLP_RATIO = 4  # width of an MLP's hidden layer over that of a token


def transformer(
    depth: int,
    *,
    arrangement: Arrangement = "pre",
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = 32,
    width: int = 64,
) -> nn.Module:
    """Builds a transformer that classifies images, whose patches are its tokens.

    Depth counts the sublayers: self-attention and an MLP in turn, F1, F2, …. With normalisation N, they compute

        pre     x + F(N(x)), with one more N behind the last
        post    N(x + F(x))
        plain   F(N(x)), the first without its residual adds, with one more N behind the last

    At initialisation, the gradients of a post-norm transformer are large near its output, and those of a pre-norm one
    fall with depth as 1/sqrt(depth); without residual adds, attention makes all tokens alike.

    Args:
        depth: Number of sublayers, an even number of at least 2.
        arrangement: ``"pre"``, ``"post"`` or ``"plain"``.
        in_channels: Channels of the input images.
        num_classes: Number of outputs.
        image_size: Height or width of the images, whichever is smaller. A patch has an eighth of it, at least 2 pixels.
        width: Embedding dimension, a multiple of 16, the dimension of an attention head.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes], for any H and W. Its weights are drawn
        from torch's global random generator (Xavier, uniform; those of the patches normal with variance 1 / fan-in, so
        that the image is not lost beside the positions); biases are zero.

    Raises:
        ArgumentError: An argument is not one of the above.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762 (post); Xiong et al. 2020, arXiv 2002.04745, figure 1 and theorem 1 (pre
        and post); Dosovitskiy et al. 2021, arXiv 2010.11929 (patches); Beyer et al. 2022, arXiv 2205.01580 (mean over
        the tokens, fixed positions); Dong et al. 2021, arXiv 2103.03404 (attention without residual adds).

    Example:
        >>> transformer(4, in_channels=1, image_size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not is_whole(depth) or depth < 2 or depth % 2:
        raise ArgumentError(f"depth: a transformer needs an even number of sublayers of at least 2, got {depth!r}")
    if arrangement not in ARRANGEMENTS:
        raise not_among("arrangement", arrangement, ARRANGEMENTS)
    check_sizes(in_channels=in_channels, num_classes=num_classes, image_size=image_size, width=width)
    if width % HEAD_WIDTH:
        raise ArgumentError(f"width: needed a multiple of {HEAD_WIDTH}, got {width}")
    model = Transformer(depth, arrangement, in_channels, num_classes, max(2, image_size // 8), width)
    initialise(model, "xavier")
    nn.init.normal_(model.embed.weight, std=model.embed.weight[0].numel() ** -0.5)
    for module in model.modules():
        if isinstance(module, Attention):
            # Queries, keys and values are three layers, each with its own fan-out.
            for weight in module.qkv.weight.detach().chunk(3):
                nn.init.xavier_uniform_(weight)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


class Attention(nn.Module):
    """Self-attention with heads of dimension `HEAD_WIDTH`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mixed tokens, [N, tokens, width]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Sublayer(nn.Module):
    """Attention or an MLP, with its normalisation and, if any, its residual add."""

    def __init__(self, branch: nn.Module, arrangement: Arrangement, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = branch
        self.join = None if arrangement == "plain" else ResidualAdd()
        self.norm_first = arrangement != "post"

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens of the next sublayer."""
        f: Tensor = self.branch(self.norm(x) if self.norm_first else x)
        y: Tensor = f if self.join is None else self.join(x, f)
        return y if self.norm_first else self.norm(y)


class Transformer(nn.Module):
    """Patches, fixed positions, sublayers, and a classifier of the mean token; `transformer` initialises it."""

    def __init__(
        self, depth: int, arrangement: Arrangement, in_channels: int, num_classes: int, patch: int, width: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.sublayers = nn.Sequential(
            *(Sublayer(_mlp(width) if k % 2 else Attention(width), arrangement, width) for k in range(depth))
        )
        self.norm = nn.Identity() if arrangement == "post" else nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of images; zeros at the right and at the bottom complete the last patches."""
        height, width = x.shape[-2:]
        x = self.embed(F.pad(x, (0, -width % self.patch, 0, -height % self.patch)))
        x = (x + positions(x.shape[-2], x.shape[-1], x.shape[1], x.device).to(x.dtype)).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.norm(self.sublayers(x)).mean(dim=1))
        return logits


def positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Returns sines and cosines of the row and the column of each token, [channels, height, width].

    Args:
        height: Rows of tokens.
        width: Columns of tokens.
        channels: Embedding dimension, a multiple of 4.
        device: Where to compute them, so that a step copies nothing to a GPU.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762, section 3.5, here half of the channels for each direction.

    Example:
        >>> positions(2, 3, 4)[:, 0, 0]
        tensor([0., 1., 0., 1.])
    """
    frequencies = torch.exp(torch.arange(channels // 4, device=device) * (-4 * math.log(10_000) / channels))
    rows, columns = (torch.outer(frequencies, torch.arange(float(size), device=device)) for size in (height, width))
    by_row = torch.cat([rows.sin(), rows.cos()])[:, :, None].expand(-1, -1, width)
    by_column = torch.cat([columns.sin(), columns.cos()])[:, None, :].expand(-1, height, -1)
    return torch.cat([by_row, by_column])


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))
