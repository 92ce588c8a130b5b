"""The residual junction as one pass each way: y = x + f or max(x + f, 0), and one gradient for both branches.

`torch.ops.gradprobe.residual_add` and the operators beside it are functions, but for `residual_add_`: they write to no
argument and return no view of one. All want operands of one shape, one device and one dtype of float16, bfloat16,
float32 or float64; `residual_add` and `residual_add_` are the public functions, which promote dtypes.

    residual_add(x, f, relu) -> y
    residual_add_(x, f, relu) -> ()                              y into x
    residual_add_backward(grad_y, y) -> grad_x                   grad_y where y > 0 or y is NaN, else 0
    residual_add_stats(x, f, relu) -> y, rows [1, 6]             raw row of y
    residual_add_backward_stats(grad_y, y) -> grad_x, rows [2, 6]     raw rows of grad_y and of grad_x
    residual_branch_stats(branch, shortcut) -> rows [2, 6]       raw row of the branch's part; sum of branch * shortcut

Without a ReLU there is nothing to mask: `residual_add_backward_stats(grad_y, None)` gives a copy of `grad_y`, since an
operator may not return its own argument. Where only the numbers are wanted, `grad_stats` of `grad_y` saves the copy.

`residual_branch_stats` takes the two parts of the gradient at x. Its second row is of no tensor: the sum of products
stands in the column of squares, scaled by the range of the magnitude beside it as a sum of squares is. On the CPU the
products of float32 and less are added in float32 where that holds them: the sum errs by at most 1.8e-6 of the sum of
their magnitudes.

`residual_add_` reads `f` as it was before the call, whatever memory it shares with `x`: where that is not element for
element, `f` is copied first. There is no such operator for the way back: autograd forbids a node to write to the
gradient that comes in, which others may hold.

Results of `residual_add` have the strides that torch's own add gives; gradients have those of `torch.empty_like(y)`.
Values follow the caller's `torch.set_flush_denormal`, as torch's do; statistics count subnormal numbers in either mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from gradprobe.errors import ArgumentError
from gradprobe.ops import libraries
from gradprobe.ops import residual_reference as kernels
from gradprobe.ops.autograd import (
    autograd_kernel,
    below_autograd,
    count_writes,
    in_backward,
    in_place_autograd_kernel,
    overwrite,
)
from gradprobe.ops.reference import FLOAT_DTYPES, check_no_overlap

SCHEMAS = (
    "residual_add(Tensor x, Tensor f, bool relu) -> Tensor",
    "residual_add_(Tensor(a!) x, Tensor f, bool relu) -> ()",
    "residual_add_backward(Tensor grad_y, Tensor y) -> Tensor",
    "residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)",
    "residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)",
    "residual_branch_stats(Tensor branch, Tensor shortcut) -> Tensor",
)


def register(library: torch.library.Library) -> None:
    """Gives the operators of a library all but their kernels for a device: fakes, autograd, vmap, plain torch.

    Args:
        library: defines `SCHEMAS`.

    Example:
        >>> library = torch.library.Library("gradprobe_example_residual", "DEF")
        >>> for schema in SCHEMAS:
        ...     _ = library.define(schema)
        >>> register(library)
    """
    namespace = library.ns
    operators = getattr(torch.ops, namespace)
    add = operators.residual_add.default
    in_place = operators.residual_add_.default
    mask = operators.residual_add_backward.default

    class Junction(_SingleLevelFunction):
        """x, f, relu -> y, and whatever the operator returns beside it."""

        @staticmethod
        def forward(ctx: Any, operator: Any, x: Tensor, f: Tensor, relu: bool) -> Any:
            output = below_autograd(operator, x, f, relu)
            y = _first_alone_differentiable(ctx, output)
            if relu:
                ctx.save_for_backward(y)
            return output

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> Any:
            saved = ctx.saved_tensors
            grad_x = in_backward(mask, grad_y, *saved) if saved and grad_y is not None else grad_y
            # One tensor serves both branches: autograd copies before it adds to what it does not own.
            return None, grad_x, grad_x, None

    class JunctionInPlace(Junction):
        """x, f, relu -> x, overwritten."""

        @staticmethod
        def forward(ctx: Any, operator: Any, x: Tensor, f: Tensor, relu: bool) -> Tensor:
            overwrite(operator, x, f, relu)
            ctx.mark_dirty(x)
            ctx.set_materialize_grads(False)
            if relu:
                ctx.save_for_backward(x)
            return x

    class Mask(_SingleLevelFunction):
        """grad_y, y -> grad_x, and whatever the operator returns beside it."""

        @staticmethod
        def forward(ctx: Any, operator: Any, grad_y: Tensor, y: Tensor | None) -> Any:
            output = below_autograd(operator, grad_y, y)
            _first_alone_differentiable(ctx, output)
            if y is not None:
                ctx.save_for_backward(y)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
            # Linear in grad_y, with the same mask; y only says where.
            saved = ctx.saved_tensors
            return None, in_backward(mask, grad, *saved) if saved and grad is not None else grad, None

    def batched_add(info: Any, in_dims: tuple[int | None, ...], x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, int]:
        return add(*_batches_first(info.batch_size, in_dims, x, f), relu), 0

    def batched_add_in_place(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, f: Tensor, relu: bool
    ) -> tuple[None, None]:
        if in_dims[0] is None:
            raise ArgumentError(
                "x: needed a tensor of the same torch.vmap as f, to hold a result of each, got one for all"
            )
        in_place(*_batches_first(info.batch_size, in_dims, x, f), relu)
        return None, None

    def batched_mask(info: Any, in_dims: tuple[int | None, ...], grad_y: Tensor, y: Tensor) -> tuple[Tensor, int]:
        return mask(*_batches_first(info.batch_size, in_dims, grad_y, y)), 0

    def batched_stats(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> None:
        raise NotImplementedError("the statistics of a residual junction are of whole tensors: not under torch.vmap")

    for name, kernel, fake, function, batched, composite in (
        ("residual_add", kernels.add, kernels.fake_add, Junction, batched_add, kernels.sum_of),
        ("residual_add_backward", kernels.backward, kernels.fake_backward, Mask, batched_mask, kernels.composite_mask),
        ("residual_add_stats", kernels.add_stats, kernels.fake_add_stats, Junction, batched_stats, None),
        ("residual_add_backward_stats", kernels.backward_stats, kernels.fake_backward_stats, Mask, batched_stats, None),
    ):
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        torch.library.register_vmap(qualified, batched, lib=library)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        library.impl(name, autograd_kernel(getattr(operators, name).default, function, composite), "Autograd")

    qualified = f"{namespace}::residual_branch_stats"
    torch.library.register_fake(qualified, kernels.fake_branch_stats, lib=library)
    torch.library.register_vmap(qualified, batched_stats, lib=library)
    library.impl("residual_branch_stats", kernels.branch_stats, "CompositeExplicitAutograd")
    library.impl("residual_branch_stats", torch.library.fallthrough_kernel, "Autograd")  # a measurement

    qualified = f"{namespace}::residual_add_"
    torch.library.register_fake(qualified, kernels.fake_add_in_place, lib=library)
    torch.library.register_vmap(qualified, batched_add_in_place, lib=library)
    library.impl("residual_add_", kernels.add_in_place, "CompositeExplicitAutograd")
    library.impl("residual_add_", in_place_autograd_kernel(in_place, JunctionInPlace, add), "Autograd")
    count_writes(library, "residual_add_")


def _first_alone_differentiable(ctx: Any, output: Any) -> Tensor:
    """Marks the rows beside a result as numbers without a derivative, and returns the result."""
    ctx.set_materialize_grads(False)
    if isinstance(output, Tensor):
        return output
    ctx.mark_non_differentiable(output[1])
    first: Tensor = output[0]
    return first


def _batches_first(batch_size: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Brings the batch dimension of each tensor to the front; one without is repeated along it."""
    return [
        tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for dim, tensor in zip(in_dims, tensors, strict=False)
    ]


