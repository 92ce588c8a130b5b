"""The open step's rows of activations and residual adds. Gradients of parameters go straight to the ring buffer."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from gradprobe import ops
from gradprobe.errors import warn_user
from gradprobe.observers.cuda_graphs import can_capture, is_capturing, make_graph_rows
from gradprobe.observers.event_rows import PythonEventRows, make_rows
from gradprobe.ops.transfer import to_device
from gradprobe.snapshot.records import JUNCTION_KINDS, Events, FloatArray, IntArray, Measured


class Gate:
    """One flag that every hook reads first, so that a skipped step costs little more than the check.

    Attributes:
        is_open: Whether anything may be observed now.
        on_forward: Called before the next forward pass is observed, None if nobody wants to know.
    """

    __slots__ = ("is_open", "on_forward")

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open
        self.on_forward: Callable[[], None] | None = None


class SignalBuffer:
    """Collects one row per event, and merges the rows of each site when the step is closed.

    Rows are written on the device, without waiting for it and, once there are enough rows, without an allocation.

    A site that could not be measured is switched off, and all of its events are dropped when the step is closed: the
    row of a failed event may not be written, and those of the others are only a part of the step.

    Attributes:
        rows: Rows of the events of the open step.
        graphs: Rows that captured CUDA graphs write; does nothing on a device without graphs.
        gate: Closed while nothing can be observed.
        on_event: Called with each activation's site and values, None if nobody wants to know. C++ hooks do not call it.

    Args:
        n_sites: Number of sites, S.
        device: Where the rows lie; rows of tensors on other devices are copied there.
        backend: Name of the back end, or "auto".
        first_junction_site: First site of the residual adds, which are switched off as a whole; None if there are none.
        strict: Raise errors of measuring instead of switching sites off.

    Raises:
        BackendError: The back end cannot run on the device.
    """

    def __init__(
        self,
        n_sites: int,
        device: torch.device,
        backend: str,
        first_junction_site: int | None = None,
        strict: bool = False,
    ) -> None:
        self._n_sites = n_sites
        self._device = device
        self._backend_name = backend
        self._backends = {device: ops.resolve(backend, device)}
        self._first_junction_site = n_sites if first_junction_site is None else first_junction_site
        self._strict = strict
        self._errors: list[tuple[int, Exception]] = []
        self._is_released = False
        capturing = partial(is_capturing, device) if can_capture(device) else None
        self.rows = make_rows(device, backend, n_sites, strict, capturing)
        self.graphs = make_graph_rows(device, n_sites)
        self.gate = Gate(is_open=True)
        self.on_event: Callable[[int, torch.Tensor], None] | None = None
        self._has_warned = False
        self._last_plan: _Plan | None = None

    @property
    def enabled(self) -> bool:
        """Whether events are recorded now. A graph being captured always records them and decides on replay."""
        return self.rows.enabled or self.graphs.is_wanted

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        enabled = enabled and not self._is_released
        self.rows.enabled = enabled
        self.graphs.switch(enabled)
        self.gate.is_open = enabled or self.graphs.may_capture

    def release(self) -> None:
        """Stops recording for good."""
        self._is_released = True
        self.graphs.may_capture = False
        self.enabled = False

    def is_off(self, site: int) -> bool:
        """Returns whether a site is switched off."""
        return self.rows.is_off(site)

    def off_sites(self) -> list[int]:
        """Lists the sites that are switched off."""
        return self.rows.off_sites()

    def switch_all_off(self) -> None:
        """Switches off all sites."""
        self.rows.switch_off(0, self._n_sites)

    def fail(self, site: int, error: Exception) -> None:
        """Switches off a site, or all sites of a residual add, after an error in measuring it.

        Args:
            site: Position of the site.
            error: The error; kept for `take_errors`.

        Raises:
            Exception: The error itself, if strict.
        """
        if self._strict:
            raise error
        n_sites = 1
        if site >= self._first_junction_site:
            n_sites = len(JUNCTION_KINDS)
            site -= (site - self._first_junction_site) % n_sites
        if self.rows.is_off(site):
            return
        self.rows.switch_off(site, n_sites)
        self._errors.append((site, error.with_traceback(None)))  # a traceback holds the tensors of the training

    def take_errors(self) -> list[tuple[int, Exception]]:
        """Returns the errors since the last call, each with the first of the sites that it switched off."""
        errors, self._errors = self._errors, []
        return errors + [(site, RuntimeError(message)) for site, message in self.rows.take_errors()]

    @property
    def n_events(self) -> int:
        """Number of events since the step began, including those of graphs, which may not have run."""
        return self.rows.n_events + self.graphs.n_events

    def is_full(self) -> bool:
        """Returns whether the open step has reached the maximum number of events; warns the first time."""
        if not self.rows.is_full:
            return False
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"{self.rows.n_events:,} tensors were observed since the last step was closed: outputs and gradients "
                "of modules are not observed until the step is closed. Call step() once per step, or pass the "
                "optimizer to attach"
            )
        return True

    def write(self, site: int, tensor: torch.Tensor) -> None:
        """Records a tensor, reusing the row of an earlier event if the tensor is unchanged.

        A write through the tensor's `.data` is not noticed as a change.

        Args:
            site: Position of the site.
            tensor: Floating-point or complex; any layout and device.
        """
        rows = self.graphs.open_rows(self.rows)
        known = rows.known(tensor)
        if known is None:
            rows.remember(tensor, self.write_uncached(site, tensor))
            return
        rows.next(site, tensor.numel(), _smallest_normal(tensor.dtype)).copy_(known)
        if self.on_event is not None:
            self._tell(site, ops.dense_values(tensor))

    def write_uncached(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        """Records a tensor without looking for an earlier row: compiled code does not count versions.

        Args:
            site: Position of the site.
            tensor: As for `write`.

        Returns:
            Its row. [1, 6]
        """
        with torch.no_grad(), self.graphs.counting():
            values = ops.dense_values(tensor)
            row = self._next(site, values)
            if self.on_event is not None:
                self._tell(site, values)
            if values.device == self._device:
                self._backends[self._device].grad_stats_into([values], row)
                return row
            if values.device not in self._backends:
                self._backends[values.device] = ops.resolve(self._backend_name, values.device)
            remote_row = torch.empty(1, len(ops.STATS), dtype=torch.float64, device=values.device)  # [1, 6]
            self._backends[values.device].grad_stats_into([values], remote_row)
            return row.copy_(remote_row, non_blocking=True)

    def put(self, site: int, row: torch.Tensor, tensor: torch.Tensor) -> None:
        """Records a tensor whose statistics an operator has computed.

        Args:
            site: Position of the site.
            row: Raw row of the tensor, float64. [1, 6]
            tensor: The tensor.
        """
        kept = self._next(site, tensor)
        kept.copy_(row, non_blocking=True)
        self.graphs.open_rows(self.rows).remember(tensor, kept)

    def put_untracked(self, site: int, row: torch.Tensor, numel: int) -> None:
        """Records a row whose tensor exists only inside gradprobe.

        Args:
            site: Position of the site.
            row: Raw row, float64. [1, 6]
            numel: Number of elements of the tensor.
        """
        self.graphs.open_rows(self.rows).next(site, numel, math.nan).copy_(row, non_blocking=True)

    def close(self, out: torch.Tensor) -> Events:
        """Writes one row per site and clears the buffer.

        Args:
            out: Float64 rows to write; those of sites without an event become zero. [S, 6], or [n_rows, 6] on a device
                with graphs: see `cuda_graphs.n_rows`.

        Returns:
            The events of the step.
        """
        events = self.rows.events()
        if self.graphs.n_events > 0:
            events = self.graphs.append_to(events, out)
        sites, numels, smallest_normals, pool = events
        plan = self._plan_of(sites, numels, smallest_normals)
        rows = pool[plan.gather]  # [S, M, 6]
        with torch.no_grad():
            out[: self._n_sites].copy_(rows[:, 0] if rows.shape[1] == 1 else ops.merge_rows(rows))
        self.clear()
        if out.device != self._device:
            self._move_to(out.device, len(pool))
        return plan.events

    def clear(self) -> None:
        """Forgets the events so far."""
        self.rows.clear()
        if self.graphs.n_events > 0:
            self.graphs.forget()

    def _move_to(self, device: torch.device, n_rows: int) -> None:
        self._device, self._last_plan = device, None
        self._backends[device] = ops.resolve(self._backend_name, device)
        is_on, self.rows.enabled = self.rows.enabled, False  # hooks in graphs that are still alive write there
        off = self.rows.off_sites()
        self.rows = PythonEventRows(device, n_rows)
        for site in off:
            self.rows.switch_off(site, 1)
        self.graphs = make_graph_rows(device, self._n_sites)
        self.enabled = is_on

    def _tell(self, site: int, values: torch.Tensor) -> None:
        """Tells `on_event` of an activation, unless a CUDA graph is being captured: its replays would not tell."""
        on_event = self.on_event  # another thread may close the step
        is_captured = self.graphs.open_rows(self.rows) is not self.rows
        if on_event is not None and site < self._first_junction_site and not is_captured:
            on_event(site, values)

    def _next(self, site: int, tensor: torch.Tensor) -> torch.Tensor:
        return self.graphs.open_rows(self.rows).next(site, tensor.numel(), _smallest_normal(tensor.dtype))

    def _plan_of(self, sites: IntArray, numels: IntArray, smallest_normals: FloatArray) -> _Plan:
        """Returns the plan for a step with these events [N]. Those of graphs come last, and have no `numels`."""
        off = sorted(self.rows.off_sites())
        order = sites.tobytes(), tuple(off)
        sizes = numels.tobytes(), smallest_normals.tobytes()
        last = self._last_plan
        if last is not None and last.order == order and last.sizes == sizes:
            return last
        at_sites = np.bincount(sites[: len(numels)], weights=numels, minlength=self._n_sites).astype(np.int64)  # [S]
        present = np.zeros(self._n_sites, dtype=np.bool_)
        present[sites] = True
        smallest_normal = np.full(self._n_sites, np.nan)  # [S]
        smallest_normal[sites] = smallest_normals
        at_sites[off], present[off], smallest_normal[off] = 0, False, np.nan
        if last is not None:
            known = last.events.smallest_normal  # an equal array is shared by all snapshots in the history
            smallest_normal = known if np.array_equal(smallest_normal, known, equal_nan=True) else smallest_normal
        for shared in (present, at_sites, smallest_normal):
            shared.flags.writeable = False
        is_conditional = len(numels) < len(sites)
        kept = present[sites]  # [N]
        events = Events(tuple(sites[kept].tolist()), Measured(present, at_sites), smallest_normal, is_conditional)
        if last is not None and last.order == order:  # as with batches of changing size
            gather = last.gather
        else:
            gather = self._gather_of(events.sites, (1 + np.flatnonzero(kept)).tolist())
        self._last_plan = _Plan(order, sizes, events, gather)
        return self._last_plan

    def _gather_of(self, sites: tuple[int, ...], rows: list[int]) -> torch.Tensor:
        """Returns the pool's rows for each site, padded with the zero row, given those of N events. Shape [S, M]."""
        rows_of: list[list[int]] = [[] for _ in range(self._n_sites)]
        for row, site in zip(rows, sites, strict=True):
            rows_of[site].append(row)
        longest = max(1, *map(len, rows_of)) if rows_of else 1
        padded = [rows + [0] * (longest - len(rows)) for rows in rows_of]
        gather = torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(self._n_sites, longest)
        return to_device(gather, self._device)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the events of a step become rows; the next step reuses it if its events are the same.

    Attributes:
        order: Bytes of the events' sites; the sites switched off.
        sizes: Bytes of the events' numbers of elements and smallest normal numbers.
        events: The events, shared by the snapshots of all such steps.
        gather: Rows of the pool for each site. [S, M]
    """

    order: tuple[bytes, tuple[int, ...]]
    sizes: tuple[bytes, bytes]
    events: Events
    gather: torch.Tensor


@cache
def _smallest_normal(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).smallest_normal)


_registered: weakref.WeakValueDictionary[int, SignalBuffer] = weakref.WeakValueDictionary()
_keys = itertools.count()


def register_signal_buffer(buffer: SignalBuffer) -> int:
    """Registers a signal buffer for use in compiled graphs.

    Args:
        buffer: Receives statistics while it is alive and enabled.

    Returns:
        Its key, a constant in the graphs.
    """
    key = next(_keys)
    _registered[key] = buffer
    return key


def registered_buffer(key: int) -> SignalBuffer | None:
    """Returns the signal buffer with a key from `register_signal_buffer`; None if it is no longer alive."""
    return _registered.get(key)
