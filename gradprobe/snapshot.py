"""What was measured in one step, as frozen host data that needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradprobe.errors import ArgumentError
from gradprobe.measured import FloatArray, Measured, Provenance

if TYPE_CHECKING:
    import pandas

COLUMNS = ("norm", "rms", "abs_max", "abs_mean", "mean", "std", "zero_fraction", "nonfinite", "numel")
SUM, SUM_ABS, SUM_SQ, ABS_MAX, N_ZERO, N_NONFINITE = range(6)


@dataclass(frozen=True, slots=True)
class SiteStats:
    """Statistics of one gradient tensor.

    Attributes:
        name: Site name.
        kind: "parameter".
        norm: Euclidean norm.
        rms: Root of the mean square, which compares layers of different size.
        abs_max: Largest magnitude.
        abs_mean: Mean magnitude.
        mean: Mean.
        std: Standard deviation over the elements (the population's, divided by n), from the mean and the mean square;
            below about 3e-4 of the mean it is rounding.
        zero_fraction: Share of elements that are exactly zero.
        nonfinite: Number of elements that are NaN or infinite.
        numel: Number of elements.
    """

    name: str
    kind: str
    norm: float
    rms: float
    abs_max: float
    abs_mean: float
    mean: float
    std: float
    zero_fraction: float
    nonfinite: int
    numel: int


@dataclass(frozen=True, slots=True)
class SiteTable:
    """Names that the snapshots of one probe share: K sites in model order.

    Attributes:
        names: First names. Length K.
        kinds: Kinds. Length K.
        ndims: Number of dimensions of each tensor. Length K.
        index: Every name, ties included, to its position.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    ndims: tuple[int, ...]
    index: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The gradients of one training step.

    Index it with a site name, or iterate over `sites`. A site without a gradient in this step is not in it.

    Attributes:
        step: Number of the step, counted from 0 at attach.
        loss: What was given to `Probe.step(loss=...)`, or None.
        provenance: Unscaled or scaled, local or averaged, before or after clipping.
        skipped: The gradient scaler skipped the optimizer's step, because a gradient was not finite.
        table: Site names.
        rows: Raw statistics in the order of `gradprobe.STATS`. [K, 6]
        measured: Which sites had a gradient, and their sizes.
        scale: Factor on the gradients that undoes loss scaling.
    """

    step: int
    loss: float | None
    provenance: Provenance
    skipped: bool
    table: SiteTable
    rows: FloatArray
    measured: Measured
    scale: float = 1.0

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Each statistic of `COLUMNS` for all K sites, absent ones included. Values of shape [K]."""
        return _finish(self.rows, self.measured.numels, self.scale)

    @cached_property
    def sites(self) -> dict[str, SiteStats]:
        """The sites that had a gradient, by first name, in model order."""
        return {name: self._site(k) for k, name in enumerate(self.table.names) if self.measured.present[k]}

    @cached_property
    def total_norm(self) -> float:
        """Euclidean norm of all gradients together, tied parameters counted once."""
        norms = self.columns["norm"][self.measured.present]  # [K']
        largest = float(norms.max(initial=0.0))
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        return largest * float(np.sqrt(np.sum((norms / largest) ** 2)))

    def reordered(self, order: Sequence[int]) -> Snapshot:
        """Puts the sites into another order, such as that of execution.

        Args:
            order: Positions of the K sites in the order wanted. Length K.

        Returns:
            A new snapshot.
        """
        names = self.table.names
        position = {names[k]: new for new, k in enumerate(order)}
        table = SiteTable(
            names=tuple(names[k] for k in order),
            kinds=tuple(self.table.kinds[k] for k in order),
            ndims=tuple(self.table.ndims[k] for k in order),
            index={name: position[names[k]] for name, k in self.table.index.items()},
        )
        take = np.asarray(order, dtype=np.int64)
        measured = Measured(self.measured.present[take], self.measured.numels[take])
        return replace(self, table=table, rows=self.rows[take], measured=measured)

    def __getitem__(self, name: str) -> SiteStats:
        k = self.table.index.get(name)
        if k is None:
            known = self.table.names
            raise KeyError(f"no site {name!r}; there are {len(known)}: {', '.join(known[:5])}, …")
        if not self.measured.present[k]:
            raise KeyError(f"site {name!r} had no gradient in step {self.step}")
        return self._site(k)

    def __contains__(self, name: object) -> bool:
        k = self.table.index.get(name) if isinstance(name, str) else None
        return k is not None and bool(self.measured.present[k])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return int(self.measured.present.sum())

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f", loss={self.loss:.4g}"
        return f"Snapshot(step={self.step}{loss}, total_norm={self.total_norm:.4g}, sites={len(self)})"

    def _site(self, k: int) -> SiteStats:
        values = {name: float(column[k]) for name, column in self.columns.items()}
        nonfinite, numel = int(values.pop("nonfinite")), int(values.pop("numel"))
        return SiteStats(self.table.names[k], self.table.kinds[k], **values, nonfinite=nonfinite, numel=numel)


def range_exponent(abs_max: FloatArray) -> FloatArray:
    """Gives the power of two by which a raw row is scaled (`csrc/stats.h`).

    Args:
        abs_max: Largest magnitudes. [K]

    Returns:
        0, 600 or -600 for each. [K]

    Source:
        J. L. Blue, "A portable Fortran program to find the Euclidean norm of a vector", ACM TOMS 4 (1978).
    """
    extreme = np.isfinite(abs_max) & (abs_max > 0)
    return np.where(extreme & (abs_max > 2.0**480), 600.0, np.where(extreme & (abs_max < 2.0**-480), -600.0, 0.0))


def _finish(rows: FloatArray, numels: npt.NDArray[np.int64], scale: float) -> dict[str, FloatArray]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        unit = np.ldexp(1.0, range_exponent(rows[:, ABS_MAX]).astype(np.int64)) * scale  # [K]
        n = np.maximum(numels, 1).astype(np.float64)
        scaled_mean = rows[:, SUM] / n
        variance = np.maximum(rows[:, SUM_SQ] / n - scaled_mean**2, 0.0)
        variance = np.where(np.isfinite(rows[:, SUM_SQ]), variance, np.nan)
        return {
            "norm": np.sqrt(rows[:, SUM_SQ]) * unit,
            "rms": np.sqrt(rows[:, SUM_SQ] / n) * unit,
            "abs_max": rows[:, ABS_MAX] * scale,
            "abs_mean": rows[:, SUM_ABS] / n * unit,
            "mean": scaled_mean * unit,
            "std": np.sqrt(variance) * unit,
            "zero_fraction": rows[:, N_ZERO] / n,
            "nonfinite": rows[:, N_NONFINITE].copy(),
            "numel": numels.astype(np.float64),
        }


def to_pandas(snapshots: Iterable[Snapshot]) -> pandas.DataFrame:
    """Puts snapshots into one tidy table.

    Args:
        snapshots: Any number of snapshots.

    Returns:
        One row for each step and site: step, loss, site, kind, then the columns of `COLUMNS`.

    Raises:
        ArgumentError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ArgumentError("to_pandas: needs pandas; install it with: pip install 'gradprobe[pandas]'") from error
    frames = []
    for snapshot in snapshots:
        present = snapshot.measured.present
        columns = {name: column[present] for name, column in snapshot.columns.items()}
        columns["nonfinite"] = columns["nonfinite"].astype(np.int64)
        columns["numel"] = columns["numel"].astype(np.int64)
        names = np.asarray(snapshot.table.names, dtype=object)[present]
        kinds = np.asarray(snapshot.table.kinds, dtype=object)[present]
        loss = math.nan if snapshot.loss is None else snapshot.loss
        frames.append(pandas.DataFrame({"step": snapshot.step, "loss": loss, "site": names, "kind": kinds, **columns}))
    if not frames:
        return pandas.DataFrame(columns=["step", "loss", "site", "kind", *COLUMNS])
    return pandas.concat(frames, ignore_index=True)
