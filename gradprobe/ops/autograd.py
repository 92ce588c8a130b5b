"""Derivatives of the operators in reverse mode, and the writes that autograd must know of.

`torch.library.register_autograd` doubles the cost of a call (25 µs more for forward and backward) and returns zero for
every forward-mode derivative (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version


def autograd_kernel(operator: Any, function: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Builds an operator's kernel for the Autograd key.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule, a `torch.autograd.function._SingleLevelFunction` that takes the operator as
            first argument and calls it with `below_autograd`.
        composite: Computes the same result in forward mode, from torch operators that support it, or refuses.

    Returns:
        The kernel, for `torch.library.Library.impl`.

    Example:
        >>> autograd_kernel(torch.ops.aten.neg.default, _SingleLevelFunction, torch.neg)(torch.tensor([1.0]))
        tensor([-1.])
    """

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(argument) for argument in arguments):
            return composite(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(operator, *arguments)
        return below_autograd(operator, *arguments)

    return kernel


def residual_functions(mask: Any) -> tuple[type, type]:
    """Builds the reverse-mode rules of the residual operators of one namespace.

    Args:
        mask: The overload `residual_add_backward.default` of that namespace.

    Returns:
        The rules of `residual_add` and of `residual_add_backward`, for `autograd_kernel`. They also serve the variants
        that return statistics.
    """

    class ResidualSum(_SingleLevelFunction):
        """x, f, relu -> y; a variant's rows follow y."""

        @staticmethod
        def forward(ctx: Any, operator: Any, x: Tensor, f: Tensor, relu: bool) -> Any:
            output = below_autograd(operator, x, f, relu)
            y = _only_first_differentiable(ctx, output)
            if relu:
                ctx.save_for_backward(y)
            return output

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
            saved = ctx.saved_tensors
            grad_x = in_backward(mask, grad_y, *saved) if saved and grad_y is not None else grad_y
            # One tensor serves both operands: autograd copies a gradient that it does not own before adding to it.
            return None, grad_x, grad_x, None

    class ReluMask(_SingleLevelFunction):
        """grad_y, y -> grad_x; a variant's rows follow grad_x."""

        @staticmethod
        def forward(ctx: Any, operator: Any, grad_y: Tensor, y: Tensor | None) -> Any:
            output = below_autograd(operator, grad_y, y)
            _only_first_differentiable(ctx, output)
            if y is not None:
                ctx.save_for_backward(y)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
            # Linear in grad_y with the same mask; the derivative with respect to y is zero.
            saved = ctx.saved_tensors
            return None, in_backward(mask, grad, *saved) if saved and grad is not None else grad, None

    return ResidualSum, ReluMask


def _only_first_differentiable(ctx: Any, output: Any) -> Tensor:
    """Marks the rows that follow a result as not differentiable, and returns the result."""
    ctx.set_materialize_grads(False)
    if isinstance(output, Tensor):
        return output
    ctx.mark_non_differentiable(output[1])
    first: Tensor = output[0]
    return first


def count_writes(library: torch.library.Library, name: str) -> None:
    """Makes an operator increment the version of its first argument, a tensor or a list of tensors.

    A kernel of the stable ABI cannot do this itself. `library` must define the operator.

    Example:
        >>> library = torch.library.Library("gradprobe_example_writes", "DEF")
        >>> _ = library.define("clear_(Tensor(a!) x) -> ()")
        >>> library.impl("clear_", lambda x: None, "CompositeExplicitAutograd")
        >>> count_writes(library, "clear_")
        >>> x = torch.ones(1)
        >>> torch.ops.gradprobe_example_writes.clear_(x)
        >>> x._version
        1
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def kernel(keyset: torch._C.DispatchKeySet, written: Tensor | Sequence[Tensor], *arguments: Any) -> None:
        increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *arguments)

    library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def in_backward(operator: Any, *arguments: Any) -> Any:
    """Calls an operator in a backward pass, skipping autograd unless a further derivative is wanted.

    Example:
        >>> in_backward(torch.ops.aten.neg.default, torch.tensor([1.0]))
        tensor([-1.])
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return operator(*arguments)
    return below_autograd(operator, *arguments)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator without recording it for autograd.

    Example:
        >>> below_autograd(torch.ops.aten.neg.default, torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
