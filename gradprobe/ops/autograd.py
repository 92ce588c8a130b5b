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


def autograd_kernel(operator: Any, function: Any, gradient: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Builds an operator's kernel for the Autograd key.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule: `ResidualSum` or `Normalised`.
        gradient: Computes the gradients for the rule: `masked_by(residual_add_backward.default)`, or
            `batch_norm_relu_backward.default` for `Normalised`.
        composite: Computes the same result in forward mode, from torch operators that support it, or refuses.

    Example:
        >>> add, mask = torch.ops.gradprobe.residual_add.default, torch.ops.gradprobe.residual_add_backward.default
        >>> kernel = autograd_kernel(add, ResidualSum, masked_by(mask), torch.add)
        >>> kernel(torch.tensor([1.0]), torch.tensor([2.0]), False)
        tensor([3.])
    """

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            return composite(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(operator, gradient, *arguments)
        return _below_autograd(operator, *arguments)

    return kernel


def backward_kernel(operator: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Builds the kernel of an operator that computes gradients for the Autograd key.

    Args:
        operator: The operator.
        composite: Computes the same from torch operators, under `create_graph` and in forward mode.

    Example:
        >>> mask, threshold = torch.ops.gradprobe.residual_add_backward.default, torch.ops.aten.threshold_backward
        >>> kernel = backward_kernel(mask, lambda grad_y, y: threshold(grad_y, y, 0))
        >>> kernel(torch.tensor([2.0], requires_grad=True), torch.tensor([3.0]))
        tensor([2.], grad_fn=<ThresholdBackwardBackward0>)
    """

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return composite(*arguments)
        return _below_autograd(operator, *arguments)

    return kernel


def masked_by(mask: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Builds the gradient of a residual add from the operator that applies the mask of its ReLU."""

    def gradient(grad_y: Tensor, *y: Tensor) -> Tensor:
        return mask(grad_y, *y) if y else grad_y

    return gradient


def residual_sum(
    add: Callable[[Tensor, Tensor, bool], Tensor], gradient: Callable[..., Tensor], x: Tensor, f: Tensor, relu: bool
) -> Tensor:
    """Computes a residual add by functions of the caller, which may measure, and records it for autograd.

    Args:
        add: Computes y from x, f and relu.
        gradient: Computes the gradient of x and f from grad_y and, if there is a ReLU, y.
        x: The shortcut.
        f: The result of the branch, with the shape and dtype of x.
        relu: Whether there is a ReLU.

    Returns:
        y.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> residual_sum(lambda x, f, relu: x + f, lambda grad_y: 3 * grad_y, x, x, False).sum().backward()
        >>> x.grad
        tensor([6., 6.])
    """
    y: Tensor = ResidualSum.apply(add, gradient, x, f, relu)  # type: ignore[attr-defined]
    return y


class ResidualSum(_SingleLevelFunction):
    """Differentiates x, f, relu -> y, or y and its row."""

    @staticmethod
    def forward(
        ctx: Any, add: Callable[..., Any], gradient: Callable[..., Tensor], x: Tensor, f: Tensor, relu: bool
    ) -> Any:
        """Computes y, and its row if `add` does."""
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        output = _below_autograd(add, x, f, relu)
        y, *rows = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*rows)
        ctx.save_for_backward(*([y] if relu else []))
        return output

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
        """Returns one gradient for x and f."""
        grad_x = None if grad_y is None else ctx.gradient(grad_y, *ctx.saved_tensors)
        # One tensor serves both operands: autograd copies a gradient that it does not own before adding to it.
        return None, None, grad_x, grad_x, None


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
        grad_x, grad_masked, *others = ctx.gradients(grad_y, y[0] if y else None, x, weight, saved, masked)
        grad_shortcut = grad_masked if masked else grad_y if ctx.adds else None
        return None, None, grad_x, grad_shortcut, *others, None, None, None, None, None


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator without recording it for autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
