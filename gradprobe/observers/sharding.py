"""Statistics of whole gradients from those of their parts: two collectives per measured step.

Each rank reduces its own part of every gradient to a row. A MAX takes the largest magnitudes as integers (a MAX of
floats may lose a NaN), a SUM the other five statistics and the number of elements. What several ranks hold in copies is
added as often, and divided by the number of copies after the sum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from gradprobe.errors import GradprobeError
from gradprobe.observers.agreement import WIDE, Agreement
from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.parameters import ObservedParameter
from gradprobe.observers.shards import Shared, local_of, partial_dims
from gradprobe.ops.rows import ABS_MAX, N_NONFINITE, N_ZERO, STATS, SUM_SQ, range_exponent
from gradprobe.snapshot.records import FloatArray, IntArray, Measured

_PACKED = N_NONFINITE  # values packed into a row: one in the last column would be read as non-finite elements
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class PartialGradient(NamedTuple):
    """A gradient that still has to be added up over some dimensions of its mesh.

    Attributes:
        k: Position of its parameter on this rank.
        value: A copy of the local part, since others may clip before it is added up.
        gradient: The gradient, for its mesh and placements.
    """

    k: int
    value: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True, slots=True)
class Reduced:
    """A step as the host reads it.

    Attributes:
        rows: Rows of the K whole gradients. [K, 6]
        measured: Which were measured on all ranks that hold a part, and their sizes.
        differ: Which are not the same on all ranks that hold a copy. [K]
        signal_numels: Number of elements observed at each site of activations and residual adds, on all ranks. [S]
    """

    rows: FloatArray
    measured: Measured
    differ: npt.NDArray[np.bool_]
    signal_numels: IntArray


class WholeGradients:
    """Reduces the rows of local parts to rows of whole gradients.

    Attributes:
        names: Names of the K parameters that the ranks hold together.
        ndims: Number of dimensions of each. Length K.
        device: Where the rows are reduced.
        n_rows: Number of rows that `finish` writes: K and some with packed values.
        n_signals: Number of sites of activations and residual adds, S; 0 if these are not reduced.
        local_rows: For each device, rows for this rank's parts of the open step. Values of shape [K of this rank, 6].
        seen: Which were measured in some step. [K]
        is_first: This rank is the first of them.
        are_copies: Every parameter is held whole by several ranks, as in data parallelism.
        tolerance: Relative difference of two factors that the rounding of a gradient explains.

    Args:
        agreed: What the ranks have agreed on.
        sites: The parameters of this rank.
        meter: Measures their gradients.
        n_signals: Number of sites of activations and residual adds to reduce, S.
    """

    def __init__(
        self, agreed: Agreement, sites: Sequence[ObservedParameter], meter: GradientMeter, n_signals: int = 0
    ) -> None:
        self._agreed, self._group, self.device = agreed, agreed.group, agreed.device
        self.is_first = dist.get_rank(agreed.group) == 0
        self.names, self.ndims, self.are_copies = agreed.names, agreed.ndims, bool(agreed.is_copied.all())
        self._n, self.n_signals = len(self.names), n_signals
        self.n_rows = self._count_rows()
        self.tolerance = 4.0 * max(float(torch.finfo(layout.dtype).eps) for layout in meter.layouts)
        self._numels = agreed.numels
        self._held, self._padding, self._copies = (
            torch.from_numpy(counts.astype(np.float64)).to(self.device)
            for counts in (agreed.held, agreed.padding, agreed.copies)
        )
        self._copied = torch.from_numpy(np.flatnonzero(agreed.is_copied)).to(self.device)  # [C]
        self.seen = torch.zeros(self._n, dtype=torch.bool, device=self.device)
        self.regroup(sites, meter)
        self._elements = torch.zeros(self._n, dtype=torch.float64, device=self.device)
        self._signal_elements = torch.zeros(n_signals, dtype=torch.float64, device=self.device)
        self._signs = torch.tensor([-1, 1], device=self.device)
        self._top = self._sums = torch.empty(0)
        self._work: list[Any] = []

    def regroup(self, sites: Sequence[ObservedParameter], meter: GradientMeter) -> None:
        """Takes the same parameters of this rank in another layout, e.g. of another dtype.

        Args:
            sites: The parameters.
            meter: Measures their gradients.

        Raises:
            GradprobeError: They are other parameters, which all ranks would have to agree on.
        """
        position = {name: k for k, name in enumerate(self.names)}
        needs_exponent = any(layout.dtype in WIDE for layout in meter.layouts)
        if any(site.name not in position for site in sites) or (needs_exponent and not self._agreed.is_wide):
            raise GradprobeError("the parameters of a sharded model have changed; detach and attach again on all ranks")
        slots = np.array([position[site.name] for site in sites], dtype=np.int64)  # [K of this rank]
        self._meter = meter
        self._slots = torch.from_numpy(slots).to(self.device)
        self._slots_of_rows = {
            device: torch.from_numpy(slots[meter.positions_on(device)]).to(self.device) for device in meter.rows_on
        }
        self._elements_of: Measured | None = None  # what `_elements` was computed from
        self.local_rows = {
            device: torch.zeros(n_rows, len(STATS), dtype=torch.float64, device=device)
            for device, n_rows in meter.rows_on.items()
        }

    def start(
        self,
        step: int,
        rows: Mapping[torch.device, torch.Tensor] | None,
        measured: Measured | None,
        partials: Sequence[PartialGradient] = (),
        shared: Shared | None = None,
        signals: tuple[torch.Tensor, Measured] | None = None,
    ) -> None:
        """Starts the collectives of a step, in the same order on every rank.

        Args:
            step: Number of the step.
            rows: For each device, the rows of this rank's parts; None if it has measured nothing.
            measured: Which parts were measured.
            partials: Gradients that still have to be added up; their rows are written first.
            shared: What else the ranks tell each other.
            signals: This rank's rows of activations and residual adds, [S, 6], and which had an event; None if it has
                observed nothing.
        """
        shared = shared or Shared()
        with torch.no_grad():
            self._add_up(partials, rows)
            local = torch.cat((self._collect(rows, measured), self._collect_signals(signals)))  # [K + S, 6]
            elements = torch.cat((self._elements, self._signal_elements))  # [K + S]
            magnitudes = _bits(local[:, ABS_MAX].abs())
            copied = _bits(local[self._copied, SUM_SQ].abs())  # [C]
            has_copy = self._elements[self._copied] > 0
            ratios = torch.stack([_on(shared.smallest, self.device), _on(shared.largest, self.device)])
            ratios = torch.where(ratios.isnan(), math.nan, ratios)  # a NaN with a minus sign would be the smallest
            clock = torch.full((2,), step, dtype=torch.int64, device=self.device)
            self._top = torch.cat(
                (
                    magnitudes,
                    copied,
                    torch.where(has_copy, -copied, torch.iinfo(torch.int64).min),
                    _bits(ratios) * self._signs,
                    clock * self._signs,
                    (_on(shared.skipped, self.device) != 0).to(torch.int64).view(1),
                    torch.full((1,), int(signals is None), dtype=torch.int64, device=self.device),
                )
            )
            top = dist.all_reduce(self._top, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            sums = torch.cat((local[:, :ABS_MAX], local[:, N_ZERO:]), dim=1)  # [K + S, 5]
            if self._agreed.is_wide:  # the sums need the exponent of the largest magnitude
                top.wait()
                common = range_exponent(self._top[: len(local)].view(torch.float64))
                shift = (range_exponent(local[:, ABS_MAX]) - common).clamp(max=0).double()
                factor = torch.where(local[:, ABS_MAX] == 0, 1.0, torch.exp2(shift))
                sums[:, :3] *= factor.unsqueeze(1)
                sums[:, SUM_SQ] *= factor  # twice: the square of the factor underflows
            self._sums = torch.cat((sums, elements.unsqueeze(1)), dim=1)  # [K + S, 6]
            added = dist.all_reduce(self._sums, group=self._group, async_op=True)
            self._work = [top, added]

    def twice(self, meter: GradientMeter) -> WholeGradients:
        """Returns one for two rows of each parameter, of which all first ones come before all second ones.

        Args:
            meter: Measures the parts of this rank.
        """
        both = copy.copy(self)
        both._n, both.n_signals = 2 * self._n, 0
        both.n_rows = both._count_rows()
        both._signal_elements = self._signal_elements[:0]
        both._numels = np.tile(self._numels, 2)
        both._held, both._padding, both._copies = (
            values.repeat(2) for values in (self._held, self._padding, self._copies)
        )
        both._copied = torch.cat((self._copied, self._copied + self._n))
        both._slots = torch.cat((self._slots, self._slots + self._n))
        slots = self._slots.cpu().numpy()
        both._slots_of_rows = {}
        for device in meter.rows_on:
            first = torch.from_numpy(slots[meter.positions_on(device)]).to(self.device)
            both._slots_of_rows[device] = torch.cat((first, first + self._n))
        both.local_rows = {
            device: torch.zeros(2 * n_rows, len(STATS), dtype=torch.float64, device=device)
            for device, n_rows in meter.rows_on.items()
        }
        both._elements_of, both._work = None, []
        both._elements = torch.zeros(both._n, dtype=torch.float64, device=self.device)
        both.seen = torch.zeros(both._n, dtype=torch.bool, device=self.device)
        return both

    def finish(
        self,
        out: torch.Tensor,
        signal_rows: torch.Tensor | None = None,
        *,
        keeps_incomplete: bool = False,
        adds: bool = False,
    ) -> Shared:
        """Waits for the collectives and writes the rows of the wholes.

        Args:
            out: Rows to write. [n_rows, 6]
            signal_rows: Rows to write for activations and residual adds. [S, 6]
            keeps_incomplete: Write also what is known of gradients of which a rank has not measured its part.
            adds: Leave what an earlier call has written of others.

        Returns:
            What the ranks have told each other.
        """
        for work in self._work:
            work.wait()  # on a GPU this orders the stream, and the host goes on
        self._work = []
        n, n_signals, n_copied = self._n, self.n_signals, len(self._copied)
        with torch.no_grad():
            sizes = [n, n_signals, n_copied, n_copied, 2, 2, 1, 1]
            magnitudes, signal_magnitudes, high, low, ratios, clock, skipped, is_blind = self._top.split(sizes)
            sums, elements = self._sums[:n, :5], self._sums[:n, 5]
            is_complete = (elements == self._held) & (elements > 0) & (clock.sum() == 0)
            self.seen |= is_complete
            sums[:, 3] -= self._padding
            copies = self._copies.unsqueeze(1)
            differs = (torch.remainder(sums[:, 3:], copies) != 0).any(dim=1)
            largest, smallest = _floats(high), _floats(-low)
            differs[self._copied] |= largest - smallest > self.tolerance * largest
            counts = torch.ceil(sums[:, 3:] / copies)
            whole = torch.cat((sums[:, :3] / copies, _floats(magnitudes).unsqueeze(1), counts), dim=1)  # [K, 6]
            if not adds:
                out.zero_()
            out[:n] = whole if keeps_incomplete else torch.where(is_complete.unsqueeze(1), whole, out[:n])
            signals = self._sums[n:]  # [S, 6]
            flags = torch.cat(
                (is_complete, differs & is_complete, signals[:, 5] * ((clock.sum() == 0) & (is_blind == 0)))
            )
            padded = torch.nn.functional.pad(flags, (0, (self.n_rows - n) * _PACKED - len(flags)))
            out[n:, :_PACKED] += padded.view(-1, _PACKED)
            if signal_rows is not None and n_signals > 0:
                largest = _floats(signal_magnitudes).unsqueeze(1)
                signal_rows[:n_signals] = torch.cat((signals[:, :3], largest, signals[:, 3:5]), dim=1)
            factors = _floats(ratios * self._signs)
            factors = torch.where(factors[1] < 0, 1.0, factors)  # no rank had a gradient large enough to tell
        return Shared(factors[0], factors[1], skipped)

    def unpack(self, rows: FloatArray) -> Reduced:
        """Reads on the host what `finish` has written.

        Args:
            rows: [n_rows, 6]
        """
        n = self._n
        packed = rows[n:, :_PACKED].reshape(-1)
        present, differ = packed[:n] != 0, packed[n : 2 * n] != 0
        signal_numels = packed[2 * n : 2 * n + self.n_signals].astype(np.int64)
        return Reduced(rows[:n], Measured(present, np.where(present, self._numels, 0)), differ, signal_numels)

    def _count_rows(self) -> int:
        return self._n + math.ceil((2 * self._n + self.n_signals) / _PACKED)

    def _collect(self, rows: Mapping[torch.device, torch.Tensor] | None, measured: Measured | None) -> torch.Tensor:
        """Returns this rank's rows in the order of the wholes, zeros where it has none; of shape [K, 6]."""
        local = torch.zeros(self._n, len(STATS), dtype=torch.float64, device=self.device)
        if rows is None or measured is None:
            self._elements_of, self._elements = None, torch.zeros_like(self._elements)
            return local
        if self._elements_of is not measured:
            numels = np.where(measured.present, measured.numels, 0).astype(np.float64)
            elements = torch.zeros_like(self._elements)
            elements[self._slots] = _moved(torch.from_numpy(numels), self.device)
            self._elements_of, self._elements = measured, elements
        for device, part in rows.items():
            local[self._slots_of_rows[device]] = _moved(part, self.device)
        return torch.where(self._elements.unsqueeze(1) > 0, local, 0.0)

    def _collect_signals(self, signals: tuple[torch.Tensor, Measured] | None) -> torch.Tensor:
        """Returns this rank's rows of activations and residual adds, of shape [S, 6]."""
        if signals is None or self.n_signals == 0:
            self._signal_elements = torch.zeros_like(self._signal_elements)
            return torch.zeros(self.n_signals, len(STATS), dtype=torch.float64, device=self.device)
        rows, measured = signals
        numels = torch.from_numpy(measured.numels.astype(np.float64))
        self._signal_elements = _moved(numels, self.device)
        return _moved(rows[: self.n_signals], self.device)

    def _add_up(self, partials: Sequence[PartialGradient], rows: Mapping[torch.device, torch.Tensor] | None) -> None:
        """Adds up gradients over the dimensions of their meshes, one collective for each, and measures them."""
        members: dict[tuple[Any, int, str, torch.dtype], list[int]] = {}
        values = [partial.value for partial in partials]
        for k, partial in enumerate(partials):
            gradient: Any = partial.gradient
            for dim in partial_dims(gradient):
                operation = gradient.placements[dim].reduce_op
                members.setdefault((gradient.device_mesh, dim, operation, partial.value.dtype), []).append(k)
        for (mesh, dim, operation, _), chosen in members.items():
            flat = torch.cat([values[k].reshape(-1) for k in chosen])
            dist.all_reduce(flat, op=_OPERATIONS[operation], group=mesh.get_group(dim))
            if operation == "avg":
                flat /= mesh.size(dim)
            for k, part in zip(chosen, flat.split([values[k].numel() for k in chosen]), strict=True):
                values[k] = part.view_as(values[k])
        if rows is not None:
            for partial, value in zip(partials, values, strict=True):
                self._meter.measure_one(partial.k, value, dict(rows))


def partial_gradients(parameters: Sequence[torch.Tensor | None]) -> list[PartialGradient]:
    """Copies the gradients that still have to be added up over ranks.

    Args:
        parameters: The parameters, None for one that is gone.
    """
    return [one for k, parameter in enumerate(parameters) for one in partial_gradient(k, parameter)]


def partial_gradient(k: int, parameter: torch.Tensor | None) -> list[PartialGradient]:
    """Copies the gradient of parameter k if it still has to be added up; otherwise returns nothing."""
    gradient = None if parameter is None else parameter.grad
    if gradient is None or not partial_dims(gradient):
        return []
    return [PartialGradient(k, local_of(gradient).detach().clone(), gradient)]


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Returns float64 values as integers, which are in the same order if the values are not negative."""
    return values.contiguous().view(torch.int64)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device; the host waits only if the device is the host."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float64)


def _on(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Returns a value as float64 tensor on a device, 0-d."""
    if isinstance(value, torch.Tensor):
        return _moved(value.detach().reshape(()), device).double()
    return torch.full((), value, dtype=torch.float64, device=device)
