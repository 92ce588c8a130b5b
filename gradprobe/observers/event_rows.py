"""Rows of what passes by in the open step, in the order in which it came."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import numpy as np
import torch

from gradprobe import ops
from gradprobe.ops import libraries
from gradprobe.snapshot.records import FloatArray, IntArray

_FIRST_EVENTS = 64
MOST_EVENTS = 2**20  # of a step: a step that nobody closes is not to fill the memory


class EventRows(Protocol):
    """Rows of events; `EventRows` of the C++ module, on the CPU, and `PythonEventRows` both are one."""

    enabled: bool  # the one switch of all that writes here, operators in compiled graphs included

    @property
    def n_events(self) -> int:
        """Number of events since the last clearing."""

    @property
    def is_full(self) -> bool:
        """Whether there are `MOST_EVENTS`; later ones are not kept."""

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Gives the row [1, 6] of a new event, to be written; the last is of the dtype, NaN where there is none."""

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Gives the row of a tensor that was remembered, [1, 6]; None where it was written to since."""

    def remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        """Notes that a row that `next` gave is of this very tensor."""

    def events(self) -> tuple[IntArray, IntArray, FloatArray, torch.Tensor]:
        """Gives what `next` was told of N events [N], and rows of them, a zero row first. [1 + N, 6] or more."""

    def clear(self) -> None:
        """Forgets all events."""


class PythonEventRows:
    """The twin of the C++ rows, on any device: without an allocation once there are rows enough.

    Attributes:
        fill: What a row holds before it is written.

    Args:
        device: Where the rows lie.
        n_rows: Number of rows to begin with.
    """

    fill = 0.0

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

    @property
    def is_full(self) -> bool:
        """Whether there are `MOST_EVENTS`; later ones are not kept."""
        return len(self._sites) >= MOST_EVENTS

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Gives the row [1, 6] of a new event, to be written; the last is of the dtype, NaN where there is none."""
        with self._lock:
            if self.is_full:
                return torch.empty_like(self._rows[0])
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
        # an inference tensor counts no versions; once there are rows enough, this may be nobody's
        if tensor.layout is torch.strided and not tensor.is_inference() and not self.is_full:
            self._rows_of[id(tensor)] = (weakref.ref(tensor), tensor._version, row)

    def events(self) -> tuple[IntArray, IntArray, FloatArray, torch.Tensor]:
        """Gives what `next` was told of N events [N], and rows of them, a zero row first. [1 + N, 6] or more."""
        rows = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
        sites, numels = np.array(self._sites, dtype=np.int64), np.array(self._numels, dtype=np.int64)
        return sites, numels, np.array(self._smallest_normals, dtype=np.float64), rows

    def clear(self) -> None:
        """Forgets all events."""
        self._sites.clear()
        self._numels.clear()
        self._smallest_normals.clear()
        self._rows_of.clear()

    def _grow(self, n_rows: int) -> None:
        # rows that were handed out stay: another thread may be about to write to one
        self._blocks.append(torch.full((n_rows, len(ops.STATS)), self.fill, dtype=torch.float64, device=self._device))
        self._rows.extend(self._blocks[-1].unsqueeze(1).unbind())


def make_rows(device: torch.device, backend: str) -> EventRows:
    """Makes the rows of a buffer: in C++ where that is built, for the native kernels on the CPU.

    Args:
        device: Where the rows lie.
        backend: Name of the backend, or "auto".

    Returns:
        The rows, without an event.
    """
    module, _ = libraries.native_hooks()
    if module is None or device.type != "cpu" or ops.resolve(backend, device).name != "native":
        return PythonEventRows(device)
    rows: EventRows = module.EventRows(MOST_EVENTS)
    return rows
