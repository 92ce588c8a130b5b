"""The layouts of a row of statistics and of a row of magnitudes, defined once for device and host. Needs no torch.

A raw row [6] holds, in the order of `STATS`: `sum(x) * 2**-e`, `sum(|x|) * 2**-e`, `sum(x**2) * 2**-2e`, `max(|x|)`,
the number of zeros, and the number of NaN and infinite elements. The exponent `e = range_exponent(max(|x|))` is 0
unless the largest magnitude of a float64 tensor lies outside [2**-480, 2**480], where squares underflow or overflow.

A row of magnitudes [285] counts the elements by |x|, all of them once: zeros; those up to `2**-150`; those in
`(2**k, 2**(k + 1)]` for each k from -150 to 127, which are all that float32 and the half-precision dtypes have; those
above `2**128`; NaN and infinity. Then follow the largest finite magnitude, `sum((x * 2**-e)**2)` and
`sum((x * 2**-e)**4)`, where e is the magnitude's exponent, limited to [-1000, 1000]; the sums are not finite if an
element is not. A bin has its upper limit inside, since a number halfway between zero and the smallest of a format, a
power of two, is rounded to zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

STATS = ("sum", "sum_abs", "sum_sq", "abs_max", "n_zero", "n_nonfinite")
SUM, SUM_ABS, SUM_SQ, ABS_MAX, N_ZERO, N_NONFINITE = range(len(STATS))

LOWEST_POWER, HIGHEST_POWER = -150, 128
ZEROS, BINS = 0, slice(1, HIGHEST_POWER - LOWEST_POWER + 3)
NOT_FINITE, LARGEST, SUM_SQUARE, SUM_FOURTH = range(BINS.stop, BINS.stop + 4)
N_MAGNITUDES = SUM_FOURTH + 1

# 2**480, 2**-480 and infinity as float64 bits. Compared as integers, subnormal numbers differ from zero even while
# torch flushes denormals.
_LARGE, _SMALL, _INFINITY = (1023 + 480) << 52, (1023 - 480) << 52, 0x7FF << 52

Array = TypeVar("Array", "npt.NDArray[np.float64]", "Tensor")


def range_exponent(abs_max: Array) -> Array:
    """Returns the exponent e of the power of two by which the sums of a raw row are scaled.

    Args:
        abs_max: Largest magnitudes; float64, any shape, an array or a tensor on any device.

    Returns:
        600, -600 or 0 per magnitude, as integers of the same shape; 0 if the magnitude is zero or not finite.

    Source:
        The three ranges are those of J. L. Blue, "A portable Fortran program to find the Euclidean norm of a vector",
        ACM TOMS 4 (1978).

    Example:
        >>> range_exponent(np.array([0.0, 1e-200, 1.0, 1e200])).tolist()
        [0, -600, 0, 600]
    """
    if isinstance(abs_max, np.ndarray):
        bits = np.ascontiguousarray(abs_max).view(np.int64)
    else:
        import torch

        bits = abs_max.contiguous().view(torch.int64)
    is_large = (bits > _LARGE) & (bits < _INFINITY)
    is_small = (bits > 0) & (bits < _SMALL)
    return is_large * 600 - is_small * 600
