"""Reverse-mode derivatives of the residual operators.

`torch.library.register_autograd` doubles the cost of a call (25 µs more for forward and backward) and returns zero for
every forward-mode derivative (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def autograd_kernel(operator: Any, function: Any, mask: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a residual operator's kernel for the Autograd key.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule: `ResidualSum` or `ReluMask`.
        mask: `residual_add_backward.default` of the operator's namespace.
        composite: Computes the same result in forward mode, from torch operators that support it, or refuses.

    Example:
        >>> add, mask = torch.ops.gradprobe.residual_add.default, torch.ops.gradprobe.residual_add_backward.default
        >>> autograd_kernel(add, ResidualSum, mask, torch.add)(torch.tensor([1.0]), torch.tensor([2.0]), False)
        tensor([3.])
    """

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            return composite(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(operator, mask, *arguments)
        return _below_autograd(operator, *arguments)

    return kernel


class ResidualSum(_SingleLevelFunction):
    """Differentiates x, f, relu -> y, or y and its row."""

    @staticmethod
    def forward(ctx: Any, operator: Any, mask: Any, x: Tensor, f: Tensor, relu: bool) -> Any:
        """Computes y, and its row if the operator does."""
        output = _call(ctx, operator, mask, x, f, relu)
        if relu:
            ctx.save_for_backward(output if isinstance(output, Tensor) else output[0])
        return output

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        """Returns one gradient for x and f."""
        grad_x = _masked(ctx, grad_y)
        # One tensor serves both operands: autograd copies a gradient that it does not own before adding to it.
        return None, None, grad_x, grad_x, None


class ReluMask(_SingleLevelFunction):
    """Differentiates grad_y, y -> grad_x, or grad_x and both rows: linear in grad_y, and zero with respect to y."""

    @staticmethod
    def forward(ctx: Any, operator: Any, mask: Any, grad_y: Tensor, y: Tensor | None) -> Any:
        """Computes grad_x, and both rows if the operator does."""
        output = _call(ctx, operator, mask, grad_y, y)
        if y is not None:
            ctx.save_for_backward(y)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        """Masks the gradient again."""
        return None, None, _masked(ctx, grad), None


def _call(ctx: Any, operator: Any, mask: Any, *arguments: Any) -> Any:
    """Calls the operator; marks the rows in its output, if any, as not differentiable."""
    ctx.mask = mask
    ctx.set_materialize_grads(False)
    output = _below_autograd(operator, *arguments)
    if not isinstance(output, Tensor):
        ctx.mark_non_differentiable(output[1])
    return output


def _masked(ctx: Any, grad: Tensor | None) -> Any:
    """Masks a gradient by the ReLU of the saved y, if there is one."""
    saved = ctx.saved_tensors
    if not saved or grad is None:
        return grad
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return ctx.mask(grad, *saved)
    return _below_autograd(ctx.mask, grad, *saved)


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator without recording it for autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
