"""The residual operators in plain torch: the reference that kernels are tested against, used where no kernel exists.

Arguments and results are described in `residual`. Rows come from `reference.grad_stats_into`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops.reference import FLOAT_DTYPES, grad_stats_into
from gradprobe.ops.row_math import rows_by
from gradprobe.ops.rows import ABS_MAX, range_exponent


def name_of(value: object) -> str:
    """Returns the name of a dtype or layout without its `torch.` prefix."""
    return str(value).removeprefix("torch.")


def check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Raises ArgumentError unless both tensors are strided and of one shape and device; mismatches blame `b`."""
    for tensor, name in ((a, name_a), (b, name_b)):
        if tensor.layout != torch.strided:
            raise ArgumentError(f"{name}: needed a strided layout, got {name_of(tensor.layout)}")
    if a.shape != b.shape:
        raise ArgumentError(f"{name_b}: needed the shape of {name_a}, {list(a.shape)}, got {list(b.shape)}")
    if a.device != b.device:
        raise ArgumentError(f"{name_b}: needed the device of {name_a}, {a.device}, got {b.device}")


def check_operands(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Raises ArgumentError unless the operators accept the two tensors."""
    check_pair(a, b, name_a, name_b)
    check_dtype(a, name_a)
    if a.dtype != b.dtype:
        raise ArgumentError(f"{name_b}: needed the dtype of {name_a}, {name_of(a.dtype)}, got {name_of(b.dtype)}")


def check_dtype(tensor: Tensor, name: str) -> None:
    """Raises ArgumentError unless the operators accept the tensor's dtype."""
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(name_of(dtype) for dtype in FLOAT_DTYPES)
        raise ArgumentError(f"{name}: needed a dtype of {names}, got {name_of(tensor.dtype)}")


def sum_of(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Computes y from torch operators, which support every kind of derivative."""
    return torch.relu(x + f) if relu else x + f


def composite_mask(grad_y: Tensor, y: Tensor) -> Tensor:
    """Computes grad_x from a torch operator, which supports every kind of derivative."""
    check_operands(grad_y, y, "grad_y", "y")
    grad_x: Tensor = torch.ops.aten.threshold_backward(grad_y, y, 0)
    return grad_x


def add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Computes y."""
    check_operands(x, f, "x", "f")
    return sum_of(x, f, relu)


def backward(grad_y: Tensor, y: Tensor | None) -> Tensor:
    """Computes grad_x; a copy of grad_y if y is None."""
    if y is None:
        check_dtype(grad_y, "grad_y")
        return torch.empty_like(grad_y).copy_(grad_y)
    check_operands(grad_y, y, "grad_y", "y")
    grad_x: Tensor = torch.ops.aten.threshold_backward.grad_input(grad_y, y, 0, grad_input=torch.empty_like(y))
    return grad_x


def add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Computes y and its raw row [1, 6]."""
    y = add(x, f, relu)
    return y, rows_by(grad_stats_into, [y])


def backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes grad_x and the raw rows [2, 6] of grad_y and grad_x."""
    grad_x = backward(grad_y, y)
    return grad_x, rows_by(grad_stats_into, [grad_y, grad_x])


def branch_stats(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Computes the raw row of branch and the row of the sum of products, [2, 6]."""
    check_operands(branch, shortcut, "branch", "shortcut")
    rows = rows_by(grad_stats_into, [branch.detach(), shortcut.detach()])
    # Products of float64 may leave the range of float64.
    exponent = range_exponent(rows[:, ABS_MAX].sqrt().prod()).double()
    factor = torch.exp2(-exponent)
    products = (branch.detach().double() * factor) * (shortcut.detach().double() * factor)
    zero = torch.zeros_like(factor)
    rows[1] = torch.stack((zero, zero, products.sum(), torch.exp2(exponent), zero, zero))
    return rows
