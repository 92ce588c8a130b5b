# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"
"""The residual junction as one pass each way: y = x + f or max(x + f, 0), and one gradient for both branches.

`torch.ops.gradprobe.residual_add` and the three operators beside it are functions: they write to no argument and return
no view of one, so `torch.compile` takes them as they are. All four want operands of one shape, one device and one dtype
of float16, bfloat16, float32 or float64; `residual_add` is the public function, which promotes dtypes.

    residual_add(x, f, relu) -> y
    residual_add_backward(grad_y, y) -> grad_x                   grad_y where y > 0 or y is NaN, else 0
    residual_add_stats(x, f, relu) -> y, rows [1, 6]             raw row of y
    residual_add_backward_stats(grad_y, y) -> grad_x, rows [2, 6]     raw rows of grad_y and of grad_x

Without a ReLU there is nothing to mask: `residual_add_backward_stats(grad_y, None)` gives a copy of `grad_y`, since an
operator may not return its own argument. Where only the numbers are wanted, `grad_stats` of `grad_y` saves the copy.

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
from gradprobe.ops import native, triton_kernels
from gradprobe.ops.differentiable import autograd_kernel, below_autograd, in_backward
from gradprobe.ops.reference import FLOAT_DTYPES, STATS
from gradprobe.ops.schemas import GRAD_STATS_INTO

SCHEMAS = (
    "residual_add(Tensor x, Tensor f, bool relu) -> Tensor",
    "residual_add_backward(Tensor grad_y, Tensor y) -> Tensor",
    "residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)",
    "residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)",
)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


# ---- What every kernel checks and computes.


def _check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Refuses operands that are not alike; the second argument is the one to blame."""
    if a.layout != torch.strided:
        raise ArgumentError(f"{name_a}: needed a strided layout, got {_name(a.layout)}")
    if b.layout != torch.strided:
        raise ArgumentError(f"{name_b}: needed a strided layout, got {_name(b.layout)}")
    if a.shape != b.shape:
        raise ArgumentError(f"{name_b}: needed the shape of {name_a}, {list(a.shape)}, got {list(b.shape)}")
    if a.device != b.device:
        raise ArgumentError(f"{name_b}: needed the device of {name_a}, {a.device}, got {b.device}")


