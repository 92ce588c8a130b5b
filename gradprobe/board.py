"""The open step's statistics of tensors that pass by in forward and backward, in the order in which they came."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

from gradprobe import ops
from gradprobe.measured import Events, FloatArray, Measured

_FIRST_EVENTS = 64


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
        self.enabled = True  # the one switch of all that writes here, operators in compiled graphs included
        self._n_sites = n_sites
        self._device = device
        self._backend_name = backend
        self._backends = {device: ops.resolve(backend, device)}
        self._lock = threading.Lock()  # each device's part of a backward runs in a thread of its own
        self._sites: list[int] = []  # of the events so far
        self._numels: list[int] = []
        self._dtypes: dict[int, torch.dtype] = {}  # of the sites so far, since attach
        self._smallest_normal: FloatArray | None = None  # [S], None where a dtype has changed
        # by identity, since one module's output is another's input: the tensor, its version, its row
        self._rows_of: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._blocks: list[torch.Tensor] = []  # [N, 6] each; the very first row stays zero, for padding
        self._rows: list[torch.Tensor] = []  # of all blocks, [1, 6] each: viewed once
        self._grow(_FIRST_EVENTS)
        self._last_sites: tuple[int, ...] | None = None
        self._last_gather = torch.empty(0)

    @property
    def n_events(self) -> int:
        """Number of events since the step began."""
        return len(self._sites)

    def write(self, site: int, tensor: torch.Tensor) -> None:
        """Takes the statistics of a tensor as it is now; from an earlier event where it has not changed since.

        What is written to a tensor by way of its `.data` does not count as a change.

        Args:
            site: Position of the site.
            tensor: Real or complex, of floating point; any layout and device.
        """
        known = self._rows_of.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            self._next_row(site, tensor.numel(), tensor.dtype).copy_(known[2])
        else:
            self._remember(tensor, self.write_anew(site, tensor))

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
            row = self._next_row(site, values.numel(), values.dtype)
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
        kept = self._next_row(site, tensor.numel(), tensor.dtype)
        kept.copy_(row, non_blocking=True)
        self._remember(tensor, kept)

    def put_apart(self, site: int, row: torch.Tensor, numel: int) -> None:
        """Takes a row of what is no tensor of the training.

        Args:
            site: Position of the site.
            row: Raw row, float64. [1, 6]
            numel: Number of elements behind it.
        """
        self._next_row(site, numel, None).copy_(row, non_blocking=True)

    def close(self, out: torch.Tensor) -> Events:
        """Writes the rows of the sites, and starts over.

        Args:
            out: Float64 rows to write; those of sites without an event become zero. [S, 6]

        Returns:
            What passed by.
        """
        sites = tuple(self._sites)
        numels = np.bincount(sites, weights=self._numels, minlength=self._n_sites).astype(np.int64)  # [S]
        if sites != self._last_sites:
            self._last_sites, self._last_gather = sites, self._gather_of(sites)
        pool = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)  # [N, 6]
        rows = pool[self._last_gather]  # [S, M, 6]
        with torch.no_grad():
            out.copy_(rows[:, 0] if rows.shape[1] == 1 else ops.merge_rows(rows))
        self.clear()
        if out.device != self._device:  # the model has moved
            self._device = out.device
            self._backends[out.device] = ops.resolve(self._backend_name, out.device)
            self._blocks, self._rows, self._last_sites = [], [], None
            self._grow(len(pool))
        present = np.zeros(self._n_sites, dtype=np.bool_)
        present[list(sites)] = True
        return Events(sites, Measured(present, numels), self._smallest_normals())

    def clear(self) -> None:
        """Forgets the events so far."""
        self._sites.clear()
        self._numels.clear()
        self._rows_of.clear()

    def _remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        if tensor.layout is torch.strided and not tensor.is_inference():  # which counts no versions
            self._rows_of[id(tensor)] = (weakref.ref(tensor), tensor._version, row)

    def _smallest_normals(self) -> FloatArray:
        if self._smallest_normal is None:
            self._smallest_normal = np.full(self._n_sites, np.nan)
            for site, dtype in self._dtypes.items():
                self._smallest_normal[site] = torch.finfo(dtype).smallest_normal
        return self._smallest_normal

    def _next_row(self, site: int, numel: int, dtype: torch.dtype | None) -> torch.Tensor:
        with self._lock:
            if dtype is not None and self._dtypes.get(site) is not dtype:
                self._dtypes[site], self._smallest_normal = dtype, None
            self._sites.append(site)
            self._numels.append(numel)
            if len(self._sites) == len(self._rows):
                self._grow(len(self._rows))
            return self._rows[len(self._sites)]

    def _grow(self, n_rows: int) -> None:
        # rows that were handed out stay: another thread may be about to write to one
        self._blocks.append(torch.zeros(n_rows, len(ops.STATS), dtype=torch.float64, device=self._device))
        self._rows.extend(self._blocks[-1].unsqueeze(1).unbind())

    def _gather_of(self, sites: tuple[int, ...]) -> torch.Tensor:
        """Rows of the pool for each site, filled up with the zero row. Shape [S, M]."""
        rows_of: list[list[int]] = [[] for _ in range(self._n_sites)]
        for row, site in enumerate(sites, start=1):
            rows_of[site].append(row)
        longest = max(1, *map(len, rows_of)) if rows_of else 1
        padded = [rows + [0] * (longest - len(rows)) for rows in rows_of]
        gather = torch.tensor(padded, dtype=torch.int64).reshape(self._n_sites, longest)
        return gather.to(self._device)
