"""Predicts the factor per layer on the gradient norm of a wide random network of equal layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.records import FloatArray

Pair = tuple[Callable[[FloatArray], FloatArray], Callable[[FloatArray], FloatArray]]

# Points and weights of a standard normal variable, 10 sigma to each side, fine enough for the kink of ReLU.
_Z = np.linspace(-10.0, 10.0, 20_001)
_P = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


def _sigmoid(z: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(z / 2))


# Each activation and its derivative. Only squares of the derivative are summed: that of ReLU's derivative at 0 is 1/2,
# halfway between its values on both sides.
_FUNCTIONS: dict[str, Pair] = {
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: np.heaviside(z, math.sqrt(0.5))),
}
ACTIVATIONS = tuple(_FUNCTIONS)


def factor_per_layer(
    activation: str, norm: str, weight_gain: float, bias_variance: float, input_mean_square: float, n_layers: int
) -> float:
    """Predicts the factor of the weight gradient's norm per hidden layer of a plain network, towards the input.

    Let weights have variance g / fan-in and biases variance b. Without normalisation, the variance q of the
    pre-activations propagates as q' = g E[f(sqrt(q) z)^2] + b, and the squared gradient is multiplied by
    g E[f'(sqrt(q) z)^2] on the way back; a weight's gradient is the product of the forward and the backward signal. A
    normalisation keeps the pre-activations standard normal and divides the gradient by their standard deviation, whose
    square is g Var[f(z)] over the batch, or g E[f(z)^2] + b over the layer. In a wide layer, the pre-activations of one
    example are independent draws of one normal variable, so each of a few wide groups has the layer's mean and
    variance: in the limit, group normalisation is the same as layer normalisation.

    Args:
        activation: One of `ACTIVATIONS`.
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
        weight_gain: g.
        bias_variance: b.
        input_mean_square: Mean square of the elements of the network's input.
        n_layers: Number of hidden layers, without the first, that the line is fitted to.

    Returns:
        The factor.

    Raises:
        ArgumentError: The activation or the normalisation is unknown.

    Source:
        Schoenholz et al. 2017, Deep Information Propagation, arXiv 1611.01232; He et al. 2015, arXiv 1502.01852 (ReLU
        with g = 2: 1); Yang et al. 2019, arXiv 1902.08129 (batch normalisation in the limit of large batches; ReLU:
        sqrt(pi / (pi - 1)) = 1.21).

    Example:
        >>> round(factor_per_layer("relu", "batch", 2.0, 0.0, 1.0, 50), 2)
        1.21
    """
    if activation not in _FUNCTIONS:
        raise ArgumentError(f"activation: needed one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    function, derivative = _FUNCTIONS[activation]

    def square(f: Callable[[FloatArray], FloatArray], q: float) -> float:
        return float(_P @ f(math.sqrt(q) * _Z) ** 2)

    if norm == "batch":
        mean = float(_P @ function(_Z))
        return math.sqrt(square(derivative, 1.0) / (square(function, 1.0) - mean**2))
    if norm in ("layer", "group"):
        taken = weight_gain * square(function, 1.0) + bias_variance
        return math.sqrt(weight_gain * square(derivative, 1.0) / taken)
    if norm != "none":
        raise ArgumentError(f"norm: needed one of batch, layer, group, none, got {norm!r}")
    forward, backward = [], []  # mean square of a layer's input; its factor on the squared gradient
    q = weight_gain * input_mean_square + bias_variance
    for _ in range(n_layers):
        forward.append(square(function, q))
        q = weight_gain * forward[-1] + bias_variance
        backward.append(weight_gain * square(derivative, q))
    # A layer's gradient has passed the derivative of its own activation and all layers closer to the loss.
    behind = np.cumsum(np.log(backward[::-1]))[::-1]
    return fit_trend(list(0.5 * (np.log(forward) + behind))).factor
