"""Batch normalisation in training, fused with a residual add and a ReLU: y = relu(batch_norm(x) + shortcut).

    batch_norm_relu(x, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu) -> y, saved [2, C]
    batch_norm_relu_backward(grad_y, y, x, weight, saved, masked) -> grad_x, grad_shortcut, grad_weight, grad_bias

x is [N, C, ...], float16, bfloat16, float32 or float64; the shortcut is alike or None. Everything else has a value for
each of the C channels and is float32 (float64 if x is). `saved` holds the means and the inverse standard deviations.
Normalised elements are rounded to the dtype of x before the shortcut is added, so the operator gives the same bits as
itself without shortcut and ReLU, followed by `residual_add`; and so do the gradients. The backward takes y only if
there was a ReLU. `grad_shortcut` is empty unless `masked`: without a ReLU the shortcut gets grad_y itself.

On the CPU a kernel computes float32 and bfloat16 tensors whose channels are innermost in memory: two reads of x and one
write of y in the forward pass, and as many in the backward. Sums are taken about the mean of a tile and merged in
float64, in an order that does not depend on the number of threads. For other layouts, dtypes and devices, torch's own
operators compute the results. All of them have the strides of `torch.empty_like(x)`. Nothing is computed for an empty
x, and its running statistics stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops import libraries
from gradprobe.ops.batch_norm_reference import check_arguments
from gradprobe.ops.schemas import BATCH_NORM_RELU


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    shortcut: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """Normalises x by the mean and variance of each channel, adds the shortcut, and applies a ReLU.

    Args:
        x: [N, C, ...], strided; float16, bfloat16, float32 or float64.
        weight: [C], float32, or float64 if x is; multiplies the normalised values.
        bias: [C], like `weight`; added to them.
        running_mean: [C], like `weight`, or None; updated in place to (1 - momentum) * itself + momentum * mean.
        running_var: [C], like `weight`, or None; updated with the unbiased variance.
        shortcut: A tensor like x to add, or None.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        relu: Whether to apply a ReLU. NaN stays NaN.

    Returns:
        The result, with the shape and strides of `torch.empty_like(x)`.

    Raises:
        ArgumentError: An argument does not fit, or x has one value per channel, which has no variance. The message
            names the argument, what was needed and what was given.

    Source:
        Ioffe and Szegedy 2015, "Batch Normalization" (arXiv 1502.03167), algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm_relu(x, torch.ones(1), torch.zeros(1), shortcut=torch.ones(2, 1), eps=0.0).tolist()
        [[0.0], [2.0]]
    """
    if not torch.compiler.is_compiling():
        hooks, _ = libraries.native_hooks()
        arguments = (x, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu)
        y: Tensor | None = None if hooks is None else hooks.batch_norm_relu(*arguments)
        if y is not None:  # None: the call must go through an operator
            return y
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: needed a Tensor, got {type(tensor).__name__}")
    check_arguments(x, shortcut, weight, bias, running_mean, running_var)
    if x.numel() == x.shape[1]:
        raise ArgumentError(f"x: needed more than one value per channel, got shape {list(x.shape)}")
    return BATCH_NORM_RELU(x, shortcut, weight, bias, running_mean, running_var, momentum, eps, relu)[0]
