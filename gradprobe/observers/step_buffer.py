"""The open step's statistics of tensors that pass by in forward and backward."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gradprobe import ops
from gradprobe.errors import warn_user
from gradprobe.observers import cuda_graphs
from gradprobe.observers.cuda_graphs import GraphRows
from gradprobe.observers.event_rows import EventRows, PythonEventRows, make_rows
from gradprobe.snapshot.records import Events, FloatArray, IntArray, Measured

_PACKED = 5  # numbers of elements in a row: the last column would count as values that are not finite


class Gate:
    """What a hook asks first: one attribute, since a hook that finds its code out of the caches waits for each line.

    Attributes:
        is_open: Whether anything that passes by may be observed now.
    """

    __slots__ = ("is_open",)

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open


class StepBuffer:
    """Collects one row for each event; a site that has several in a step gets them merged at its end.

    Rows are written where the tensors are, without waiting for the device and, once there are rows enough, without an
    allocation. What a CUDA graph captures has rows of its own, which each replay writes.

    Attributes:
        gate: Closed while nothing can be observed, whatever `enabled` depends on.

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
        self._graphs = self._make_graph_rows()
        self._is_retired = False
        self.gate = Gate(is_open=True)
        self._has_told = False
        self._last_plan: _Plan | None = None

    @property
    def enabled(self) -> bool:
        """Whether what passes by is observed; while a graph is captured always, since the graph asks when it runs."""
        return self.rows.enabled or (self._is_capturing() and not self._is_retired)

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.rows.enabled = enabled
        if self._graphs is not None:
            self._graphs.switch(enabled)
        self._set_gate()

    def retire(self) -> None:
        """Observes nothing from now on."""
        self._is_retired = True
        self.enabled = False

    @property
    def n_events(self) -> int:
        """Number of events since the step began, those that graphs may have had included."""
        return self.rows.n_events + (0 if self._graphs is None else self._graphs.n_events)

    def is_full(self) -> bool:
        """Tells whether the step has had so many events that nobody seems to close it; warns the first time."""
        if not self.rows.is_full:
            return False
        if not self._has_told:
            self._has_told = True
            warn_user(
                f"{self.rows.n_events:,} tensors have passed by since a step was last closed: outputs and gradients of "
                "modules are not observed until it is. Call step() once per step, or give attach the optimizer"
            )
        return True

    def counting(self) -> AbstractContextManager[None]:
        """Surrounds operators that give statistics: captured in a graph, they are to ask whether these are wanted."""
        return self._graphs.capturing() if self._graphs is not None and self._is_capturing() else nullcontext()

    def write(self, site: int, tensor: torch.Tensor) -> None:
        """Takes the statistics of a tensor as it is now; from an earlier event where it has not changed since.

        What is written to a tensor by way of its `.data` does not count as a change.

        Args:
            site: Position of the site.
            tensor: Real or complex, of floating point; any layout and device.
        """
        known = self._open_rows().known(tensor)
        if known is not None:
            self._next(site, tensor).copy_(known)
        else:
            self._open_rows().remember(tensor, self.write_anew(site, tensor))

    def write_anew(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the statistics of a tensor that may have changed untold: compiled code counts no versions.

        Args:
            site: Position of the site.
            tensor: As for `write`.

        Returns:
            Its row. [1, 6]
        """
        with torch.no_grad(), self.counting():
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
        self._open_rows().remember(tensor, kept)

    def put_apart(self, site: int, row: torch.Tensor, numel: int) -> None:
        """Takes a row of what is no tensor of the training.

        Args:
            site: Position of the site.
            row: Raw row, float64. [1, 6]
            numel: Number of elements behind it.
        """
        self._open_rows().next(site, numel, math.nan).copy_(row, non_blocking=True)

    def close(self, out: torch.Tensor) -> Events:
        """Writes the rows of the sites, and starts over.

        Args:
            out: Float64 rows to write; those of sites without an event become zero. [S, 6], or more on a device with
                graphs: `n_rows` tells.

        Returns:
            What passed by.
        """
        sites, numels, of_dtypes, pool = self.rows.events()
        # a model that has left the device of its graphs has left what they saw
        has_graphs = self._graphs is not None and self._graphs.n_events > 0 and out.device == self._device
        numels_of_graphs = None  # [S]
        if self._graphs is not None and has_graphs:
            sites_of_graphs, dtypes_of_graphs, rows_of_graphs, numels_of_graphs = self._graphs.collect(self._n_sites)
            pool = torch.cat((pool[: 1 + len(sites)], rows_of_graphs))
            sites, of_dtypes = np.concatenate((sites, sites_of_graphs)), np.concatenate((of_dtypes, dtypes_of_graphs))
        plan = self._plan_of(sites, numels, of_dtypes, has_graphs)
        if numels_of_graphs is not None:
            own_numels = torch.tensor(plan.events.measured.numels).to(self._device, non_blocking=True)
            _pack(numels_of_graphs + own_numels, out[self._n_sites :])
        rows = pool[plan.gather]  # [S, M, 6]
        with torch.no_grad():
            out[: self._n_sites].copy_(rows[:, 0] if rows.shape[1] == 1 else ops.merge_rows(rows))
        self.clear()
        if out.device != self._device:  # the model has moved
            self._device, self._last_plan = out.device, None
            self._backends[out.device] = ops.resolve(self._backend_name, out.device)
            left, self.rows = self.rows, PythonEventRows(out.device, len(pool))
            self.rows.enabled, left.enabled = left.enabled, False  # hooks of graphs that live on write there
            self._graphs = self._make_graph_rows()
            self._set_gate()
        return plan.events

    def clear(self) -> None:
        """Forgets the events so far."""
        self.rows.clear()
        if self._graphs is not None and self._graphs.n_events > 0:
            self._graphs.forget()

    def _set_gate(self) -> None:
        may_capture = self._graphs is not None and not self._is_retired
        self.gate.is_open = self.rows.enabled or may_capture

    def _is_capturing(self) -> bool:
        return cuda_graphs.is_capturing(self._device)

    def _make_graph_rows(self) -> GraphRows | None:
        return GraphRows(self._device, 2 * self._n_sites + 1) if cuda_graphs.can_capture(self._device) else None

    def _open_rows(self) -> EventRows:
        """The rows of what happens now."""
        return self._graphs if self._graphs is not None and self._is_capturing() else self.rows

    def _next(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        return self._open_rows().next(site, tensor.numel(), _smallest_normal(tensor.dtype))

    def _plan_of(self, sites: IntArray, numels: IntArray, of_dtypes: FloatArray, has_graphs: bool) -> _Plan:
        """The plan for a step with these events [N], those of graphs last: they have no `numels`."""
        key = (sites.tobytes(), numels.tobytes(), of_dtypes.tobytes())
        if self._last_plan is not None and self._last_plan.key == key:
            return self._last_plan
        at_sites = np.bincount(sites[: len(numels)], weights=numels, minlength=self._n_sites).astype(np.int64)  # [S]
        present = np.zeros(self._n_sites, dtype=np.bool_)
        present[sites] = True
        smallest_normal = np.full(self._n_sites, np.nan)  # [S]
        smallest_normal[sites] = of_dtypes
        if self._last_plan is not None:
            known = self._last_plan.events.smallest_normal  # the history shares one
            smallest_normal = known if np.array_equal(smallest_normal, known, equal_nan=True) else smallest_normal
        for shared in (present, at_sites, smallest_normal):
            shared.flags.writeable = False
        events = Events(tuple(sites.tolist()), Measured(present, at_sites), smallest_normal, has_graphs)
        self._last_plan = _Plan(key, events, self._gather_of(events.sites))
        return self._last_plan

    def _gather_of(self, sites: tuple[int, ...]) -> torch.Tensor:
        """Rows of the pool for each site, filled up with the zero row. Shape [S, M]."""
        rows_of: list[list[int]] = [[] for _ in range(self._n_sites)]
        for row, site in enumerate(sites, start=1):
            rows_of[site].append(row)
        longest = max(1, *map(len, rows_of)) if rows_of else 1
        padded = [rows + [0] * (longest - len(rows)) for rows in rows_of]
        gather = torch.tensor(padded, dtype=torch.int64).reshape(self._n_sites, longest)
        return gather.to(self._device)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the rows of a step go, the same for all steps with the same events.

    Attributes:
        key: Bytes of the sites, the numbers of elements and the dtypes. Fewer numbers than sites: graphs took part.
        events: The events, which the history shares.
        gather: Rows of the pool for each site. [S, M]
    """

    key: tuple[bytes, bytes, bytes]
    events: Events
    gather: torch.Tensor


def n_rows(n_sites: int, device: torch.device) -> int:
    """Counts the rows that a buffer writes at the end of a step.

    Args:
        n_sites: Number of sites, S.
        device: Where the rows lie.

    Returns:
        S; more where graphs may run, behind which elements are counted on the device.
    """
    return n_sites + (math.ceil(n_sites / _PACKED) if cuda_graphs.can_capture(device) else 0)


def unpack(rows: FloatArray, n_sites: int) -> IntArray:
    """Gives the number of elements that graphs and others have observed at each site.

    Args:
        rows: All that a buffer wrote. [n_rows, 6]
        n_sites: Number of sites, S.

    Returns:
        The numbers. [S]
    """
    return rows[n_sites:, :_PACKED].reshape(-1)[:n_sites].astype(np.int64)


def _pack(numels: torch.Tensor, out: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(numels.double(), (0, len(out) * _PACKED - len(numels)))
    out[:, :_PACKED].copy_(padded.view(len(out), _PACKED))


@cache
def _smallest_normal(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).smallest_normal)
