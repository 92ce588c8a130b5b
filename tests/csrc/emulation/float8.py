"""The numbers of the float8 formats, by definition (Micikevicius et al. 2022, "FP8 formats for deep learning")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _finite(exponent_bits: int) -> NDArray[np.float64]:
    """Returns the 256 numbers of a format without infinity and NaN, by bit pattern."""
    fraction_bits = 7 - exponent_bits
    bits = np.arange(256)
    exponent, fraction = bits % 128 >> fraction_bits, bits % (1 << fraction_bits)
    digits = np.where(exponent > 0, (1 << fraction_bits) + fraction, fraction)
    bias = (1 << exponent_bits - 1) - 1
    magnitude = np.ldexp(digits.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)
    return np.where(bits < 128, magnitude, -magnitude)


NUMBERS = {"e4m3": _finite(4), "e5m2": _finite(5)}
NUMBERS["e4m3"][[0x7F, 0xFF]] = np.nan
NUMBERS["e5m2"][[0x7C, 0xFC]] = np.inf, -np.inf
NUMBERS["e5m2"][[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan


def encode(values: NDArray[np.float64], element: str) -> NDArray[np.uint8]:
    """Returns the bits of the nearest finite numbers. Without infinities, "e4m3" has NaN in their place."""
    largest = int(np.nanargmax(np.where(np.isinf(NUMBERS[element]), np.nan, NUMBERS[element])))
    magnitudes = NUMBERS[element][: largest + 1]
    bits = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values))
    bits = np.where(np.isinf(values), 0x7F if element == "e4m3" else 0x7C, bits)
    bits = np.where(np.isnan(values), 0x7F, bits)
    return (bits + 128 * np.signbit(values)).astype(np.uint8)
