"""The steps of one run as the charts and the tables of its page read them: quantities over steps and depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gradprobe.snapshot.records import FloatArray, IntArray
from gradprobe.snapshot.signals import ACTIVATION_KINDS, Signals
from gradprobe.snapshot.snapshot import SiteTable, Snapshot

OUTLIER = 1.0
"""Range of the steps that share a cell, in powers of ten, from which the outlier is shown instead of the median."""

FORMATS = {
    -1022: ("float64", 1.7976931348623157e308),
    -126: ("bfloat16 or float32", 3.39e38),
    -14: ("float16", 65504.0),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """A quantity at L places, from input to output, in T steps.

    Attributes:
        steps: Numbers of the steps. [T]
        names: Names of the places. Length L.
        values: The quantity; NaN where it was not measured, infinite where it was not finite. [T, L]
    """

    steps: IntArray
    names: tuple[str, ...]
    values: FloatArray


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid with fewer steps and places, so that it can be drawn.

    Attributes:
        first: First step of each column. Length C.
        end: The step after its last one, so far as steps are recorded. Length C.
        last: Last step of each column. Length C.
        stop: End of the axis: as far as the last column would reach if it had as many steps as the others.
        names: The place, or the first and the last place, of each row. Length R.
        values: The quantity. [C, R]
    """

    first: list[int]
    end: list[int]
    last: list[int]
    stop: int
    names: list[tuple[str, ...]]
    values: FloatArray


@dataclass(frozen=True)
class Range:
    """The numbers that a dtype can hold.

    Attributes:
        name: Name of the dtype, or of those that have this range.
        smallest: Smallest normal number.
        largest: Largest number.
    """

    name: str
    smallest: float
    largest: float


class RunView:
    """What the snapshots of one run say, by quantity.

    Args:
        snapshots: Steps in order.
    """

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self.snapshots = snapshots
        self._outputs: dict[tuple[str, str], Grid] = {}
        self.signals = [(one.step, one.signals) for one in snapshots if one.signals is not None]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of the steps that have a loss."""
        return [(one.step, one.loss) for one in self.snapshots if one.loss is not None]

    @cached_property
    def norms(self) -> Grid:
        """Gradient norms of the weights."""
        return _grid((one.step, *_of_weights(one, "norm")) for one in self.snapshots)

    @cached_property
    def largest(self) -> Grid:
        """Largest magnitudes in the weights' gradients, in size as the optimizer sees them."""
        return _grid((one.step, *_of_weights(one, "abs_max")) for one in self.snapshots)

    @cached_property
    def rms(self) -> Grid:
        """Root mean squares of the weights' gradients."""
        return _grid((one.step, *_of_weights(one, "rms")) for one in self.snapshots)

    @cached_property
    def update_ratios(self) -> Grid:
        """Norm of the update over the norm of the weight, at the weights that an optimizer steps."""
        found: list[tuple[int, tuple[str, ...], FloatArray]] = []
        for one in self.snapshots:
            updates = one.parameter_updates
            if updates is not None and not one.skipped:
                chosen = _weights(updates.measured.present, one.table)
                found.append((one.step, tuple(updates.names[k] for k in chosen), updates.ratios[chosen]))
        return _grid(found)

    def outputs(self, column: str, kind: str = "activation") -> Grid:
        """Returns a statistic of module outputs, or of the gradients at them, as the dtype had to hold it.

        Args:
            column: Name of the statistic, as in `SiteStats`.
            kind: One of `ACTIVATION_KINDS`.
        """
        if (column, kind) not in self._outputs:
            offset = ACTIVATION_KINDS.index(kind)
            rows = ((step, *_of_outputs(signals, column, offset)) for step, signals in self.signals)
            self._outputs[column, kind] = _grid(rows)
        return self._outputs[column, kind]

    @cached_property
    def zero_shares(self) -> Grid:
        """Share of zeros in the outputs of the modules whose outputs have zeros."""
        grid = self.outputs("zero_fraction")
        with np.errstate(invalid="ignore"):
            keep = np.flatnonzero((grid.values > 0).any(axis=0)) if grid.values.size else np.zeros(0, dtype=np.int64)
        return Grid(grid.steps, tuple(grid.names[k] for k in keep), grid.values[:, keep])

    @cached_property
    def shares(self) -> Grid:
        """Share of the gradient that arrives by the shortcut at each residual add."""
        return _grid(
            (step, tuple(signals.shortcut_shares), np.array(list(signals.shortcut_shares.values())))
            for step, signals in self.signals
            if signals.table.junctions
        )

    @cached_property
    def module_types(self) -> dict[str, str]:
        """Class of each observed module."""
        return {
            name: module_type
            for _, signals in self.signals[-1:]
            for name, module_type in zip(signals.table.activations, signals.table.module_types, strict=True)
        }

    @cached_property
    def dtype_ranges(self) -> list[Range]:
        """The ranges of the dtypes of the observed outputs, narrowest first."""
        smallest = {
            float(value)
            for _, signals in self.signals[-1:]
            for value in np.unique(signals.events.smallest_normal[signals.events.measured.present])
            if math.isfinite(value) and value > 0
        }
        known = [(name, 2.0**exponent, largest) for exponent, (name, largest) in FORMATS.items()]
        found = [Range(name, normal, largest) for name, normal, largest in known if normal in smallest]
        return sorted(found, key=lambda one: one.largest)


