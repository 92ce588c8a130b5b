# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"
"""The junction of a residual block: the sum of shortcut and branch, with the statistics of what passes through it.

One operator forward (`y = x + f`, with ReLU if wanted) and one backward (one gradient for both branches). Each also
returns raw rows of `gradprobe.STATS`. The CUDA and Triton kernels take them in the same pass; in plain torch, which
serves every other device, they cost a pass of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops import triton_kernels
from gradprobe.ops.reference import FLOAT_DTYPES, STATS
from gradprobe.ops.schemas import GRAD_STATS_INTO

SCHEMAS = (
    "residual_add(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor row)",
    "residual_add_backward(Tensor grad_y, Tensor y) -> (Tensor grad_x, Tensor rows)",
)


def _check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise ArgumentError(f"{name_a}: needed a dtype of {names}, got {str(a.dtype).removeprefix('torch.')}")
    for what, of_a, of_b in (
        ("shape", list(a.shape), list(b.shape)),
        ("dtype", a.dtype, b.dtype),
        ("device", a.device, b.device),
    ):
        if of_a != of_b:
            raise ArgumentError(f"{name_b}: needed {what} {of_a}, that of {name_a}, got {of_b}")


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of dimensions."""
    span = 1
    for stride, size in sorted((d, n) for d, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != span and tensor.numel() > 0:
            return False
        span *= size
    return True


def _laid_out_alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dense order of elements: the order that they share, or rows."""
    if a.stride() == b.stride() and _is_dense(a):
        return a, b
    return a.contiguous(), b.contiguous()


def _rows_of(*tensors: Tensor) -> Tensor:
    """Raw rows [K, 6] of tensors."""
    rows = torch.empty(len(tensors), len(STATS), dtype=torch.float64, device=tensors[0].device)
    GRAD_STATS_INTO(list(tensors), rows)
    return rows


def _residual_add(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    _check_pair(x, f, "x", "f")
    x, f = _laid_out_alike(x, f)
    if x.is_cuda and triton_kernels.unavailable("cuda") is None:
        return triton_kernels.residual_add(x, f, relu)
    y = x + f
    if relu:
        y.relu_()
    return y, _rows_of(y)


def _residual_add_backward(grad_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(y, grad_y, "y", "grad_y")
    grad_y, y = _laid_out_alike(grad_y, y)
    if y.is_cuda and triton_kernels.unavailable("cuda") is None:
        return triton_kernels.residual_add_backward(grad_y, y)
    grad_x = torch.where(y <= 0, torch.zeros((), dtype=grad_y.dtype, device=grad_y.device), grad_y)
    return grad_x, _rows_of(grad_y, grad_x)


def _fake_residual_add(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    _check_pair(x, f, "x", "f")
    return torch.empty_like(_laid_out_alike(x, f)[0]), x.new_empty(1, len(STATS), dtype=torch.float64)


def _fake_residual_add_backward(grad_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(y, grad_y, "y", "grad_y")
    return torch.empty_like(_laid_out_alike(grad_y, y)[0]), y.new_empty(2, len(STATS), dtype=torch.float64)


def register(library: torch.library.Library) -> None:
    """Gives the operators of a library all but their kernels for a device: fakes, derivatives, kernels in plain torch.

    Args:
        library: defines `SCHEMAS`.

    Example:
        >>> library = torch.library.Library("gradprobe_example_junction", "DEF")
        >>> for schema in SCHEMAS:
        ...     _ = library.define(schema)
        >>> register(library)
    """
    operators = getattr(torch.ops, library.ns)

    def save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        y, row = output
        ctx.mark_non_differentiable(row)
        ctx.relu = inputs[2]
        if inputs[2]:
            ctx.save_for_backward(y)

    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.relu:
            (y,) = ctx.saved_tensors
            grad_y, _ = operators.residual_add_backward(grad_y, y)
        return grad_y, grad_y, None

    def save_y(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1])

    def double_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return operators.residual_add_backward(grad, y)[0], None

    for name, kernel, fake, derivative, setup in (
        ("residual_add", _residual_add, _fake_residual_add, backward, save),
        ("residual_add_backward", _residual_add_backward, _fake_residual_add_backward, double_backward, save_y),
    ):
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_autograd(f"{library.ns}::{name}", derivative, setup_context=setup, lib=library)


_library = torch.library.Library("gradprobe", "FRAGMENT")
for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
register(_library)


def residual_add(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    """Adds the branch of a residual block to its shortcut: `x + f`, or `max(x + f, 0)`.

    Differentiable twice, safe under `torch.compile`. Backward makes one gradient for both branches.

    Args:
        x: shortcut, any shape, float16, bfloat16, float32 or float64.
        f: branch, of the same shape, dtype and device.
        relu: whether a ReLU follows, in the same pass.

    Returns:
        The sum, in the layout of `x` where `f` shares it, else contiguous.

    Raises:
        ArgumentError: shapes, dtypes or devices differ, or the dtype is another; the message says which and what came.

    Source: K. He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), figure 2.

    Example:
        >>> residual_add(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 1.0]), relu=True)
        tensor([2., 0.])
    """
    _check_pair(x, f, "x", "f")
    y: Tensor = torch.ops.gradprobe.residual_add.default(x, f, relu)[0]
    return y
