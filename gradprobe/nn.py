"""Modules that gradprobe can look into."""

from __future__ import annotations

from torch import Tensor, nn

from gradprobe.ops.residual import residual_add

__all__ = ["ResidualAdd"]


class ResidualAdd(nn.Module):
    """The junction of a residual block as a module, so that it has a name in the model.

    Args:
        relu: whether to take the positive part of the sum.

    Example:
        >>> import torch
        >>> join = ResidualAdd(relu=True)
        >>> join(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
        >>> join
        ResidualAdd(relu=True)
    """

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Joins shortcut and branch.

        Args:
            x: what passes by the shortcut, any shape and strided layout.
            f: what comes out of the branch, of the same shape.

        Returns:
            `x + f`, or `torch.relu(x + f)`.

        Raises:
            ArgumentError: as `gradprobe.residual_add` raises it.

        Example:
            >>> import torch
            >>> ResidualAdd()(torch.tensor([1.0]), torch.tensor([2.0]))
            tensor([3.])
        """
        return residual_add(x, f, self.relu)

    def extra_repr(self) -> str:
        """Says whether there is a ReLU.

        Returns:
            The argument of the constructor.

        Example:
            >>> ResidualAdd().extra_repr()
            'relu=False'
        """
        return f"relu={self.relu}"
