"""Batch normalisation that can also add a shortcut and apply a ReLU in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gradprobe.ops import libraries

__all__ = ["BatchNorm2d"]


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a faster kernel for training on the CPU.

    The kernel takes channels-last float32 and bfloat16 tensors; torch's own computes everything else. Its results are
    the same for any number of threads, and whether or not the ReLU and the residual add are part of the call.

    Example:
        >>> x = torch.randn(8, 16, 4, 4).contiguous(memory_format=torch.channels_last)
        >>> norm = BatchNorm2d(16)
        >>> fused = norm.in_one_pass(x, relu=True)
        >>> fused is None or torch.equal(fused, torch.relu(norm(x)))
        True
    """

    def forward(self, input: Tensor) -> Tensor:  # as torch names it
        """Normalises a tensor [N, C, H, W].

        Args:
            input: The tensor.

        Returns:
            A tensor of the same shape.

        Example:
            >>> BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
            torch.Size([2, 3, 4, 4])
        """
        normalised = self.in_one_pass(input)
        return super().forward(input) if normalised is None else normalised

    def in_one_pass(self, x: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor | None:
        """Computes `self(x)`, adds the shortcut and applies the ReLU in one pass. Runs none of the module's hooks.

        Args:
            x: The tensor to normalise, [N, C, H, W].
            shortcut: The tensor to add, of the same shape and dtype, or None.
            relu: Whether to apply a ReLU.

        Returns:
            The result, with the same bits as in separate steps; None, and does nothing, if the kernel cannot compute it
            or the module is in evaluation mode.

        Example:
            >>> BatchNorm2d(3).eval().in_one_pass(torch.ones(2, 3, 4, 4)) is None
            True
        """
        is_plain = self.training and self.track_running_stats and self.momentum is not None
        if not is_plain or torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() != 4:
            return None
        hooks, _ = libraries.native_hooks()
        if hooks is None:
            return None
        y: Tensor | None = hooks.batch_norm_relu(
            x, shortcut, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, relu
        )
        if y is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return y


def calls_are_watched(*modules: nn.Module) -> bool:
    """Returns whether a hook waits for a call of one of the modules, which then must not be left out.

    Example:
        >>> norm = BatchNorm2d(3)
        >>> calls_are_watched(norm)
        False
        >>> _ = norm.register_forward_hook(print)
        >>> calls_are_watched(norm)
        True
    """
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )
