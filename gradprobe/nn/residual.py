"""Residual additions as modules that a probe can observe."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from gradprobe.ops.residual import residual_add, residual_add_

__all__ = ["ResidualAdd"]


class ResidualObserver(Protocol):
    """The object that a probe puts into a `ResidualAdd` to observe it; it adds in the module's place."""

    def __call__(self, x: Tensor, f: Tensor, relu: bool) -> Tensor:
        """Adds x and f as `residual_add` does."""

    def in_place(self, x: Tensor, f: Tensor, into_x: bool) -> Tensor:
        """Adds one operand into the other and returns the one written to."""


class ResidualAdd(nn.Module):
    """The addition of a residual block as a module, so that it has a name in the model.

    Args:
        relu: Whether to apply a ReLU to the sum.
        inplace: Whether to write the result into the branch's output `f`. That is safe if the branch ends in a
            convolution or batch normalization, whose backward does not need its output. (The shortcut `x` is usually
            still needed by the backward of the branch's first layer.) A probe does not observe an in-place residual
            add.

    Example:
        >>> import torch
        >>> join = ResidualAdd(relu=True)
        >>> join(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
        >>> join
        ResidualAdd(relu=True)
    """

    # Set while a probe is attached. A class attribute, so that modules pickled by earlier versions still load; typed in
    # a comment, since torch.jit.script takes annotations of a module's class as TorchScript types.
    observer = None  # type: ResidualObserver | None

    def __init__(self, relu: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.inplace = inplace

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Adds the shortcut and the branch.

        Args:
            x: Output of the shortcut, any shape and strided layout.
            f: Output of the branch, of the same shape; overwritten if `inplace`.

        Returns:
            `x + f`, or `torch.relu(x + f)`; `f` itself if `inplace`.

        Raises:
            ArgumentError: As raised by `gradprobe.residual_add` or, if `inplace`, by `gradprobe.residual_add_(f, x)`.

        Example:
            >>> import torch
            >>> ResidualAdd()(torch.tensor([1.0]), torch.tensor([2.0]))
            tensor([3.])
        """
        if self.inplace:
            return residual_add_(f, x, self.relu)
        return residual_add(x, f, self.relu) if self.observer is None else self.observer(x, f, self.relu)

    def extra_repr(self) -> str:
        """Returns the constructor's arguments for the module's `repr`.

        Example:
            >>> ResidualAdd().extra_repr()
            'relu=False'
        """
        return f"relu={self.relu}" + (", inplace=True" if self.inplace else "")
