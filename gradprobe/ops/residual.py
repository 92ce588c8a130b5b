"""Residual adds in one pass each way: y = x + f or max(x + f, 0), and one gradient for both operands.

The operators take operands of one shape, one device and one dtype of float16, bfloat16, float32 or float64:

    residual_add(x, f, relu) -> y
    residual_add_backward(grad_y, y) -> grad_x                   grad_y where y > 0 or y is NaN, else 0
    residual_add_stats(x, f, relu) -> y, rows [1, 6]             raw row of y
    residual_add_backward_stats(grad_y, y) -> grad_x, rows [2, 6]     raw rows of grad_y and grad_x
    residual_branch_stats(branch, shortcut) -> rows [2, 6]       raw row of branch; sum of branch * shortcut

If there is no ReLU, `residual_add_backward_stats(grad_y, None)` returns a copy of `grad_y`, since an operator may not
return its argument. The backward never writes to the incoming gradient: autograd forbids it.

`residual_branch_stats` takes the two parts of the gradient at x. Its second row holds the sum of products in the column
`sum_sq`, and in `abs_max` a magnitude whose range exponent scales that sum as it scales a sum of squares. The CPU
kernel adds products of float32 and narrower dtypes in float32 if the sum fits: its error is at most 1.8e-6 of the sum
of their magnitudes.

Results of `residual_add` have the strides of torch's own add, gradients those of `torch.empty_like(y)`. Values follow
the caller's `torch.set_flush_denormal`, as torch's do; statistics count subnormal numbers in either mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops import libraries
from gradprobe.ops.dispatch import resolve
from gradprobe.ops.reference import FLOAT_DTYPES, check_no_overlap
from gradprobe.ops.residual_reference import check_pair, name_of, sum_of
from gradprobe.ops.schemas import RESIDUAL_ADD


def residual_add(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    """Computes the residual add `x + f`, or `torch.relu(x + f)`, in one pass.

    The values equal those expressions bit for bit. The result is written once, and so is the gradient, one tensor for
    both operands. Works under `torch.compile` without a graph break. Under function transforms such as `torch.vmap` and
    in forward mode, torch's own operators compute it, with derivatives of any order.

    Args:
        x: The shortcut; any shape and strided layout.
        f: The result of the branch, of the same shape and device. Dtypes promote as in `x + f`.
        relu: Whether to apply a ReLU. NaN stays NaN.

    Returns:
        The sum, of the same shape, with the strides of `x + f`.

    Raises:
        ArgumentError: The operands are not strided tensors of one shape (they are not broadcast) and one device, or are
            complex or boolean with `relu`. The message names the argument, what was needed and what was given.

    Source:
        He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), eq. 1.

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
        if joined is not None:  # None: the call must go through an operator
            return joined
        if isinstance(x, Tensor) and x.is_cuda:
            resolve("auto", x.device)  # if the compiled kernels cannot run on this GPU, the dispatcher gets others
    _check_arguments(x, f)
    if x.dtype != f.dtype:
        dtype = torch.promote_types(x.dtype, f.dtype)
        x, f = x.to(dtype), f.to(dtype)
    if x.dtype in FLOAT_DTYPES:
        return RESIDUAL_ADD(x, f, relu)
    _check_relu(relu, x.dtype)
    return sum_of(x, f, relu)


def residual_add_(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    """Computes the residual add in place with torch's operators: `x.add_(f)`, or `x.add_(f).relu_()`.

    Autograd's rules apply: `x` may not be a leaf that requires grad, nor a tensor saved for backward. In a residual
    block the branch's first convolution usually saves the shortcut, while the result of the branch is free: write
    `residual_add_(branch, shortcut)`.

    Args:
        x: The tensor to overwrite; any shape and strided layout without overlapping elements.
        f: The tensor to add, of the same shape and device, with a dtype that `x.add_(f)` accepts. It may be `x`, but
            may not overlap `x` in part.
        relu: Whether to apply a ReLU. NaN stays NaN.

    Returns:
        `x`.

    Raises:
        ArgumentError: The operands are not strided tensors of one shape (they are not broadcast) and one device, `x`
            has overlapping elements or cannot hold the dtype of `f`, or they are complex or boolean with `relu`. The
            message names the argument, what was needed and what was given.
        RuntimeError: Raised by torch if autograd or overlapping memory forbids writing to `x`.

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
        of_x, of_f = name_of(x.dtype), name_of(f.dtype)
        raise ArgumentError(f"f: needed a dtype that can be added to {of_x} in place, got {of_f}")
    if not x.is_contiguous():
        check_no_overlap(x, "x")
    _check_relu(relu, x.dtype)
    x.add_(f)
    return x.relu_() if relu else x


def _check_arguments(x: Tensor, f: Tensor) -> None:
    for name, tensor in (("x", x), ("f", f)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: needed a Tensor, got {type(tensor).__name__}")
    check_pair(x, f, "x", "f")


def _kind(dtype: torch.dtype) -> int:
    """Ranks boolean, integer, real and complex, like `torch.can_cast`, which Dynamo cannot trace."""
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _check_relu(relu: bool, dtype: torch.dtype) -> None:
    if relu and (dtype.is_complex or dtype == torch.bool):
        raise ArgumentError(f"relu: needed False for a sum of dtype {name_of(dtype)}, got True")
