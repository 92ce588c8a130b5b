"""Derivatives of the operators: cheap in plain training, correct under `torch.func`.

`torch.library.register_autograd` doubles the cost of a call (25 µs more for forward and backward), refuses
`torch.func.grad` and returns zero for every forward-mode derivative (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version
from torch.nn import Parameter


def autograd_kernel(operator: Any, function: Any, composite: Callable[..., Tensor] | None) -> Callable[..., Any]:
    """Builds an operator's kernel for the Autograd key.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule, a `torch.autograd.function._SingleLevelFunction` that takes the operator as
            first argument and calls it with `below_autograd`.
        composite: Computes the same result from torch operators that support forward mode; None to refuse forward mode.

    Returns:
        The kernel, for `torch.library.Library.impl`.

    Example:
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
                return function.apply(_for_next_level(operator), *arguments)
        return below_autograd(operator, *arguments)

    return kernel


def in_place_autograd_kernel(operator: Any, function: Any, functional: Callable[..., Tensor]) -> Callable[..., None]:
    """Builds the Autograd kernel of an operator that overwrites its first argument and returns nothing.

    Args:
        operator: The operator to differentiate.
        function: Its reverse-mode rule, as for `autograd_kernel`; marks the first argument as dirty and returns it.
        functional: Computes the same result into a new tensor, differentiably. If the first argument is a view or has
            hooks, or a transform is active, this result is copied into it, since `copy_` handles all of these. Also for
            a negative view, which torch resolves only for operators that return the tensor they overwrite.

    Returns:
        The kernel, for `torch.library.Library.impl`.

    Example:
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
        elif written.requires_grad and written.is_leaf:  # autograd would notice only after the write
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        else:
            function.apply(operator, written, *arguments)

    return kernel


def residual_functions(mask: Any) -> tuple[type, type, type]:
    """Builds the reverse-mode rules of the residual operators of one namespace.

    Args:
        mask: The overload `residual_add_backward.default` of that namespace.

    Returns:
        The rules of `residual_add`, of `residual_add_` and of `residual_add_backward`, for `autograd_kernel`. They also
        serve the variants that return statistics.
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

    class ResidualSumInPlace(ResidualSum):
        """x, f, relu -> x, overwritten."""

        @staticmethod
        def forward(ctx: Any, operator: Any, x: Tensor, f: Tensor, relu: bool) -> Tensor:
            overwrite(operator, x, f, relu)
            ctx.mark_dirty(x)
            ctx.set_materialize_grads(False)
            if relu:
                ctx.save_for_backward(x)
            return x

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

    return ResidualSum, ResidualSumInPlace, ReluMask


def _only_first_differentiable(ctx: Any, output: Any) -> Tensor:
    """Marks the rows that follow a result as not differentiable, and returns the result."""
    ctx.set_materialize_grads(False)
    if isinstance(output, Tensor):
        return output
    ctx.mark_non_differentiable(output[1])
    first: Tensor = output[0]
    return first


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether an autograd function may overwrite the tensor without side effects on views or hooks."""
    return (
        type(tensor) in (Tensor, Parameter)
        and not tensor._is_view()
        and not tensor._backward_hooks
        and not tensor.retains_grad
    )


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
        _count_write(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *arguments)

    library.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


def overwrite(operator: Any, written: Tensor, *arguments: Any) -> None:
    """Calls an operator that writes to its first argument, without recording the call for autograd.

    Bypasses the kernel of `count_writes`, which would double the overhead.

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


def _for_next_level(operator: Any) -> Callable[..., Any]:
    """Wraps an operator so that outer transforms differentiate it: an autograd function disables gradients inside."""

    def call(*arguments: Any) -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return operator(*arguments)

    return call


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def in_backward(operator: Any, *arguments: Any) -> Any:
    """Calls an operator in a backward pass, skipping autograd unless a further derivative is wanted.

    Example:
        >>> in_backward(torch.ops.aten.neg.default, torch.tensor([1.0]))
        tensor([-1.])
    """
    if torch.is_grad_enabled() or peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return operator(*arguments)
    return below_autograd(operator, *arguments)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator, or the callable that `autograd_kernel` passes instead, without recording it for autograd.

    Example:
        >>> below_autograd(torch.ops.aten.neg.default, torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
