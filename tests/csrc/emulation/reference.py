"""The reference of the kernels: the same operations in extended precision, written independently of their source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Largest error relative to sum_abs for "sum", and relative to the value for the other sums.
TOLERANCE = {"f16": 1e-6, "bf16": 1e-6, "f32": 1e-6, "f64": 1e-12, "e4m3": 1e-6, "e5m2": 1e-6}


def range_exponent(abs_max: float) -> int:
    """Returns the exponent of a raw row, according to the definition of raw rows."""
    if abs_max == 0 or not np.isfinite(abs_max):
        return 0
    return 600 if abs_max > 2.0**480 else -600 if abs_max < 2.0**-480 else 0


def raw_row(values: NDArray[np.float64]) -> NDArray[np.longdouble]:
    """Returns the raw row [6] of a tensor's values."""
    wide = values.astype(np.longdouble)
    magnitude = np.abs(wide)
    abs_max = np.longdouble(0)
    if values.size:
        abs_max = np.longdouble(np.nan) if np.isnan(values).any() else magnitude.max()
    scaled = np.ldexp(wide, -range_exponent(float(abs_max)))
    with np.errstate(invalid="ignore"):
        sums = [scaled.sum(), np.abs(scaled).sum(), (scaled * scaled).sum()]
    return np.array([*sums, abs_max, np.sum(values == 0), np.sum(~np.isfinite(values))], dtype=np.longdouble)


def check_row(got: NDArray[np.float64], values: NDArray[np.float64], element: str, what: str) -> None:
    """Raises AssertionError, naming `what` and the column, unless `got` [6] is the raw row of `values`."""
    needed = raw_row(values)
    for column, exact in ((3, "abs_max"), (4, "n_zero"), (5, "n_nonfinite")):
        same = got[column] == needed[column] or (np.isnan(got[column]) and np.isnan(needed[column]))
        if not same:
            raise AssertionError(f"{what}: {exact} is {got[column]!r}, needed {needed[column]!r}")
    for column, name in ((0, "sum"), (1, "sum_abs"), (2, "sum_sq")):
        if np.isfinite(needed[column]):
            bound = TOLERANCE[element] * needed[1 if column == 0 else column]
            if not abs(np.longdouble(got[column]) - needed[column]) <= bound:
                raise AssertionError(
                    f"{what}: {name} is {got[column]!r}, needed {needed[column]!r}, give or take {bound!r}"
                )
        elif not (got[column] == needed[column] or (np.isnan(got[column]) and np.isnan(needed[column]))):
            raise AssertionError(f"{what}: {name} is {got[column]!r}, needed {needed[column]!r}")


def check_products(got: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64], what: str) -> None:
    """Raises AssertionError unless `got` [6] holds the sum of a * b in the way a raw row holds its sum of squares."""
    if got[[0, 1, 4, 5]].any():
        raise AssertionError(f"{what}: columns other than the sum of products are {got!r}, needed zeros")
    products = a.astype(np.longdouble) * b.astype(np.longdouble)
    with np.errstate(invalid="ignore"):
        needed, bound = products.sum(), TOLERANCE["f64"] * np.abs(products).sum()
    seen = np.ldexp(np.longdouble(got[2]), 2 * range_exponent(float(got[3])))
    if np.isfinite(needed):
        if not abs(seen - needed) <= bound:
            raise AssertionError(f"{what}: the sum of products is {seen!r}, needed {needed!r}, give or take {bound!r}")
    elif not (seen == needed or (np.isnan(seen) and np.isnan(needed))):
        raise AssertionError(f"{what}: the sum of products is {seen!r}, needed {needed!r}")


def check_magnitudes(got: NDArray[np.float64], values: NDArray[np.float64], what: str) -> None:
    """Raises AssertionError unless `got` [285] is the row of magnitudes of `values`, or unwritten if there are none."""
    if not values.size:
        if not np.isnan(got).all():
            raise AssertionError(f"{what}: the row of an empty tensor was written")
        return
    magnitude = np.abs(values)
    finite = magnitude[np.isfinite(magnitude)]
    limits = np.ldexp(1.0, np.arange(-150, 129))  # a limit belongs to the bin below it
    bins = np.bincount(np.searchsorted(limits, finite[finite > 0], side="left"), minlength=280)
    largest = finite.max(initial=0.0)
    needed = [np.sum(magnitude == 0), *bins, values.size - finite.size, largest]
    if got[:283].tolist() != needed:
        (column, *_) = np.flatnonzero(got[:283] != needed)
        raise AssertionError(f"{what}: column {column} is {got[column]!r}, needed {needed[column]!r}")
    exponent = np.clip(np.frexp(largest)[1] - 1, -1000, 1000) if largest else -1000
    scaled = np.ldexp(values.astype(np.longdouble), -exponent)
    for column, power in ((283, 2), (284, 4)):
        with np.errstate(invalid="ignore"):
            total = (scaled**power).sum()
        if not (abs(got[column] - total) <= 1e-12 * total if np.isfinite(total) else not np.isfinite(got[column])):
            raise AssertionError(f"{what}: the sum of powers of {power} is {got[column]!r}, needed {total!r}")
