"""The open step's statistics of tensors that pass by in forward and backward, in the order in which they came."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch

from gradprobe import ops
from gradprobe.measured import Events, Measured
from gradprobe.ops.native import native_hooks

_FIRST_EVENTS = 64


class RowLog(Protocol):
    """Rows of events; `SignalRows` of the C++ module, on the CPU, and `PythonRows` both are one."""

    enabled: bool  # the one switch of all that writes here, operators in compiled graphs included

    @property
    def n_events(self) -> int:
        """Number of events since the last clearing."""

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Gives the row [1, 6] of a new event, to be written; the last is of the dtype, NaN where there is none."""

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Gives the row of a tensor that was remembered, [1, 6]; None where it was written to since."""

    def remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        """Notes that a row that `next` gave is of this very tensor."""

    def events(self) -> tuple[Sequence[int], Sequence[int], Sequence[float], torch.Tensor]:
        """Gives what `next` was told of N events, and their rows, a zero row first: N, N, N, at least [1 + N, 6]."""

    def clear(self) -> None:
        """Forgets all events."""


class PythonRows:
    """The twin of the C++ rows, on any device: without an allocation once there are rows enough.

    Args:
        device: Where the rows lie.
        n_rows: Number of rows to begin with.
    """

    def __init__(self, device: torch.device, n_rows: int = _FIRST_EVENTS) -> None:
        self.enabled = True
        self._device = device
        self._lock = threading.Lock()  # each device's part of a backward runs in a thread of its own
        self._sites: list[int] = []
        self._numels: list[int] = []
        self._smallest_normals: list[float] = []
        # by identity, since one module's output is another's input: the tensor, its version, its row
        self._rows_of: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._blocks: list[torch.Tensor] = []  # [N, 6] each; the very first row stays zero
        self._rows: list[torch.Tensor] = []  # of all blocks, [1, 6] each: viewed once
        self._grow(n_rows)

    @property
    def n_events(self) -> int:
        """Number of events since the last clearing."""
        return len(self._sites)

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Gives the row [1, 6] of a new event, to be written; the last is of the dtype, NaN where there is none."""
        with self._lock:
            self._sites.append(site)
            self._numels.append(numel)
            self._smallest_normals.append(smallest_normal)
            if len(self._sites) == len(self._rows):
                self._grow(len(self._rows))
            return self._rows[len(self._sites)]

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Gives the row of a tensor that was remembered, [1, 6]; None where it was written to since."""
        known = self._rows_of.get(id(tensor))
        return known[2] if known is not None and known[0]() is tensor and known[1] == tensor._version else None

    def remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        """Notes that a row that `next` gave is of this very tensor."""
        if tensor.layout is torch.strided and not tensor.is_inference():  # which counts no versions
            self._rows_of[id(tensor)] = (weakref.ref(tensor), tensor._version, row)

    def events(self) -> tuple[Sequence[int], Sequence[int], Sequence[float], torch.Tensor]:
        """Gives what `next` was told of N events, and their rows, a zero row first: N, N, N, at least [1 + N, 6]."""
        rows = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
        return tuple(self._sites), tuple(self._numels), tuple(self._smallest_normals), rows

    def clear(self) -> None:
        """Forgets all events."""
        self._sites.clear()
        self._numels.clear()
        self._smallest_normals.clear()
        self._rows_of.clear()

    def _grow(self, n_rows: int) -> None:
        # rows that were handed out stay: another thread may be about to write to one
        self._blocks.append(torch.zeros(n_rows, len(ops.STATS), dtype=torch.float64, device=self._device))
        self._rows.extend(self._blocks[-1].unsqueeze(1).unbind())


def make_rows(device: torch.device, backend: str) -> RowLog:
    """Makes the rows of a board: in C++ where that is built, for the native kernels on the CPU.

    Args:
        device: Where the rows lie.
        backend: Name of the backend, or "auto".

    Returns:
        The rows, without an event.
    """
    module, _ = native_hooks()
    if module is None or device.type != "cpu" or ops.resolve(backend, device).name != "native":
        return PythonRows(device)
    rows: RowLog = module.SignalRows()
    return rows


class Board:
    """Collects one row for each event; a site that has several in a step gets them merged at its end.

    Rows are written where the tensors are, without waiting for the device and, once there are rows enough, without an
    allocation.

    Args:
        n_sites: Number of sites, S.
        device: Where the rows lie; those of tensors elsewhere travel.
        backend: Name of the backend, or "auto".

    Raises:
        BackendError: The backend cannot run on the device.
    """

    def __init__(self, n_sites: int, device: torch.device, backend: str) -> None:
        self._n_sites = n_sites
        self._device = device
        self._backend_name = backend
        self._backends = {device: ops.resolve(backend, device)}
        self.rows = make_rows(device, backend)
        self._last_sites: tuple[int, ...] | None = None
        self._last_gather = torch.empty(0)
        self._last_smallest_normal = np.empty(0)

    @property
    def enabled(self) -> bool:
        """Whether what passes by is observed."""
        return self.rows.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.rows.enabled = enabled

    @property
    def n_events(self) -> int:
        """Number of events since the step began."""
        return self.rows.n_events

    def write(self, site: int, tensor: torch.Tensor) -> None:
        """Takes the statistics of a tensor as it is now; from an earlier event where it has not changed since.

        What is written to a tensor by way of its `.data` does not count as a change.

        Args:
            site: Position of the site.
            tensor: Real or complex, of floating point; any layout and device.
        """
        known = self.rows.known(tensor)
        if known is not None:
            self._next(site, tensor).copy_(known)
        else:
            self.rows.remember(tensor, self.write_anew(site, tensor))

    def write_anew(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the statistics of a tensor that may have changed untold: compiled code counts no versions.

        Args:
            site: Position of the site.
            tensor: As for `write`.

        Returns:
            Its row. [1, 6]
        """
        with torch.no_grad():
            values = ops.dense_values(tensor)
            row = self._next(site, values)
            if values.device == self._device:
                self._backends[self._device].grad_stats_into([values], row)
                return row
            if values.device not in self._backends:
                self._backends[values.device] = ops.resolve(self._backend_name, values.device)
            away = torch.empty(1, len(ops.STATS), dtype=torch.float64, device=values.device)  # [1, 6]
            self._backends[values.device].grad_stats_into([values], away)
            return row.copy_(away, non_blocking=True)

    def put(self, site: int, row: torch.Tensor, tensor: torch.Tensor) -> None:
        """Takes the statistics that an operator has made of a tensor.

        Args:
            site: Position of the site.
            row: Raw row, float64. [1, 6]
            tensor: What it is of.
        """
        kept = self._next(site, tensor)
        kept.copy_(row, non_blocking=True)
        self.rows.remember(tensor, kept)

    def put_apart(self, site: int, row: torch.Tensor, numel: int) -> None:
        """Takes a row of what is no tensor of the training.

        Args:
            site: Position of the site.
            row: Raw row, float64. [1, 6]
            numel: Number of elements behind it.
        """
        self.rows.next(site, numel, math.nan).copy_(row, non_blocking=True)

    def close(self, out: torch.Tensor) -> Events:
        """Writes the rows of the sites, and starts over.

        Args:
            out: Float64 rows to write; those of sites without an event become zero. [S, 6]

        Returns:
            What passed by.
        """
        passed, n_elements, of_dtypes, pool = self.rows.events()
        sites = tuple(passed)
        numels = np.bincount(sites, weights=n_elements, minlength=self._n_sites).astype(np.int64)  # [S]
        if sites != self._last_sites:
            self._last_sites, self._last_gather = sites, self._gather_of(sites)
        rows = pool[self._last_gather]  # [S, M, 6]
        with torch.no_grad():
            out.copy_(rows[:, 0] if rows.shape[1] == 1 else ops.merge_rows(rows))
        self.clear()
        if out.device != self._device:  # the model has moved
            self._device, self._last_sites = out.device, None
            self._backends[out.device] = ops.resolve(self._backend_name, out.device)
            left, self.rows = self.rows, PythonRows(out.device, len(pool))
            self.rows.enabled, left.enabled = left.enabled, False  # hooks of graphs that live on write there
        present = np.zeros(self._n_sites, dtype=np.bool_)
        present[list(sites)] = True
        smallest_normal = np.full(self._n_sites, np.nan)  # [S]
        smallest_normal[list(sites)] = of_dtypes
        if not np.array_equal(smallest_normal, self._last_smallest_normal, equal_nan=True):  # the history shares one
            self._last_smallest_normal = smallest_normal
        return Events(sites, Measured(present, numels), self._last_smallest_normal)

    def clear(self) -> None:
        """Forgets the events so far."""
        self.rows.clear()

    def _next(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        return self.rows.next(site, tensor.numel(), _smallest_normal(tensor.dtype))

    def _gather_of(self, sites: tuple[int, ...]) -> torch.Tensor:
        """Rows of the pool for each site, filled up with the zero row. Shape [S, M]."""
        rows_of: list[list[int]] = [[] for _ in range(self._n_sites)]
        for row, site in enumerate(sites, start=1):
            rows_of[site].append(row)
        longest = max(1, *map(len, rows_of)) if rows_of else 1
        padded = [rows + [0] * (longest - len(rows)) for rows in rows_of]
        gather = torch.tensor(padded, dtype=torch.int64).reshape(self._n_sites, longest)
        return gather.to(self._device)


@cache
def _smallest_normal(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).smallest_normal)
