# torch.autograd.forward_ad is untyped.
# mypy: disable-error-code="no-untyped-call"
"""Derivatives of our operators as autograd asks for them: in a network's blocks, cheaply; under `torch.func`, rightly.

`torch.library.register_autograd` costs twice as much for each call (25 µs more there and back), refuses
`torch.func.grad` and gives zero for every derivative in forward mode (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad


def autograd_kernel(operator: Any, function: Any, composite: Callable[..., Tensor] | None) -> Callable[..., Any]:
    """Makes the kernel of an operator for the Autograd key.

    Args:
        operator: what is to be differentiated.
        function: its rule in reverse mode, a `torch.autograd.function._SingleLevelFunction` that takes the operator
            before its arguments and calls it by `below_autograd`.
        composite: the same result by operators of torch that know forward mode; None where there is no such thing, and
            forward mode is refused.

    Returns:
        What to register, with `torch.library.Library.impl`.

    Example:
        >>> from torch.autograd.function import _SingleLevelFunction
        >>> autograd_kernel(torch.ops.aten.neg.default, _SingleLevelFunction, None)(torch.tensor([1.0]))
        tensor([-1.])
    """

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(argument) for argument in arguments):
            if composite is None:
                raise NotImplementedError(f"{operator} has no derivative in forward mode")
            return composite(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if peek_interpreter_stack() is None:
                return function.apply(operator, *arguments)
            with enable_single_level_autograd_function():  # one level of torch.func
                return function.apply(_for_the_next_level(operator), *arguments)
        return below_autograd(operator, *arguments)

    return kernel


def _for_the_next_level(operator: Any) -> Callable[..., Any]:
    """An operator that is differentiated around a function of autograd too, which turns that off while it runs."""

    def call(*arguments: Any) -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator(*arguments)

    return call


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def in_backward(operator: Any, *arguments: Any) -> Any:
    """Calls an operator in a backward pass, past autograd where nobody wants its derivative.

    Args:
        operator: an overload of an operator.
        arguments: its arguments.

    Returns:
        Its result.

    Example:
        >>> in_backward(torch.ops.aten.neg.default, torch.tensor([1.0]))
        tensor([-1.])
    """
    if torch.is_grad_enabled() or peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return operator(*arguments)
    return below_autograd(operator, *arguments)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator without recording it for autograd.

    Args:
        operator: an overload of an operator, or what `autograd_kernel` hands on in its place.
        arguments: its arguments.

    Returns:
        Its result.

    Example:
        >>> below_autograd(torch.ops.aten.neg.default, torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
