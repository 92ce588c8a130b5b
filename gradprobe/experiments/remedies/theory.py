"""Predicts the gradient and the signal of a wide random network of equal layers, plain or residual, at its start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import not_among
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

# The same for two independent variables, coarser: the output of the first layer, and what residual layers add to it.
_ZZ = np.linspace(-7.0, 7.0, 281)
_PP = np.exp(-(_ZZ**2) / 2) / np.exp(-(_ZZ**2) / 2).sum()


@dataclass(frozen=True, slots=True)
class ResidualTheory:
    """The start of a wide residual network.

    Attributes:
        variances: Mean square of the elements of the signal, behind the first layer and behind each residual one.
        factor: Factor of the weight gradient's norm per residual layer towards the input; NaN if it is zero.
    """

    variances: tuple[float, ...]
    factor: float


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
        raise not_among("activation", activation, ACTIVATIONS)
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
        raise not_among("norm", norm, ("batch", "layer", "group", "none"))
    forward, backward = [], []  # mean square of a layer's input; its factor on the squared gradient
    q = weight_gain * input_mean_square + bias_variance
    for _ in range(n_layers):
        forward.append(square(function, q))
        q = weight_gain * forward[-1] + bias_variance
        backward.append(weight_gain * square(derivative, q))
    # A layer's gradient has passed the derivative of its own activation and all layers closer to the loss.
    behind = np.cumsum(np.log(backward[::-1]))[::-1]
    return fit_trend(list(0.5 * (np.log(forward) + behind))).factor


@np.errstate(over="ignore")  # a signal that doubles in each layer is beyond float64 after 1,024
def residual_theory(
    activation: str,
    norm: str,
    weight_gain: float,
    bias_variance: float,
    input_mean_square: float,
    n_layers: int,
    branch_factor: float = 1.0,
) -> ResidualTheory:
    """Predicts signal and gradient of a residual network x' = x + a (W f(norm(x)) + b) behind a plain first layer.

    In a wide network, an element of x is u + sqrt(s) z: the output u of the first layer, and the sum of all branches,
    which is normal. A branch adds a^2 (g E[f(norm(x))^2] + Var[b]) to s: with He's weights (g = 2), ReLU and no
    normalisation about as much as the mean square of x, so the signal doubles with every layer; with a normalisation
    the same in every layer, so it grows linearly; with a = 0 nothing. A branch whose input has the standard deviation
    sigma, by which the normalisation divides, multiplies the squared gradient at x by 1 + a^2 g E[f'^2] / sigma^2 on
    the way back, and the weight's gradient is the product of the signals on both sides of it. Of the variance that
    batch normalisation sees, a branch adds a^2 g Var[f]; what comes back through it has no mean over the batch, so that
    the part of a weight's gradient that belongs to the mean of f does not grow.

    Args:
        activation: One of `ACTIVATIONS`.
        norm: ``"batch"``, ``"layer"``, ``"group"`` or ``"none"``.
        weight_gain: g, the variance of a weight times its fan-in.
        bias_variance: Variance of a bias.
        input_mean_square: Mean square of the elements of the network's input.
        n_layers: Number of residual layers.
        branch_factor: a.

    Returns:
        The prediction.

    Source:
        Taki 2017, arXiv 1709.02956; Hanin and Rolnick 2018, arXiv 1803.01719 (growth with and without a factor); Yang
        and Schoenholz 2017, arXiv 1712.08969 (mean field); De and Smith 2020, arXiv 2002.10444, section 3 (linear
        growth with normalisation, doubling without); Brock et al. 2021, arXiv 2101.08692, section 3.

    Example:
        >>> plain = residual_theory("relu", "none", 2.0, 0.0, 1.0, 10).variances
        >>> normalised = residual_theory("relu", "layer", 2.0, 0.0, 1.0, 10).variances
        >>> round(plain[10] / plain[9], 1), round(normalised[10] - normalised[9], 1)
        (2.0, 1.0)
    """
    function, derivative = _FUNCTIONS[activation]
    first = function(_ZZ * (1.0 if norm != "none" else math.sqrt(weight_gain * input_mean_square + bias_variance)))
    mean, square = float(_PP @ first), float(_PP @ first**2)
    added = seen = 0.0  # by the branches to the mean square of x, and to the variance that a normalisation sees
    variances, moments, backward = [square], [], []
    for _ in range(n_layers):
        x = first[:, None] + math.sqrt(seen) * _ZZ
        sigma = 1.0
        if norm != "none":
            sigma = math.sqrt(square - mean**2 + seen)
            x = (x - mean) / sigma
        f = function(x)
        f_mean, f_square = float(_PP @ f @ _PP), float(_PP @ f**2 @ _PP)
        moments.append((f_square, f_mean))
        backward.append(1 + branch_factor**2 * weight_gain * float(_PP @ derivative(x) ** 2 @ _PP) / sigma**2)
        taken = branch_factor**2 * (weight_gain * f_square + bias_variance)
        added += taken
        if not math.isfinite(added):
            return ResidualTheory((*variances, *[math.inf] * (n_layers + 1 - len(variances))), math.nan)
        seen += branch_factor**2 * weight_gain * (f_square - f_mean**2) if norm == "batch" else taken
        variances.append(square + added)
    if branch_factor == 0 or weight_gain == 0 or n_layers < 2:
        return ResidualTheory(tuple(variances), math.nan)
    # A weight's gradient has passed the layers behind it, not its own.
    behind = np.cumprod([*backward[1:], 1.0][::-1])[::-1]
    squares, means = np.array(moments).T
    by_mean = means**2 if norm == "batch" else 0.0
    gradients = (squares - by_mean) * behind + by_mean
    return ResidualTheory(tuple(variances), fit_trend(list(0.5 * np.log(gradients))).factor)
