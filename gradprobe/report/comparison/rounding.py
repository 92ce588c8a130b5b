"""How far two runs may differ by rounding alone.

A sum that is taken in another order, as with other threads, kernels or machines, differs in its last digits, and the
steps after it amplify the difference (Shanmugavelu et al. 2024, arXiv:2408.05148). With u = 2**-p for significands of p
bits, a difference is taken for rounding up to these relative sizes:

- the loss and the norm of all gradients: sqrt(u), i.e. half of the digits agree, the rule of Julia's `isapprox`;
- in the first step that differs, if the step before it is equal, loss, outputs and parameters, and the gradient that
  differs least: 64 u, as nothing has amplified it yet; and if all gradients are equal, the updates: u**(1/4);
- the norm of one gradient: u**(1/4), since a change of sign at a ReLU moves single gradients far more than the whole;
  nor is it judged below 64 u of the largest gradient of its module: a bias before a normalisation has a gradient of
  zero, so that all of it is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradprobe.report.comparison.sites import BoolArray
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.snapshot.stats import finish_rows

FORMATS = {8: "bfloat16", 11: "float16", 24: "float32", 53: "float64"}
"""Formats by the number of bits of their significands."""

_UNITS = 64  # of rounding
_FEWEST = 8  # magnitudes that tell the format
_MOST_STEPS = 200


@dataclass(frozen=True)
class Rounding:
    """The largest differences that are taken for rounding.

    Attributes:
        bits: Number of bits of the significands, a key of `FORMATS`.
    """

    bits: int

    @property
    def unit(self) -> float:
        """The unit roundoff, u."""
        return 2.0**-self.bits

    @property
    def whole(self) -> float:
        """Limit for the loss and for the norm of all gradients."""
        return float(self.unit**0.5)

    @property
    def single(self) -> float:
        """Limit for the norm of one gradient."""
        return float(self.unit**0.25)

    @property
    def one_step(self) -> float:
        """Limit for what nothing has amplified yet: the loss and outputs where the step before is equal."""
        return min(self.floor, self.whole)

    @property
    def floor(self) -> float:
        """Differences below this share of the largest gradient norm of the module are not judged."""
        return _UNITS * self.unit

    @classmethod
    def of(cls, *runs: Sequence[Snapshot]) -> Rounding:
        """Finds the format that the least precise run computes in.

        The largest magnitude of a tensor is one of its elements, so it has as many bits as the format. Of each weight's
        gradient and of each module's output the longest significand counts, and the median of these.
        """
        return cls(min(_bits(run) for run in runs))


def _bits(run: Sequence[Snapshot]) -> int:
    chosen = run[:: max(1, len(run) // _MOST_STEPS)]
    weights: dict[str, list[float]] = {}
    outputs: dict[str, list[float]] = {}
    for one in chosen:
        is_weight = np.asarray(one.table.ndims) > 1
        kept = np.flatnonzero(one.measured.present & (is_weight if is_weight.any() else True))
        largest = finish_rows(one.rows, one.measured.numels, one.scale, ("abs_max",))["abs_max"]
        for k in kept.tolist():
            weights.setdefault(one.table.names[k], []).append(largest[k])
        if one.signals is not None:
            table, measured = one.signals.table, one.signals.events.measured
            largest = finish_rows(one.signals.rows, measured.numels, 1.0, ("abs_max",))["abs_max"]
            for site in np.flatnonzero(measured.present).tolist():
                if table.kinds[site] == "activation":
                    outputs.setdefault(table.names[site], []).append(largest[site])
    return min(_format(list(weights.values())), _format(list(outputs.values())))


def _format(magnitudes: Sequence[Sequence[float]]) -> int:
    lengths = []
    n_known = 0
    for values in magnitudes:
        known = np.array(values)
        known = known[np.isfinite(known) & (known > 0)]
        if len(known):
            lengths.append(_significand_bits(known).max())
            n_known += len(np.unique(known))
    if n_known < _FEWEST:
        return 24
    return next(bits for bits in FORMATS if bits >= np.median(lengths))


def _significand_bits(values: FloatArray) -> FloatArray:
    """Returns the number of bits from the first to the last that is set.

    Example:
        >>> _significand_bits(np.array([1.0, 0.75, 1 + 2.0**-23])).tolist()
        [1.0, 2.0, 24.0]
    """
    whole = np.ldexp(np.frexp(values)[0], 53).astype(np.int64)
    return np.asarray(53 - np.log2(whole & -whole))


@dataclass(frozen=True, eq=False)
class Course:
    """The differences of two runs over T steps, as they are judged.

    Attributes:
        steps: Numbers of the steps. [T]
        names: Names of the parameters. Length K.
        norms: Gradient norms in both runs, NaN where there is none. [2, T, K]
        differ: Which gradients differ in more than numbers: in presence, size or count of values that are not finite.
            [T, K]
        loss_sizes: Relative differences of the losses, NaN where one is missing. [T]
        total_sizes: Relative differences of the norms of all gradients. [T]
        skipped: Whether one run alone skipped the optimizer's step. [T]
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    norms: FloatArray
    differ: BoolArray
    loss_sizes: FloatArray
    total_sizes: FloatArray
    skipped: BoolArray

    def at(self, place: int) -> Course:
        """Returns one step alone."""
        one = slice(place, place + 1)
        return Course(
            self.steps[one],
            self.names,
            self.norms[:, one],
            self.differ[one],
            self.loss_sizes[one],
            self.total_sizes[one],
            self.skipped[one],
        )

    def beyond(self, rounding: Rounding) -> BoolArray:
        """Returns whether each step differs by more than rounding, shape [T]."""
        with np.errstate(invalid="ignore"):
            whole = np.maximum(np.nan_to_num(self.loss_sizes, posinf=np.inf), self.total_sizes) > rounding.whole
        return np.asarray(whole | self.singles(rounding).any(axis=1) | self.skipped)

    def singles(self, rounding: Rounding) -> BoolArray:
        """Returns whether the gradient of each parameter differs by more than rounding, shape [T, K]."""
        with np.errstate(invalid="ignore"):
            off = np.abs(self.norms[0] - self.norms[1]) > rounding.single * self._larger
        return np.asarray((off & ~self.negligible(rounding)) | self.differ)

    def negligible(self, rounding: Rounding) -> BoolArray:
        """Returns whether each difference is too small beside the module's gradient to be judged, shape [T, K]."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.abs(self.norms[0] - self.norms[1]) <= rounding.floor * self._of_module)

    @cached_property
    def _larger(self) -> FloatArray:
        """The larger norm of both runs, 0 where none is finite, shape [T, K]."""
        usable = np.where(np.isfinite(self.norms), self.norms, 0.0)
        return np.asarray(usable.max(axis=0))

    @cached_property
    def _of_module(self) -> FloatArray:
        """The largest norm in the module of each parameter, shape [T, K]."""
        places: dict[str, list[int]] = {}
        for k, name in enumerate(self.names):
            places.setdefault(name.rpartition(".")[0], []).append(k)
        largest = self._larger.copy()
        for chosen in places.values():
            largest[:, chosen] = self._larger[:, chosen].max(axis=1, keepdims=True)
        return largest
