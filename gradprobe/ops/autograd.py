"""Reverse-mode derivatives of the residual and the batch normalisation operators.

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

from gradprobe.ops import batch_norm_reference


def autograd_kernel(operator: Any, function: Any, mask: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Builds an operator's kernel for the Autograd key.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule: `ResidualSum`, `ReluMask` or `Normalised`.
        mask: The operator that the rule calls, of the same namespace: `residual_add_backward.default`, or
            `batch_norm_relu_backward.default` for `Normalised`.
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


class Normalised(_SingleLevelFunction):
    """Differentiates batch_norm_relu."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, gradients: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Computes y and saved."""
        ctx.gradients, ctx.adds = gradients, shortcut is not None
        ctx.set_materialize_grads(False)
        y, saved = _below_autograd(operator, x, shortcut, weight, *rest)
        relu = rest[-1]
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(x, weight, saved, *([y] if relu else []))
        return y, saved

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        """Returns the gradients of x, shortcut, weight and bias."""
        if grad_y is None:
            return (None,) * 11
        x, weight, saved, *y = ctx.saved_tensors
        masked = ctx.adds and bool(y)
        arguments = (grad_y, y[0] if y else None, x, weight, saved, masked)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            grad_x, grad_masked, *others = batch_norm_reference.composite_backward(*arguments)
        else:
            grad_x, grad_masked, *others = _below_autograd(ctx.gradients, *arguments)
        grad_shortcut = grad_masked if masked else grad_y if ctx.adds else None
        return None, None, grad_x, grad_shortcut, *others, None, None, None, None, None


def differentiable_gradients(operator: Any) -> Callable[..., Any]:
    """Builds the kernel of `batch_norm_relu_backward` for the Autograd key, which records torch's own operators."""

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return batch_norm_reference.composite_backward(*arguments)
        return _below_autograd(operator, *arguments)

    return kernel


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
