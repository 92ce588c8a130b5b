"""The residual operators where the compiled part has no kernel for a device, and their fakes.

On a GPU the Triton kernels run, else torch's own operators. Arguments and results are those of `residual.SCHEMAS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops.reference import FLOAT_DTYPES, check_no_overlap
from gradprobe.ops.row_math import empty_rows, raw_rows
from gradprobe.ops.rows import ABS_MAX, range_exponent
from gradprobe.ops.triton import launcher as triton_launcher


def name_of(value: object) -> str:
    """A dtype or layout as torch users write it."""
    return str(value).removeprefix("torch.")


def check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Refuses operands that are not alike; the second argument is the one to blame."""
    if a.layout != torch.strided:
        raise ArgumentError(f"{name_a}: needed a strided layout, got {name_of(a.layout)}")
    if b.layout != torch.strided:
        raise ArgumentError(f"{name_b}: needed a strided layout, got {name_of(b.layout)}")
    if a.shape != b.shape:
        raise ArgumentError(f"{name_b}: needed the shape of {name_a}, {list(a.shape)}, got {list(b.shape)}")
    if a.device != b.device:
        raise ArgumentError(f"{name_b}: needed the device of {name_a}, {a.device}, got {b.device}")


def _check_operands(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Refuses what the operators do not take."""
    check_pair(a, b, name_a, name_b)
    _check_dtype(a, name_a)
    if a.dtype != b.dtype:
        raise ArgumentError(f"{name_b}: needed the dtype of {name_a}, {name_of(a.dtype)}, got {name_of(b.dtype)}")


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(name_of(dtype) for dtype in FLOAT_DTYPES)
        raise ArgumentError(f"{name}: needed a dtype of {names}, got {name_of(tensor.dtype)}")


def sum_of(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """By operators of torch, which know every kind of derivative."""
    return torch.relu(x + f) if relu else x + f


def _masked(grad_y: Tensor, y: Tensor) -> Tensor:
    grad_x: Tensor = torch.ops.aten.threshold_backward.grad_input(grad_y, y, 0, grad_input=torch.empty_like(y))
    return grad_x


def composite_mask(grad_y: Tensor, y: Tensor) -> Tensor:
    """By operators of torch, likewise."""
    grad_x: Tensor = torch.ops.aten.threshold_backward(grad_y, y, 0)
    return grad_x


def _suits_triton(a: Tensor, b: Tensor) -> bool:
    """Whether the Triton kernel can walk both tensors as one flat memory."""
    if not a.is_cuda or triton_launcher.unavailable("cuda") is not None or a.stride() != b.stride():
        return False
    span = 1
    for stride, size in sorted((d, n) for d, n in zip(a.stride(), a.shape, strict=True) if n != 1):
        if stride != span:
            return False
        span *= size
    return True


def add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Computes y."""
    _check_operands(x, f, "x", "f")
    if not _suits_triton(x, f):
        return sum_of(x, f, relu)
    y = torch.empty_like(x)
    triton_launcher.residual_add_into(x, f, relu, y)
    return y


def add_in_place(x: Tensor, f: Tensor, relu: bool) -> None:
    """Computes y into x."""
    _check_operands(x, f, "x", "f")
    check_no_overlap(x, "x")
    f = _unchanged_by(x, f)
    if _suits_triton(x, f):
        triton_launcher.residual_add_into(x, f, relu, x)
        return
    x.add_(f)
    if relu:
        x.relu_()


def _unchanged_by(x: Tensor, f: Tensor) -> Tensor:
    """f, or a copy where writing to x might change elements of f that are still to be read."""
    (x_begin, x_end), (f_begin, f_end) = _address_range(x), _address_range(f)
    apart = x_end <= f_begin or f_end <= x_begin
    return f if apart or (x_begin == f_begin and x.stride() == f.stride()) else f.clone()


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first element to the last, [begin, end)."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin


def backward(grad_y: Tensor, y: Tensor) -> Tensor:
    """Computes grad_x."""
    _check_operands(grad_y, y, "grad_y", "y")
    if not _suits_triton(grad_y, y):
        return _masked(grad_y, y)
    grad_x = torch.empty_like(y)
    triton_launcher.residual_add_backward_into(grad_y, y, grad_x)
    return grad_x


def add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Computes y and its raw row [1, 6]."""
    _check_operands(x, f, "x", "f")
    if _suits_triton(x, f):
        return triton_launcher.residual_add(x, f, relu)
    y = sum_of(x, f, relu)
    return y, raw_rows([y])


def backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes grad_x and the raw rows [2, 6] of grad_y and of it."""
    if y is None:
        _check_dtype(grad_y, "grad_y")
        grad_x = torch.empty_like(grad_y).copy_(grad_y)
        return grad_x, raw_rows([grad_y, grad_x])
    _check_operands(grad_y, y, "grad_y", "y")
    if _suits_triton(grad_y, y):
        return triton_launcher.residual_add_backward(grad_y, y)
    grad_x = _masked(grad_y, y)
    return grad_x, raw_rows([grad_y, grad_x])


def branch_stats(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Computes the raw row of the branch's part, and the row of the sum of products."""
    _check_operands(branch, shortcut, "branch", "shortcut")
    rows = raw_rows([branch.detach(), shortcut.detach()])
    # with float64 the sum may leave the range that doubles have
    exponent = range_exponent(rows[:, ABS_MAX].sqrt().prod()).double()
    factor = torch.exp2(-exponent)
    products = (branch.detach().double() * factor) * (shortcut.detach().double() * factor)
    zero = torch.zeros_like(factor)
    rows[1] = torch.stack((zero, zero, products.sum(), torch.exp2(exponent), zero, zero))
    return rows


def fake_add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Shape and strides of y."""
    _check_operands(x, f, "x", "f")
    return x + f


def fake_add_in_place(x: Tensor, f: Tensor, relu: bool) -> None:
    """Refuses what `add_in_place` does, as far as shapes and dtypes tell."""
    _check_operands(x, f, "x", "f")


def fake_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    """Shape and strides of grad_x."""
    _check_operands(grad_y, y, "grad_y", "y")
    return torch.empty_like(y)


def fake_add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Shapes and strides of y and its row."""
    y = fake_add(x, f, relu)
    return y, empty_rows(1, y)


def fake_backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes and strides of grad_x and the rows."""
    if y is None:
        _check_dtype(grad_y, "grad_y")
        return torch.empty_like(grad_y), empty_rows(2, grad_y)
    return fake_backward(grad_y, y), empty_rows(2, y)


def fake_branch_stats(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Shape of the rows."""
    _check_operands(branch, shortcut, "branch", "shortcut")
    return empty_rows(2, branch)
