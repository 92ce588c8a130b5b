"""Fused batch normalisation in plain torch: the reference that the kernel is tested against, used where none exists.

Arguments and results are described in `batch_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops.residual_reference import check_dtype, check_operands, name_of, sum_of


def check_channels(values: Tensor, x: Tensor, name: str) -> None:
    """Raises ArgumentError unless `values` has one element for each channel of x, in the dtype of its statistics."""
    needed = torch.float64 if x.dtype == torch.float64 else torch.float32
    if values.dtype != needed:
        raise ArgumentError(f"{name}: needed dtype {name_of(needed)}, got {name_of(values.dtype)}")
    if values.shape != x.shape[1:2]:
        raise ArgumentError(f"{name}: needed shape {list(x.shape[1:2])}, got {list(values.shape)}")
    if values.device != x.device:
        raise ArgumentError(f"{name}: needed the device of x, {x.device}, got {values.device}")


def check_arguments(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Raises ArgumentError unless the operator accepts the tensors."""
    check_dtype(x, "x")
    if x.dim() < 2:
        raise ArgumentError(f"x: needed at least two dimensions, got shape {list(x.shape)}")
    if shortcut is not None:
        check_operands(x, shortcut, "x", "shortcut")
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, values in per_channel.items():
        if values is not None:
            check_channels(values, x, name)


def composite(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Computes y and saved from torch operators, which support every kind of derivative."""
    y, mean, invstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    if shortcut is not None:
        y = sum_of(shortcut, y, relu)
    elif relu:
        y = torch.relu(y)
    return y, torch.stack((mean, invstd))


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Computes y, with the strides of `torch.empty_like(x)`, and saved."""
    check_arguments(x, shortcut, weight, bias, running_mean, running_var)
    if x.numel() == 0:
        return fake(x, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu)
    y, saved = composite(x, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu)
    return like(x, y), saved


def fake(
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Allocates the results of `forward`; saved is zero, as it is for an empty x."""
    check_arguments(x, shortcut, weight, bias, running_mean, running_var)
    return torch.empty_like(x), weight.new_zeros((2, x.shape[1]))


def composite_backward(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, saved: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes all gradients from torch operators, which are differentiable with respect to grad_y, x and weight."""
    g: Tensor = grad_y if y is None else torch.ops.aten.threshold_backward(grad_y, y, 0)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, saved[0], saved[1], True, 0.0, [True, True, True]
    )
    return grad_x, g if masked else x.new_empty(0), grad_weight, grad_bias


def backward(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, saved: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients; those of x and of the shortcut have the strides of `torch.empty_like(x)`."""
    if x.numel() == 0:
        return fake_backward(grad_y, y, x, weight, saved, masked)
    grad_x, grad_shortcut, grad_weight, grad_bias = composite_backward(grad_y, y, x, weight, saved, masked)
    # An operator may not return its argument.
    grad_shortcut = torch.empty_like(x).copy_(grad_shortcut) if masked else grad_shortcut
    return like(x, grad_x), grad_shortcut, grad_weight, grad_bias


def fake_backward(
    grad_y: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, saved: Tensor, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates the results of `backward`; those of weight and bias are zero, as they are for an empty x."""
    check_operands(x, grad_y, "x", "grad_y")
    if y is not None:
        check_operands(x, y, "x", "y")
    elif masked:
        raise ArgumentError("masked: needed y, the result of a ReLU, got none")
    grad_shortcut = torch.empty_like(x) if masked else x.new_empty(0)
    return torch.empty_like(x), grad_shortcut, torch.zeros_like(weight), torch.zeros_like(weight)


def like(x: Tensor, values: Tensor) -> Tensor:
    """Returns `values` with the strides of `torch.empty_like(x)`: a copy unless they have them."""
    needed = torch.empty_like(x)
    return values if values.stride() == needed.stride() else needed.copy_(values)