_library = torch.library.Library("gradprobe", "FRAGMENT")
for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
register(_library)
libraries.parts()  # the kernels of the compiled part, if there is one, take the place of the reference

RESIDUAL_ADD: Callable[[Tensor, Tensor, bool], Tensor] = torch.ops.gradprobe.residual_add.default
RESIDUAL_ADD_STATS: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]] = (
    torch.ops.gradprobe.residual_add_stats.default
)
RESIDUAL_ADD_BACKWARD_STATS: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] = (
    torch.ops.gradprobe.residual_add_backward_stats.default
)
RESIDUAL_BRANCH_STATS: Callable[[Tensor, Tensor], Tensor] = torch.ops.gradprobe.residual_branch_stats.default
RESIDUAL_ADD_: Callable[[Tensor, Tensor, bool], None] = torch.ops.gradprobe.residual_add_.default


def residual_add(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    """Joins the shortcut and the branch of a residual block in one pass: `x + f`, or `torch.relu(x + f)`.

    The same values as those expressions of torch, bit for bit. The result and the gradient, which is one tensor for
    both branches, are each written once. Works under `torch.compile` without a graph break and under `torch.func`, for
    derivatives of any order; those in forward mode are computed by torch's own operators.

    Args:
        x: what passes by the shortcut, any shape and strided layout.
        f: what comes out of the branch, of the same shape and on the same device. Dtypes promote as `x + f` does.
        relu: whether to take the positive part, where NaN stays NaN.

    Returns:
        The sum, of the same shape, with the strides that `x + f` has.

    Raises:
        ArgumentError: other than two strided tensors of one shape (nothing is broadcast) on one device; complex or
            boolean ones with `relu`. The message names the argument and what came.

    Source: the junction of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), eq. 1.

    Example:
        >>> x = torch.tensor([1.0, -3.0], requires_grad=True)
        >>> y = residual_add(x, torch.tensor([1.0, 2.0]), relu=True)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([2.0, 0.0], [1.0, 0.0])
    """
    if not torch.compiler.is_compiling():
        hooks, _ = libraries.native_hooks()
        joined: Tensor | None = None if hooks is None else hooks.residual_add(x, f, relu)
        if joined is not None:  # else an operator has to see the call
            return joined
    _check_arguments(x, f)
    if x.dtype != f.dtype:
        dtype = torch.promote_types(x.dtype, f.dtype)
        x, f = x.to(dtype), f.to(dtype)
    if x.dtype in FLOAT_DTYPES:
        return RESIDUAL_ADD(x, f, relu)
    _check_relu(relu, x.dtype)
    return kernels.sum_of(x, f, relu)


def residual_add_(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    """Joins the shortcut and the branch of a residual block in place: `x.add_(f)`, or `x.add_(f).relu_()`, in one pass.

    The same values as those expressions of torch, bit for bit, and autograd refuses it where it refuses them: `x` may
    be no leaf that requires grad, and what was saved for a backward pass may not be overwritten. In a residual block
    that is mostly the shortcut, which the first convolution of the branch has saved, while the branch's result is free:
    `residual_add_(branch, shortcut)`.

    Args:
        x: what is overwritten, any shape and strided layout in which no two elements share memory.
        f: what is added, of the same shape and on the same device; may be `x` itself or share memory with it, and is
            read as it was before the call. Its dtype is one that `x` can take in, as in `x.add_(f)`.
        relu: whether to take the positive part, where NaN stays NaN.

    Returns:
        `x`.

    Raises:
        ArgumentError: other than two strided tensors of one shape (nothing is broadcast) on one device; an `x` that is
            expanded; an `f` of a dtype that `x` cannot take in; complex or boolean ones with `relu`. The message names
            the argument and what came.
        RuntimeError: torch's own, where autograd forbids to write to `x`.

    Source: the junction of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), eq. 1.

    Example:
        >>> x = torch.tensor([1.0, -3.0])
        >>> residual_add_(x, torch.tensor([1.0, 2.0]), relu=True) is x
        True
        >>> x
        tensor([2., 0.])
    """
    _check_arguments(x, f)
    dtype = torch.promote_types(x.dtype, f.dtype)
    if _kind(dtype) > _kind(x.dtype):
        of_x, of_f = kernels.name_of(x.dtype), kernels.name_of(f.dtype)
        raise ArgumentError(f"f: needed a dtype that can be added to {of_x} in place, got {of_f}")
    if not x.is_contiguous():
        check_no_overlap(x, "x")
    if x.dtype in FLOAT_DTYPES and dtype == x.dtype:
        RESIDUAL_ADD_(x, f.to(dtype), relu)
        return x
    _check_relu(relu, x.dtype)
    # Sums of a wider f are rounded once, to x's dtype, by torch alone.
    x.add_(f)
    return x.relu_() if relu else x


def _check_arguments(x: Tensor, f: Tensor) -> None:
    for name, tensor in (("x", x), ("f", f)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: needed a Tensor, got {type(tensor).__name__}")
    kernels.check_pair(x, f, "x", "f")


def _kind(dtype: torch.dtype) -> int:
    """Boolean, integer, real or complex, in the order in which no dtype takes in the next (`torch.can_cast`)."""
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _check_relu(relu: bool, dtype: torch.dtype) -> None:
    if relu and (dtype.is_complex or dtype == torch.bool):
        raise ArgumentError(f"relu: needed False for a sum of dtype {kernels.name_of(dtype)}, got True")