def _check_operands(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Refuses what the operators do not take."""
    _check_pair(a, b, name_a, name_b)
    _check_dtype(a, name_a)
    if a.dtype != b.dtype:
        raise ArgumentError(f"{name_b}: needed the dtype of {name_a}, {_name(a.dtype)}, got {_name(b.dtype)}")


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(_name(dtype) for dtype in FLOAT_DTYPES)
        raise ArgumentError(f"{name}: needed a dtype of {names}, got {_name(tensor.dtype)}")


def _sum(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    return torch.relu(x + f) if relu else x + f


def _masked(grad_y: Tensor, y: Tensor) -> Tensor:
    grad_x: Tensor = torch.ops.aten.threshold_backward.grad_input(grad_y, y, 0, grad_input=torch.empty_like(y))
    return grad_x


def _composite_mask(grad_y: Tensor, y: Tensor) -> Tensor:
    grad_x: Tensor = torch.ops.aten.threshold_backward(grad_y, y, 0)
    return grad_x


def _empty_rows(like: Tensor, n_rows: int) -> Tensor:
    return torch.empty(n_rows, len(STATS), dtype=torch.float64, device=like.device)


# ---- What runs where the compiled part has no kernel for the device: Triton's on a GPU, else torch's own operators.


def _suits_triton(a: Tensor, b: Tensor) -> bool:
    """Whether the Triton kernel can walk both tensors as one flat memory."""
    if not a.is_cuda or triton_kernels.unavailable("cuda") is not None or a.stride() != b.stride():
        return False
    span = 1
    for stride, size in sorted((d, n) for d, n in zip(a.stride(), a.shape, strict=True) if n != 1):
        if stride != span:
            return False
        span *= size
    return True


def _add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    _check_operands(x, f, "x", "f")
    return triton_kernels.residual_add(x, f, relu)[0] if _suits_triton(x, f) else _sum(x, f, relu)


def _backward(grad_y: Tensor, y: Tensor) -> Tensor:
    _check_operands(grad_y, y, "grad_y", "y")
    return triton_kernels.residual_add_backward(grad_y, y)[0] if _suits_triton(grad_y, y) else _masked(grad_y, y)


def _rows_of(*tensors: Tensor) -> Tensor:
    """Raw rows [K, 6]."""
    rows = _empty_rows(tensors[0], len(tensors))
    GRAD_STATS_INTO(list(tensors), rows)
    return rows


def _add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    _check_operands(x, f, "x", "f")
    if _suits_triton(x, f):
        return triton_kernels.residual_add(x, f, relu)
    y = _sum(x, f, relu)
    return y, _rows_of(y)


def _backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    if y is None:
        _check_dtype(grad_y, "grad_y")
        grad_x = torch.empty_like(grad_y).copy_(grad_y)
        return grad_x, _rows_of(grad_y, grad_x)
    _check_operands(grad_y, y, "grad_y", "y")
    if _suits_triton(grad_y, y):
        return triton_kernels.residual_add_backward(grad_y, y)
    grad_x = _masked(grad_y, y)
    return grad_x, _rows_of(grad_y, grad_x)


# ---- Shapes and strides, for compilers.


def _fake_add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    _check_operands(x, f, "x", "f")
    return x + f


def _fake_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    _check_operands(grad_y, y, "grad_y", "y")
    return torch.empty_like(y)


def _fake_add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    y = _fake_add(x, f, relu)
    return y, _empty_rows(y, 1)


def _fake_backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    if y is None:
        _check_dtype(grad_y, "grad_y")
        return torch.empty_like(grad_y), _empty_rows(grad_y, 2)
    return _fake_backward(grad_y, y), _empty_rows(y, 2)


# ---- Registration.


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

    def batched_mask(info: Any, in_dims: tuple[int | None, ...], grad_y: Tensor, y: Tensor) -> tuple[Tensor, int]:
        return mask(*_batches_first(info.batch_size, in_dims, grad_y, y)), 0

    def batched_stats(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> None:
        raise NotImplementedError("the statistics of a residual junction are of whole tensors: not under torch.vmap")

    for name, kernel, fake, function, batched, composite in (
        ("residual_add", _add, _fake_add, Junction, batched_add, _sum),
        ("residual_add_backward", _backward, _fake_backward, Mask, batched_mask, _composite_mask),
        ("residual_add_stats", _add_stats, _fake_add_stats, Junction, batched_stats, None),
        ("residual_add_backward_stats", _backward_stats, _fake_backward_stats, Mask, batched_stats, None),
    ):
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, fake, lib=library)
        torch.library.register_vmap(qualified, batched, lib=library)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        library.impl(name, autograd_kernel(getattr(operators, name).default, function, composite), "Autograd")


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
native.parts()  # the kernels of the compiled part, if there is one, take the place of the reference

RESIDUAL_ADD: Callable[[Tensor, Tensor, bool], Tensor] = torch.ops.gradprobe.residual_add.default


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
    for name, tensor in (("x", x), ("f", f)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: needed a Tensor, got {type(tensor).__name__}")
    _check_pair(x, f, "x", "f")
    if x.dtype != f.dtype:
        dtype = torch.promote_types(x.dtype, f.dtype)
        x, f = x.to(dtype), f.to(dtype)
    if x.dtype in FLOAT_DTYPES:
        return RESIDUAL_ADD(x, f, relu)
    if relu and (x.is_complex() or x.dtype == torch.bool):
        raise ArgumentError(f"relu: needed False for a sum of dtype {_name(x.dtype)}, got True")
    return _sum(x, f, relu)
