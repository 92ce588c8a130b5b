"""Rows of the events of the open step, in order of arrival. An event is one tensor observed at one site."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from gradprobe import ops
from gradprobe.ops import libraries
from gradprobe.snapshot.records import FloatArray, IntArray

_FIRST_EVENTS = 64
MOST_EVENTS = 2**20  # per step: a step that is never closed must not fill the memory

# The sites, numbers of elements and smallest normal numbers of N events [N]; their rows behind a zero row [1 + N, 6].
EventTable = tuple[IntArray, IntArray, FloatArray, torch.Tensor]


class EventRows(Protocol):
    """Rows of events: in C++ `EventRows` of `_hooks`, on the CPU, and `DeviceEventRows`; else `PythonEventRows`."""

    enabled: bool  # read by everything that writes here, including operators in compiled graphs

    @property
    def n_events(self) -> int:
        """Number of events since the last clearing."""

    @property
    def is_full(self) -> bool:
        """Whether there are `MOST_EVENTS`; later ones are dropped."""

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Adds an event and returns its row [1, 6], to be written. `smallest_normal` is NaN if there is no tensor."""

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the row remembered for a tensor, [1, 6]; None if there is none or the tensor has changed since."""

    def remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        """Notes that a row returned by `next` holds the statistics of this tensor."""

    def events(self) -> EventTable:
        """Returns the arguments of `next` for all N events, and their rows."""

    def clear(self) -> None:
        """Forgets all events."""

    def is_off(self, site: int) -> bool:
        """Returns whether a site is switched off: measuring it has failed."""

    def switch_off(self, site: int, n_sites: int) -> None:
        """Switches off `n_sites` sites from `site` on."""

    def off_sites(self) -> list[int]:
        """Lists the sites that are switched off. Some events of the same step may lack their rows there."""

    def take_errors(self) -> list[tuple[int, str]]:
        """Returns the errors in C++ since the last call: the first of the sites that each switched off, the message."""


class PythonEventRows:
    """Python implementation of the rows, on any device. Allocates only while the number of rows grows.

    Attributes:
        fill: Value of a row's elements before it is written.

    Args:
        device: Where the rows lie.
        n_rows: Initial number of rows.
    """

    fill = 0.0

    def __init__(self, device: torch.device, n_rows: int = _FIRST_EVENTS) -> None:
        self.enabled = True
        self._device = device
        self._lock = threading.Lock()  # a backward pass runs one thread per device
        self._sites: list[int] = []
        self._numels: list[int] = []
        self._smallest_normals: list[float] = []
        # by identity, since one module's output is another's input: the tensor, its version, its row
        self._rows_of: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
        self._blocks: list[torch.Tensor] = []  # [N, 6] each; the very first row stays zero
        self._rows: list[torch.Tensor] = []  # views of the rows of all blocks, [1, 6] each
        self._off: set[int] = set()  # sites
        self._grow(n_rows)

    @property
    def n_events(self) -> int:
        """Number of events since the last clearing."""
        return len(self._sites)

    @property
    def is_full(self) -> bool:
        """Whether there are `MOST_EVENTS`; later ones are dropped."""
        return len(self._sites) >= MOST_EVENTS

    def next(self, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        """Adds an event and returns its row [1, 6], to be written. `smallest_normal` is NaN if there is no tensor."""
        with self._lock:
            if self.is_full:
                return torch.empty_like(self._rows[0])
            if len(self._sites) + 1 == len(self._rows):
                self._grow(len(self._rows))
            self._sites.append(site)
            self._numels.append(numel)
            self._smallest_normals.append(smallest_normal)
            return self._rows[len(self._sites)]

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the row remembered for a tensor, [1, 6]; None if there is none or the tensor has changed since."""
        known = self._rows_of.get(id(tensor))
        return known[2] if known is not None and known[0]() is tensor and known[1] == tensor._version else None

    def remember(self, tensor: torch.Tensor, row: torch.Tensor) -> None:
        """Notes that a row returned by `next` holds the statistics of this tensor."""
        # an inference tensor has no version counter; once the rows are full, `row` may be a dropped one
        if tensor.layout is torch.strided and not tensor.is_inference() and not self.is_full:
            self._rows_of[id(tensor)] = (weakref.ref(tensor), tensor._version, row)

    def events(self) -> EventTable:
        """Returns the arguments of `next` for all N events, and their rows."""
        with self._lock:
            rows = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
            sites, numels = np.array(self._sites, dtype=np.int64), np.array(self._numels, dtype=np.int64)
            return sites, numels, np.array(self._smallest_normals, dtype=np.float64), rows

    def clear(self) -> None:
        """Forgets all events."""
        with self._lock:
            self._sites.clear()
            self._numels.clear()
            self._smallest_normals.clear()
            self._rows_of.clear()

    def is_off(self, site: int) -> bool:
        """Returns whether a site is switched off: measuring it has failed."""
        return site in self._off

    def switch_off(self, site: int, n_sites: int) -> None:
        """Switches off `n_sites` sites from `site` on."""
        self._off.update(range(site, site + n_sites))

    def off_sites(self) -> list[int]:
        """Lists the sites that are switched off. Some events of the same step may lack their rows there."""
        return list(self._off)

    def take_errors(self) -> list[tuple[int, str]]:
        """Returns nothing: errors in Python are not kept here."""
        return []

    def _grow(self, n_rows: int) -> None:
        # Never moves existing rows: another thread may be about to write to one. Rows made in inference mode could not
        # be written to outside it.
        with torch.inference_mode(False):
            block = torch.full((n_rows, len(ops.STATS)), self.fill, dtype=torch.float64, device=self._device)
            rows = block.unsqueeze(1).unbind()
        self._blocks.append(block)
        self._rows.extend(rows)


