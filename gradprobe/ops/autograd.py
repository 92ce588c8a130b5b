"""Derivatives of our operators as autograd asks for them: in a network's blocks, cheaply; under `torch.func`, rightly.

`torch.library.register_autograd` costs twice as much for each call (25 µs more there and back), refuses
`torch.func.grad` and gives zero for every derivative in forward mode (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter


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


def in_place_autograd_kernel(operator: Any, function: Any, functional: Callable[..., Tensor]) -> Callable[..., None]:
    """Makes the kernel for the Autograd key of an operator that overwrites its first argument and returns nothing.

    Args:
        operator: what is to be differentiated.
        function: its rule in reverse mode, as for `autograd_kernel`; marks the first argument as dirty and returns it.
        functional: the same result in a new tensor, differentiable. Where the first argument is a view, or has hooks,
            or a transform is at work, that is computed and copied into it: by torch's own copy, which knows the rules.
            Likewise for a negative view, which torch resolves only for operators that return what they overwrite.

    Returns:
        What to register, with `torch.library.Library.impl`.

    Example:
        >>> from torch.autograd.function import _SingleLevelFunction
        >>> x = torch.tensor([1.0])
        >>> in_place_autograd_kernel(torch.ops.aten.neg_.default, _SingleLevelFunction, torch.neg)(x)
        >>> x
        tensor([-1.])
    """

    def kernel(written: Tensor, *arguments: Any) -> None:
        transformed = forward_ad._current_level >= 0 and any(map(_has_tangent, (written, *arguments)))
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(written, *arguments)
        simple = not recorded or (_is_plain(written) and peek_interpreter_stack() is None)
        if transformed or not simple or written.is_neg():
            written.copy_(functional(written, *arguments))
        elif not recorded:
            overwrite(operator, written, *arguments)
        elif written.requires_grad and written.is_leaf:  # autograd itself would notice when it has been overwritten
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        else:
            function.apply(operator, written, *arguments)

    return kernel


def _is_plain(tensor: Tensor) -> bool:
    """Whether a function of autograd may overwrite the tensor with all that follows from it for others."""
    return (
        type(tensor) in (Tensor, Parameter)
        and not tensor._is_view()
        and not tensor._backward_hooks
        and not tensor.retains_grad
    )


def count_writes(library: torch.library.Library, name: str) -> None:
    """Makes an operator tell autograd that it has written to its first argument, a tensor or a list of them.

    A kernel of the stable ABI cannot.

    Args:
        library: where the operator is defined.
        name: the operator's, in that library.

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
        _count_write(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *arguments)

    library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


def overwrite(operator: Any, written: Tensor, *arguments: Any) -> None:
    """Calls an operator that writes to its first argument, without recording it for autograd.

    Past the kernel that `count_writes` makes, which costs as much again.

    Args:
        operator: an overload of an operator.
        written: its first argument.
        arguments: the others.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> overwrite(torch.ops.aten.neg_.default, x)
        >>> x.detach(), x._version
        (tensor([-1.]), 1)
    """
    _count_write(written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        operator(written, *arguments)


def _count_write(written: Tensor | Sequence[Tensor]) -> None:
    if isinstance(written, Tensor) and written.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
    increment_version(written)


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
