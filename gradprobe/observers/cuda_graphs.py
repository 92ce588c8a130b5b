"""Rows that CUDA graphs write.

A graph records the kernels that run while it is captured. Each replay runs them again, without Python and on the same
rows; a flag on the device tells them whether to write. The rows then tell which graphs ran in a step.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from gradprobe import ops
from gradprobe.observers.event_rows import EventRows, EventTable, PythonEventRows
from gradprobe.ops.rows import ABS_MAX, N_NONFINITE
from gradprobe.ops.transfer import to_device
from gradprobe.snapshot.records import FloatArray, IntArray

_NOT_WRITTEN = -1.0  # impossible as a largest magnitude
_PACKED = N_NONFINITE  # element counts per row; a value in this column would be read as non-finite elements

_captured: list[GraphRows] = []  # a graph uses these rows and their flag for as long as it lives


def can_capture(device: torch.device) -> bool:
    """Returns whether a device can capture graphs."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Returns whether a graph is being captured, so that kernels on the device are recorded instead of run."""
    return can_capture(device) and torch.cuda.is_current_stream_capturing()


def n_rows(n_sites: int, device: torch.device) -> int:
    """Returns the number of rows that a signal buffer writes: S, plus those for element counts if there are graphs."""
    return n_sites + (math.ceil(n_sites / _PACKED) if can_capture(device) else 0)


def unpack_numels(rows: FloatArray, n_sites: int) -> IntArray:
    """Reads the number of elements observed at each site, [S], from the rows of a signal buffer, [n_rows, 6]."""
    return rows[n_sites:, :_PACKED].reshape(-1)[:n_sites].astype(np.int64)


class NoGraphRows:
    """Stands in for `GraphRows` on a device without graphs."""

    n_events = 0
    may_capture = is_wanted = False
    _nothing = nullcontext()

    def open_rows(self, eager: EventRows) -> EventRows:
        """Returns `eager`."""
        return eager

    def counting(self) -> AbstractContextManager[None]:
        """Returns a context that changes nothing."""
        return self._nothing

    def switch(self, is_on: bool) -> None:
        """Does nothing: no kernel is replayed."""

    def append_to(self, eager: EventTable, out: torch.Tensor) -> EventTable:
        """Appends nothing."""
        return eager

    def forget(self) -> None:
        """Does nothing: there are no rows."""


class GraphRows(PythonEventRows):
    """Rows whose events are noted when a graph is captured, and stay.

    Attributes:
        may_capture: Whether graphs captured from now on are to contain measurements.

    Args:
        device: Where the rows lie.
        n_sites: Number of sites, S.
    """

    fill = _NOT_WRITTEN

    def __init__(self, device: torch.device, n_sites: int) -> None:
        super().__init__(device, 2 * n_sites + 1)  # the graph that needs more allocates them in its own memory
        self.may_capture = True
        self._n_sites = n_sites
        with torch.inference_mode(False):
            self._flag = torch.ones((), dtype=torch.int32, device=device)
        self._is_on = True
        self._saved: list[torch.Tensor] | None = None  # blocks as they were when the flag went off in this step
        self._event_sites = self._event_numels = torch.empty(0, device="cpu")  # of all events, on the device

    @property
    def is_wanted(self) -> bool:
        """Whether a graph is being captured that must contain the measurements, whatever the current step needs."""
        return self.may_capture and is_capturing(self._device)

    def open_rows(self, eager: EventRows) -> EventRows:
        """Returns the rows for an event that happens now: these during a capture, otherwise `eager`."""
        return self if is_capturing(self._device) else eager

    def counting(self) -> AbstractContextManager[None]:
        """Returns a context in which captured operators check the flag before they write statistics."""
        if not is_capturing(self._device):
            return nullcontext()
        if self not in _captured:
            _captured.append(self)
        return ops.counting_if(self._flag)

    def switch(self, is_on: bool) -> None:
        """Sets whether replays write statistics from now on; anything else written while they must not is undone."""
        if is_on == self._is_on:
            return
        self._is_on = is_on
        self._flag.fill_(int(is_on))
        if not is_on:
            self._saved = [block.clone() for block in self._blocks]
            return
        # kernels that check no flag, and copies of rows that were not written, have run meanwhile
        saved, self._saved = self._saved, None
        self.forget()
        for block, values in zip(self._blocks, saved or [], strict=False):  # a later capture may have added blocks
            block.copy_(values)

    def append_to(self, eager: EventTable, out: torch.Tensor) -> EventTable:
        """Appends the events of all captured graphs to those of a step, and writes the element counts of both.

        Args:
            eager: The step's N events outside graphs.
            out: The rows that the signal buffer writes; not on this device if the model has moved. [n_rows, 6]

        Returns:
            `eager` and the G events in graphs, these without numbers of elements. The row of an event that has not
            happened since the last `forget` is zero.
        """
        if out.device != self._device:  # the graphs stayed on the device that the model has left
            return eager
        sites, numels, smallest_normals, pool = eager
        graph_sites, graph_numels, graph_normals, graph_rows = self.events()
        n_events = len(graph_sites)
        if n_events != len(self._event_sites):
            self._event_sites = to_device(torch.from_numpy(graph_sites), self._device)
            self._event_numels = to_device(torch.from_numpy(graph_numels).double(), self._device)
        graph_rows = graph_rows[1 : 1 + n_events]
        is_written = graph_rows[:, ABS_MAX] != _NOT_WRITTEN
        eager_numels = np.bincount(sites, weights=numels, minlength=self._n_sites).astype(np.float64)  # [S]
        total = to_device(torch.from_numpy(eager_numels), self._device)
        total = total.index_add(0, self._event_sites, self._event_numels * is_written)
        packed = out[self._n_sites :]
        padded = torch.nn.functional.pad(total, (0, len(packed) * _PACKED - self._n_sites))
        packed[:, :_PACKED].copy_(padded.view(len(packed), _PACKED))
        graph_rows = torch.where(is_written.unsqueeze(1), graph_rows, 0.0)
        return (
            np.concatenate((sites, graph_sites)),
            numels,
            np.concatenate((smallest_normals, graph_normals)),
            torch.cat((pool[: 1 + len(sites)], graph_rows)),
        )

    def forget(self) -> None:
        """Marks all rows as not written."""
        self._rows_of.clear()
        self._saved = None
        for block in self._blocks:
            block[:, ABS_MAX].fill_(_NOT_WRITTEN)


def make_graph_rows(device: torch.device, n_sites: int) -> GraphRows | NoGraphRows:
    """Makes the rows for graphs on a device, or their stand-in if the device has no graphs."""
    return GraphRows(device, n_sites) if can_capture(device) else NoGraphRows()