def make_rows(
    device: torch.device,
    backend: str,
    n_sites: int,
    strict: bool = False,
    is_capturing: Callable[[], bool] | None = None,
) -> EventRows:
    """Makes the rows of a signal buffer: in C++ if that is built and the native kernels are used.

    Args:
        device: Where the rows lie.
        backend: Name of the back end, or "auto".
        n_sites: Number of sites.
        strict: Let the errors of measuring in C++ through.
        is_capturing: Tells whether a graph is being captured on the device; None if it has no graphs.

    Returns:
        Rows without an event.
    """
    module, _ = libraries.native_hooks()
    if module is None or device.type not in ("cpu", "cuda") or ops.resolve(backend, device).name != "native":
        return PythonEventRows(device)
    rows: EventRows
    if device.type == "cpu":
        rows = module.EventRows(MOST_EVENTS, n_sites, strict)
    else:
        rows = module.DeviceEventRows(MOST_EVENTS, n_sites, strict, device, is_capturing)
    return rows


def make_output_hooks(rows: EventRows, n_modules: int, on_gradient: Callable[[int, torch.Tensor], None]) -> Any | None:
    """Makes C++ hooks on the outputs of modules, which observe plain tensors and leave everything else to Python.

    Args:
        rows: Rows to write to.
        n_modules: Number of modules, M.
        on_gradient: Observes, at a site, a gradient that the hooks do not take.

    Returns:
        The hooks, or None if the rows are not in C++.
    """
    module, _ = libraries.native_hooks()
    if module is None or isinstance(rows, PythonEventRows):
        return None
    return module.OutputHooks(rows, n_modules, on_gradient)


def make_junction_hooks(rows: EventRows, n_junctions: int, first_site: int) -> Any | None:
    """Makes C++ hooks on residual adds, which compute and observe those of plain CPU tensors.

    Args:
        rows: Rows to write to.
        n_junctions: Number of residual adds, J.
        first_site: First site of residual add 0.

    Returns:
        The hooks, or None if the rows are not in C++ on the CPU.
    """
    module, _ = libraries.native_hooks()
    if module is None or not isinstance(rows, module.EventRows):
        return None
    return module.JunctionHooks(rows, n_junctions, first_site)


def next_native_step(native: Any | None, rows: EventRows) -> Any | None:
    """Begins a step of C++ hooks; returns None in their place if the rows have moved to another device."""
    if native is None or isinstance(rows, PythonEventRows):
        return None
    native.start_step()
    return native
