"""Modules that gradprobe can look into."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from gradprobe.ops.residual import residual_add, residual_add_

__all__ = ["ResidualAdd"]


class Tap(Protocol):
    """What a probe puts into a junction to observe it."""

    def __call__(self, x: Tensor, f: Tensor, relu: bool) -> Tensor:
        """Joins x and f as `residual_add` does."""

    def in_place(self, x: Tensor, f: Tensor, into_x: bool) -> Tensor:
        """Adds one operand to the other, and gives that."""


class ResidualAdd(nn.Module):
    """The junction of a residual block as a module, so that it has a name in the model.

    Args:
        relu: whether to take the positive part of the sum.
        inplace: whether to write the result into the branch's, `f`, which nothing needs afterwards where the branch
            ends in a convolution or in batch normalisation. (The shortcut mostly is needed: by the first layer of the
            branch, on the way back.) A probe does not observe the junction then.

    Example:
        >>> import torch
        >>> join = ResidualAdd(relu=True)
        >>> join(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
        >>> join
        ResidualAdd(relu=True)
    """

    def __init__(self, relu: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.inplace = inplace
        self.tap: Tap | None = None  # a probe's, while one is attached

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Joins shortcut and branch.

        Args:
            x: what passes by the shortcut, any shape and strided layout.
            f: what comes out of the branch, of the same shape; overwritten where `inplace`.

        Returns:
            `x + f`, or `torch.relu(x + f)`; `f` itself where `inplace`.

        Raises:
            ArgumentError: as `gradprobe.residual_add` or, where `inplace`, `gradprobe.residual_add_(f, x)` raises it.

        Example:
            >>> import torch
            >>> ResidualAdd()(torch.tensor([1.0]), torch.tensor([2.0]))
            tensor([3.])
        """
        if self.inplace:
            return residual_add_(f, x, self.relu)
        return residual_add(x, f, self.relu) if self.tap is None else self.tap(x, f, self.relu)

    def extra_repr(self) -> str:
        """Says whether there is a ReLU, and whether it works in place.

        Returns:
            The arguments of the constructor.

        Example:
            >>> ResidualAdd().extra_repr()
            'relu=False'
        """
        return f"relu={self.relu}" + (", inplace=True" if self.inplace else "")
