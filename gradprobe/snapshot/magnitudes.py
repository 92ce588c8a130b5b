"""How the magnitudes of gradients spread over the powers of two, and which formats hold them. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gradprobe.errors import ArgumentError
from gradprobe.ops.rows import BINS, HIGHEST_POWER, LARGEST, LOWEST_POWER, NOT_FINITE, SUM_FOURTH, SUM_SQUARE, ZEROS
from gradprobe.snapshot.records import FloatArray, IntArray


class Bounds(NamedTuple):
    """Two numbers between which a third one lies.

    Attributes:
        lower: It is at least this.
        upper: It is at most this.
    """

    lower: float
    upper: float


class Format(NamedTuple):
    """The range of a floating-point format, under rounding to the nearest number and ties to even.

    Attributes:
        vanishing: Largest magnitude that is rounded to zero: half the smallest number above zero.
        largest: Largest finite number.
        holds: Largest magnitude, as a float64, that is rounded to a finite number.
    """

    vanishing: float
    largest: float
    holds: float


# A magnitude halfway between the largest number and the next one that would follow goes to the even one of the two,
# which is the largest in e4m3 (1.75 * 2**8; NaN takes the place of the next) and the next one in the others.
_FORMATS = {
    "float16": Format(2.0**-25, 65504.0, math.nextafter(65520.0, 0.0)),
    "bfloat16": Format(2.0**-134, (2 - 2**-7) * 2.0**127, math.nextafter((2 - 2**-8) * 2.0**127, 0.0)),
    "e4m3": Format(2.0**-10, 448.0, 464.0),
    "e5m2": Format(2.0**-17, 57344.0, math.nextafter(61440.0, 0.0)),
}
_NAMES = {name: name for name in _FORMATS} | {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}

Scale = float | Literal["best"]


@dataclass(frozen=True, slots=True, eq=False)
class Magnitudes:
    """How the magnitudes of one tensor spread over the powers of two.

    Whether a format holds a value is told from its bin alone, so shares are bounds. They coincide for underflow under a
    scale that is a power of two, and, where no value overflows, for overflow.

    Attributes:
        name: Name of the parameter or module.
        edges: Limits of the bins, which rise by factors of two: of 0, `2**-150`, ..., `2**128` and infinity, times the
            factor that undoes loss scaling. [B + 1]
        counts: Number of values with `edges[b] < |x| <= edges[b + 1]`. [B]
        zeros: Number of zeros.
        nonfinite: Number of NaN and infinite values.
        numel: Number of values.
        abs_max: Largest finite magnitude.
        kurtosis: Fourth moment over the square of the second, both about zero: 3 for a normal distribution around zero,
            1 if all magnitudes are equal, the number of values if all but one are zero. NaN if all are zero or one is
            not finite.

    Source:
        float16 and bfloat16: IEEE 754-2019, and the upper half of its binary32. e4m3 and e5m2: Micikevicius et al.,
        "FP8 formats for deep learning" (2022), table 1; e4m3 is `torch.float8_e4m3fn`, without infinities.

    Example:
        >>> edges, counts = np.array([0.0, 0.5, 1.0, 2.0, math.inf]), np.array([0, 3, 1, 0])
        >>> one = Magnitudes("weight", edges, counts, zeros=1, nonfinite=0, numel=5, abs_max=1.5, kurtosis=1.9)
        >>> one.quantile_bounds(0.5)
        Bounds(lower=0.5, upper=1.0)
        >>> one.underflow_share("e5m2", scale=2.0**-17), one.best_scale("e5m2")
        (Bounds(lower=0.75, upper=0.75), 32768.0)
    """

    name: str
    edges: FloatArray = field(repr=False)
    counts: IntArray = field(repr=False)
    zeros: int
    nonfinite: int
    numel: int
    abs_max: float
    kurtosis: float

    def quantile_bounds(self, q: float) -> Bounds:
        """Bounds the magnitude that a share of the finite values, zeros included, does not exceed.

        Args:
            q: The share, from 0 to 1; 0.5 asks for the median.

        Returns:
            The limits of its bin, so `lower < magnitude <= upper`; zeros if it is zero, NaN if no value is finite.

        Raises:
            ArgumentError: `q` is not such a number.
        """
        if not 0 <= q <= 1:
            raise ArgumentError(f"q: needed a number from 0 to 1, got {q!r}")
        n_finite = self.numel - self.nonfinite
        if n_finite == 0:
            return Bounds(math.nan, math.nan)
        rank = max(math.ceil(q * n_finite), 1)
        if rank <= self.zeros:
            return Bounds(0.0, 0.0)
        b = int(np.searchsorted(self.zeros + np.cumsum(self.counts), rank))
        return Bounds(float(self.edges[b]), float(min(self.edges[b + 1], self.abs_max)))

    def underflow_share(self, dtype: object, scale: Scale = 1.0) -> Bounds:
        """Bounds the share of the finite values other than zero that a format rounds to zero.

        Values that become subnormal, and so less precise, do not count.

        Args:
            dtype: "float16", "bfloat16", "e4m3", "e5m2", or the dtype of torch.
            scale: Factor of all values before they are converted, "best" for `best_scale(dtype)`.

        Returns:
            The bounds, from 0 to 1; NaN if there is no such value.

        Raises:
            ArgumentError: The format is unknown, or the scale is not above zero.
        """
        vanishing = _format(dtype).vanishing
        lower, upper = self._scaled_limits(dtype, scale)
        return self._share(upper <= vanishing, lower < vanishing)

    def overflow_share(self, dtype: object, scale: Scale = 1.0) -> Bounds:
        """Bounds the share of the finite values other than zero that are beyond a format.

        They become infinite, or NaN in e4m3; a conversion that saturates, as that of torch 2.13 to e4m3 on a CPU, makes
        them the largest number.

        Args:
            dtype: As for `underflow_share`.
            scale: As for `underflow_share`.

        Returns:
            The bounds, from 0 to 1; NaN if there is no such value.

        Raises:
            ArgumentError: The format is unknown, or the scale is not above zero.
        """
        holds = _format(dtype).holds
        lower, upper = self._scaled_limits(dtype, scale)
        return self._share(lower >= holds, upper > holds)

    def best_scale(self, dtype: object) -> float:
        """Returns the largest power of two by which no finite value exceeds the largest number of a format.

        Under this scale the fewest values underflow of those under which none overflows. 1.0 if all are zero.

        Args:
            dtype: As for `underflow_share`.

        Raises:
            ArgumentError: The format is unknown.
        """
        of_format, power = math.frexp(_format(dtype).largest)
        of_largest, largest_power = math.frexp(self.abs_max)
        if of_largest == 0:
            return 1.0
        return math.ldexp(1.0, min(power - largest_power - (of_largest > of_format), 1023))

    def _scaled_limits(self, dtype: object, scale: Scale) -> tuple[FloatArray, FloatArray]:
        """Returns between which magnitudes the values of each bin lie after scaling, [B] each."""
        if scale == "best":
            scale = self.best_scale(dtype)
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ArgumentError(f"scale: needed 'best' or a finite number above 0, got {scale!r}")
        with np.errstate(over="ignore"):
            return self.edges[:-1] * scale, np.minimum(self.edges[1:], self.abs_max) * scale

    def _share(self, surely: npt.NDArray[np.bool_], possibly: npt.NDArray[np.bool_]) -> Bounds:
        n = int(self.counts.sum())
        if n == 0:
            return Bounds(math.nan, math.nan)
        return Bounds(int(self.counts[surely].sum()) / n, int(self.counts[possibly].sum()) / n)


def _format(dtype: object) -> Format:
    name = _NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ArgumentError(f"dtype: needed one of {', '.join(_FORMATS)}, got {dtype!r}")
    return _FORMATS[name]


def edges_of(scale: float) -> FloatArray:
    """Returns the limits of the bins of values that are multiplied by a factor after they are counted, [B + 1]."""
    powers = np.exp2(np.arange(LOWEST_POWER, HIGHEST_POWER + 1))
    return np.concatenate(([0.0], powers * scale, [math.inf]))


def count_in(row: FloatArray) -> int:
    """Returns the number of values that a row of magnitudes counts."""
    return int(row[: NOT_FINITE + 1].sum())


def magnitudes_of(name: str, row: FloatArray, scale: float, edges: FloatArray) -> Magnitudes:
    """Reads a row of magnitudes.

    Args:
        name: Name of the parameter or module.
        row: The row, as `gradprobe.ops.rows` describes it. [285]
        scale: Factor that undoes loss scaling.
        edges: The limits of the bins with this factor, from `edges_of`.
    """
    counts = row[: NOT_FINITE + 1].astype(np.int64)
    numel = int(counts.sum())
    with np.errstate(invalid="ignore"):  # all are zero, or one is not finite
        kurtosis = float(numel * row[SUM_FOURTH] / row[SUM_SQUARE] ** 2)
    abs_max = float(row[LARGEST]) * scale
    return Magnitudes(name, edges, counts[BINS], int(counts[ZEROS]), int(counts[NOT_FINITE]), numel, abs_max, kurtosis)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationMagnitudes:
    """How the magnitudes of a module's output spread, and those of its gradient.

    Attributes:
        output: Those of the output, over all tensors and calls together.
        gradient: Those of the gradient of the output, None if there was none or not all of it was counted.
    """

    output: Magnitudes
    gradient: Magnitudes | None


@dataclass(frozen=True, eq=False)
class GradientMagnitudes:
    """The magnitudes of the gradients of K parameters.

    Attributes:
        names: First names of the parameters. Length K.
        rows: Rows of magnitudes, as `gradprobe.ops.rows` describes them. [K, 285]
        present: Which parameters had a gradient. [K]
        scale: Factor that undoes loss scaling.
    """

    names: tuple[str, ...]
    rows: FloatArray
    present: npt.NDArray[np.bool_]
    scale: float

    @cached_property
    def magnitudes(self) -> dict[str, Magnitudes]:
        """The magnitudes of the gradients, by the parameter's first name, in the order of `names`."""
        edges = edges_of(self.scale)
        there = np.flatnonzero(self.present).tolist()
        return {self.names[k]: magnitudes_of(self.names[k], self.rows[k], self.scale, edges) for k in there}