def cells(grid: Grid, columns: int, rows: int, linear: bool = False) -> Cells:
    """Joins steps, and then places, so that at most so many are left.

    A cell shows the median of its steps. If they differ tenfold, it shows the one that is furthest from the median of
    its row, so that a spike of one step stays visible. A cell with a value that is not finite shows that.

    Args:
        grid: The quantity.
        columns: Largest number of columns.
        rows: Largest number of rows.
        linear: Show the means instead.

    Returns:
        The cells.
    """
    parts, places = _parts(len(grid.steps), columns), _parts(len(grid.names), rows)
    if linear:
        values = np.stack([_mean(grid.values[part]) for part in parts])  # [C, L]
        values = np.stack([_mean(values[:, place].T) for place in places], axis=1)  # [C, R]
    else:
        centre = middle(_logs(grid.values))  # [L]
        values = np.stack([_typical(grid.values[part], centre) for part in parts])
        values = np.stack([_typical(values[:, place].T, np.array(np.median(centre))) for place in places], axis=1)
    first = [int(grid.steps[part[0]]) for part in parts]
    last = [int(grid.steps[part[-1]]) for part in parts]
    pace = int(np.median(np.diff(grid.steps))) if len(grid.steps) > 1 else 1
    end = [min(stop + pace, after) for stop, after in zip(last, [*first[1:], last[-1] + pace], strict=True)]
    names = [tuple(dict.fromkeys((grid.names[place[0]], grid.names[place[-1]]))) for place in places]
    stop = max(end[-1], first[0] + len(parts) * len(parts[0]) * pace)
    return Cells(first, end, last, stop, names, values)


def middle(values: FloatArray) -> FloatArray:
    """Returns the median of the finite values of each place, NaN if there is none. [T, L] to [L]."""
    return np.asarray(_quantiles(values, [0.5], axis=0)[0])


def spread(values: FloatArray) -> FloatArray:
    """Returns the least value, the quartiles and the greatest of the finite values of each step. [T, L] to [5, T]."""
    return _quantiles(values, [0.0, 0.25, 0.5, 0.75, 1.0], axis=1)


def _quantiles(values: FloatArray, levels: Sequence[float], axis: int) -> FloatArray:
    usable = np.moveaxis(np.where(np.isfinite(values), values, np.nan), axis, 0)
    if not usable.size:
        return np.full((len(levels), *usable.shape[1:]), np.nan)
    empty = np.asarray(np.isnan(usable).all(axis=0))
    found = np.nanquantile(np.where(empty, 0.0, usable), levels, axis=0)
    return np.asarray(np.where(empty, np.nan, found))


def _parts(length: int, most: int) -> list[IntArray]:
    """Divides 0, 1, …, length - 1 into at most so many parts of equal size; the last may be smaller."""
    size = max(1, -(-length // most))
    return [np.arange(first, min(first + size, length)) for first in range(0, length, size)]


def _logs(values: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log10(values))


def _typical(values: FloatArray, centre: FloatArray) -> FloatArray:
    """Joins n values of each place.

    Args:
        values: The values. [n, L]
        centre: Logarithm of the usual value of each place. [L] or a scalar.

    Returns:
        The joined values. Shape [L].
    """
    if len(values) == 1:
        return np.asarray(values[0])
    logs = _logs(values)
    usable = np.where(np.isfinite(logs), logs, np.nan)
    low, median, high = _quantiles(usable, [0.0, 0.5, 1.0], axis=0)
    distance = np.where(np.isnan(usable), -1.0, np.abs(usable - centre))
    furthest = np.take_along_axis(usable, np.asarray(distance.argmax(axis=0))[None], axis=0)[0]
    with np.errstate(over="ignore", invalid="ignore"):
        joined = 10.0 ** np.where(high - low >= OUTLIER, furthest, median)
    is_zero, is_known = values == 0, ~np.isnan(values)
    joined = np.where((2 * is_zero.sum(axis=0) >= is_known.sum(axis=0)) & is_zero.any(axis=0), 0.0, joined)
    return np.where(np.isinf(values).any(axis=0), np.inf, joined)


def _mean(values: FloatArray) -> FloatArray:
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    return np.where(counts > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def _grid(rows: Iterable[tuple[int, tuple[str, ...], FloatArray]]) -> Grid:
    kept = list(rows)
    # The newest step first: its order is that of the model as it is now.
    tables = dict.fromkeys(names for _, names, _ in reversed(kept))
    names = tuple(dict.fromkeys(name for table in tables for name in table))
    place = {name: k for k, name in enumerate(names)}
    positions = {table: [place[name] for name in table] for table in tables}
    values = np.full((len(kept), len(names)), np.nan)
    for row, (_, table, found) in enumerate(kept):
        values[row, positions[table]] = found
    return Grid(np.array([step for step, _, _ in kept], dtype=np.int64), names, values)


def _weights(present: npt.NDArray[np.bool_], table: SiteTable) -> IntArray:
    """Returns the positions of the weights, tied ones included; of all that are present if none has two dimensions."""
    matrices = present & (np.asarray(table.ndims) > 1)
    return np.flatnonzero(matrices if matrices.any() else present)


def _of_weights(one: Snapshot, column: str) -> tuple[tuple[str, ...], FloatArray]:
    chosen = _weights(one.measured.present, one.table)
    return tuple(one.table.names[k] for k in chosen), _marked(one.columns, column, chosen)


def _of_outputs(signals: Signals, column: str, offset: int) -> tuple[tuple[str, ...], FloatArray]:
    table, present = signals.table, signals.events.measured.present
    sites = np.array(signals.events.sites, dtype=np.int64)
    modules = sites[sites < table.first_junction_site] // len(ACTIVATION_KINDS)
    ran = modules[np.sort(np.unique(modules, return_index=True)[1])]  # in order of execution
    chosen = ran * len(ACTIVATION_KINDS) + offset
    chosen = chosen[present[chosen]]
    values = _marked(signals.columns, column, chosen)
    if offset and signals.scale > 0:
        values = values / signals.scale
    return tuple(table.names[site] for site in chosen), values


def _marked(columns: dict[str, FloatArray], column: str, chosen: npt.NDArray[np.int64]) -> FloatArray:
    return np.where(columns["nonfinite"][chosen] > 0, np.inf, columns[column][chosen])
