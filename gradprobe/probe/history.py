"""The finished steps of a probe as snapshots: those in the ring buffer, and those from before the model changed."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.running import RunningDiagnosis
from gradprobe.observers.cuda_graphs import n_rows, unpack_numels
from gradprobe.observers.fence import Fence
from gradprobe.observers.ring_buffer import FinishedStep, RingBuffer
from gradprobe.observers.updates import UpdateObserver
from gradprobe.snapshot.magnitudes import GradientMagnitudes
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.signals import Signals, SignalTable
from gradprobe.snapshot.snapshot import NonFinite, SiteTable, Snapshot

if TYPE_CHECKING:
    from gradprobe.observers.sharding import WholeGradients
    from gradprobe.probe.step_reduction import ClosedStep

Newest = Literal["never", "complete", "always"]
InModelOrder = Callable[[dict[torch.device, FloatArray]], FloatArray]

_TAKEN_AT_ONCE = 16  # steps; the code that takes them is then warm in cache


class Cursor:
    """How far one reader has read the finished steps.

    Attributes:
        n_lost: Steps that left the history before they were read.

    Args:
        capacity: Number of unread steps that outlive the ring buffer.
    """

    def __init__(self, capacity: int) -> None:
        self.n_lost = 0
        self._capacity = capacity
        self._serial = 0  # of the last step that was read
        self._has_losses = False
        self._archived: deque[Snapshot] = deque()  # unread steps that are no longer in the ring buffer

    def archive(self, ring: RingBuffer, snapshots: Mapping[int, Snapshot], serial: int) -> None:
        """Keeps the unread steps of the ring buffer, which is about to go.

        Args:
            ring: The ring buffer.
            snapshots: Its steps by serial number.
            serial: Number of steps committed so far.
        """
        self._skip_lost(ring)
        new = [snapshot for number, snapshot in snapshots.items() if number > self._serial]
        self._archived.extend(new)
        self._serial = serial
        while len(self._archived) > self._capacity:
            self._archived.popleft()
            self.n_lost += 1

    def read(self, history: History, newest: Newest, wait: bool, most: int | None) -> list[Snapshot]:
        """Reads the next steps, oldest first; the history holds its lock.

        Args:
            history: Where they are.
            newest: As for `History.drain`.
            wait: Wait for the device.
            most: Largest number of steps.
        """
        found: list[Snapshot] = []
        while self._archived and (most is None or len(found) < most):
            found.append(self._archived.popleft())
        ring = history.ring
        self._skip_lost(ring)
        positions = ring.newer_than(self._serial)
        for position in positions:
            is_newest = position == positions[-1]  # of those listed: the training may add others meanwhile
            if (most is not None and len(found) >= most) or (is_newest and newest == "never"):
                break
            finished = history.read(position, wait)
            if finished is None:
                break
            self._has_losses = self._has_losses or finished.loss is not None
            if is_newest and newest == "complete" and finished.loss is None and self._has_losses:
                break
            self._serial = finished.slot.serial
            found.append(history.snapshot(finished))
        return found

    def _skip_lost(self, ring: RingBuffer) -> None:
        oldest = ring.oldest_serial()
        if oldest is not None and oldest > self._serial + 1:
            self.n_lost += oldest - self._serial - 1
            self._serial = oldest - 1


class History:
    """Owns the ring buffer and turns its rows into snapshots.

    Attributes:
        ring: The newest steps.
        signals: The sites of activations and residual adds in the ring, None if there are none.
        is_judged_elsewhere: A thread calls `judge`; `commit` then judges only what would be lost otherwise.

    Args:
        capacity: Number of steps to keep for the user.
        ring_capacity: Number of steps to keep for those that read them as they come.
        signals: The sites of activations and residual adds, None if there are none.
        updates: The updates of each step, None if they are not observed.
        fence: Takes the errors of judging.
    """

    def __init__(
        self,
        capacity: int,
        ring_capacity: int,
        signals: SignalTable | None,
        updates: UpdateObserver | None,
        fence: Fence,
    ) -> None:
        self._capacity = capacity
        self._ring_capacity = ring_capacity
        self._archive: deque[Snapshot] = deque(maxlen=capacity)
        self.signals = signals
        self._updates = updates
        self._unseen: deque[int] = deque()  # positions in the ring that were not taken in yet, oldest first
        self._running = RunningDiagnosis()
        self._lock = threading.RLock()  # of what readers in several threads change
        self._is_held = False  # by this thread, which a signal handler may interrupt to read
        self._diagnosis = Diagnosis((), 0, (), {}, None)  # the last that was made
        self._fence = fence
        self._first_nonfinite: NonFinite | None = None
        self._n_committed = 0
        self._drained = Cursor(capacity)  # that of the user
        self._cursors = [self._drained]
        self._whole: WholeGradients | None = None
        self.ring = RingBuffer(1, {})
        self.is_judged_elsewhere = False

    def archive(self) -> None:
        """Replaces the contents of the ring by snapshots. Waits for the device."""
        with self._lock:
            self._take_in(wait=True)
            finished = (self.ring.read(position, wait=True) for position in self.ring.positions())
            kept = {one.slot.serial: self.snapshot(one) for one in finished if one is not None}
            for cursor in self._cursors:
                cursor.archive(self.ring, kept, self._n_committed)
            self._archive.extend(kept.values())
            self.ring = RingBuffer(1, {})

    def reader(self) -> Cursor:
        """Returns a cursor of its own for one more reader, for `drain`."""
        cursor = Cursor(self._ring_capacity)
        with self._lock:
            self._cursors.append(cursor)
        return cursor

    def forget_reader(self, cursor: Cursor) -> None:
        """Drops the cursor of a reader that has ended."""
        with self._lock:
            self._cursors = [one for one in self._cursors if one is not cursor]

    def renew_lock(self) -> None:
        """Makes a new lock in a forked process, where the thread that may hold the old one does not exist."""
        self._lock, self._is_held = threading.RLock(), False

    def restart(
        self,
        table: SiteTable,
        rows_on: Mapping[torch.device, int],
        in_model_order: InModelOrder,
        whole: WholeGradients | None,
    ) -> None:
        """Opens a new ring.

        Args:
            table: Names of the parameters.
            rows_on: Number of parameter rows on each device.
            in_model_order: Puts the rows of all devices into the order of the table.
            whole: Reads rows that it has reduced, None if they are not reduced.
        """
        self._table, self._in_model_order, self._whole = table, in_model_order, whole
        if whole is not None:
            rows_on = {whole.device: whole.n_rows}
        n_signals = 0 if self.signals is None else n_rows(self.signals.n_sites, next(iter(rows_on)))
        self.ring = RingBuffer(self._ring_capacity, rows_on, n_signals)

    def latest(self, wait: bool) -> Snapshot | None:
        """Returns the newest finished step that has arrived on the host, None if there is none.

        Args:
            wait: Wait for the device, so that the step finished last has arrived.
        """
        for position in reversed(self.ring.positions()):
            finished = self.read(position, wait)
            if finished is not None:
                return self.snapshot(finished)
        return self._archive[-1] if self._archive else None

    def all(self) -> list[Snapshot]:
        """Returns the finished steps still kept, oldest first. Waits for the device."""
        with self._lock:
            finished = (self.ring.read(position, wait=True) for position in self.ring.positions())
            snapshots = [*self._archive, *(self.snapshot(one) for one in finished if one is not None)]
            return snapshots[-self._capacity :]

    def drain(
        self,
        cursor: Cursor | None = None,
        *,
        newest: Newest = "complete",
        wait: bool = False,
        most: int | None = None,
    ) -> list[Snapshot]:
        """Returns the steps that have arrived since the last call, oldest first, as long as they are kept.

        Args:
            cursor: That of the reader, from `reader`; None for the user's.
            newest: Whether to return the newest step, which may still change: "complete" leaves it for the next call
                while it lacks a loss that other steps have.
            wait: Wait for the device.
            most: Largest number of steps to return.
        """
        with self._hold() as is_held:
            return (cursor or self._drained).read(self, newest, wait, most) if is_held else []

    def supersede(self, step: int) -> None:
        """Drops the steps with this number or a larger one: they turned out to be part of the open step."""
        self.ring.supersede(step)
        with self._lock:
            self._running.forget(step)
        self._drop_archived(step)

    def merge(self, first: int, newest: int) -> bool:
        """Makes the newest step the only one from `first` on: the others turned out to be parts of it.

        Args:
            first: Number that it gets.
            newest: Its number so far.

        Returns:
            Whether it is there.
        """
        if not self.ring.renumber(newest, first):
            return False
        with self._lock:
            self._running.forget(first)
        self._drop_archived(first)
        return True

    def commit(self, step: ClosedStep) -> None:
        """Finishes the open step, and from time to time judges the steps before it.

        Args:
            step: What is known of the open step.
        """
        is_full = len(self._unseen) >= self.ring.capacity
        # the newest finished step gets no loss any more; if another thread is reading, there is a next time
        if is_full or (len(self._unseen) >= _TAKEN_AT_ONCE and not self.is_judged_elsewhere):
            with self._hold(blocking=is_full) as is_held:
                if is_held:
                    self._take_in(wait=False)
        self._n_committed += 1
        step.slot.serial = self._n_committed
        self.ring.commit(*step)
        self._unseen.append(self.ring.newest)

    def first_nonfinite(self) -> NonFinite | None:
        """Returns where the first non-finite value was seen. Waits for the device."""
        with self._hold() as is_held:
            if is_held:
                self._take_in(wait=True, but_newest=True)
            newest = self._newest()
            return self._first_nonfinite or (None if newest is None else newest.first_nonfinite())

    def judge(self) -> None:
        """Judges the steps that have arrived, but for the newest, which may still change."""
        with self._hold() as is_held:
            if is_held:
                self._take_in(wait=False, but_newest=True)

    def diagnosis(self, wait: bool = True) -> Diagnosis:
        """Returns the diagnosis of all steps.

        Args:
            wait: Wait for the device; otherwise, that of the steps that have arrived.
        """
        with self._hold() as is_held:
            if is_held:
                self._take_in(wait, but_newest=True)
                self._diagnosis = self._running.read(self._newest(wait))
            return self._diagnosis

    @contextmanager
    def _hold(self, blocking: bool = True) -> Iterator[bool]:
        """Holds the lock; false if another thread has it, or if this thread is a signal handler inside such a block."""
        if not self._lock.acquire(blocking=blocking):
            yield False
            return
        try:
            if self._is_held:
                yield False
                return
            self._is_held = True
            try:
                yield True
            finally:
                self._is_held = False
        finally:
            self._lock.release()

    def _drop_archived(self, step: int) -> None:
        kept = [snapshot for snapshot in self._archive if snapshot.step < step]
        self._archive = deque(kept, maxlen=self._capacity)

    def _newest(self, wait: bool = True) -> Snapshot | None:
        """Returns the finished step that may still get a loss."""
        finished = self.read(self._unseen[-1], wait) if self._unseen else None
        return None if finished is None or finished.slot.is_superseded else self.snapshot(finished)

    def _take_in(self, wait: bool, but_newest: bool = False) -> None:
        """Judges the steps that have arrived and looks for the first value that is not finite."""
        while len(self._unseen) > but_newest:
            finished = self.read(self._unseen[0], wait or len(self._unseen) == self.ring.capacity)
            if finished is None:
                return
            self._unseen.popleft()
            if finished.slot.is_superseded:
                continue
            snapshot = self.snapshot(finished)
            if self._first_nonfinite is None and finished.has_nonfinite:
                self._first_nonfinite = snapshot.first_nonfinite()
            with self._fence.around("the diagnosis", self._stop_judging):
                self._running.take(snapshot)

    def _stop_judging(self) -> None:
        self._running.stop()

    def read(self, position: int, wait: bool) -> FinishedStep | None:
        """Reads a step of the ring buffer.

        Args:
            position: One of its positions.
            wait: Wait for the device.

        Returns:
            The step, or None if it or its updates have not arrived.
        """
        finished = self.ring.read(position, wait)
        if finished is None or wait or self._updates is None or self._updates.has_arrived(finished.slot.step):
            return finished
        return None

    def snapshot(self, finished: FinishedStep) -> Snapshot:
        """Turns a step of the ring buffer into a snapshot."""
        slot, whole = finished.slot, self._whole
        reduced = None if whole is None else whole.unpack(finished.rows[whole.device])
        signals = None
        if self.signals is not None and slot.events is not None:
            n_sites, events = self.signals.n_sites, slot.events
            if events.is_conditional:
                events = events.seen(unpack_numels(finished.signals, n_sites))
            reduction: Literal["local", "global"] = "local"
            if reduced is not None and len(reduced.signal_numels) > 0:
                events, reduction = events.seen(reduced.signal_numels), "global"
            rows, counted = finished.signals[:n_sites], slot.signal_magnitudes
            magnitudes = None if counted is None else counted.read()[0]
            signals = Signals(self.signals, rows, events, finished.signal_scale, reduction, magnitudes)
        provenance, clip_factor = slot.provenance, 1.0 if slot.provenance.state == "raw" else None
        if slot.tolerance is not None:
            # unscaling multiplies as clipping does
            unscaling = finished.scale if slot.is_unscaled else 1.0
            state, clip_factor = _judge_change(*finished.ratios, unscaling, slot.tolerance)
            provenance = provenance._replace(state=state)
        counts = slot.magnitudes
        of_gradients = None if counts is None else GradientMagnitudes(counts.names, *counts.read(), finished.scale)
        return Snapshot(
            step=slot.step,
            loss=finished.loss,
            provenance=provenance,
            skipped=finished.skipped,
            table=self._table,
            rows=self._in_model_order(finished.rows) if reduced is None else reduced.rows,
            measured=slot.measured if reduced is None else reduced.measured,
            scale=finished.scale,
            signals=signals,
            parameter_updates=None if self._updates is None else self._updates.read(slot.step, wait=True),
            clip_factor=clip_factor,
            differ=None if reduced is None else reduced.differ,
            is_accumulated=slot.is_accumulated,
            is_contested=slot.is_contested,
            gradient_magnitudes=of_gradients,
        )


def _judge_change(
    smallest: float, largest: float, unscaling: float, tolerance: float
) -> tuple[Literal["raw", "modified", "clipped"], float | None]:
    """Tells clipping to a norm from other changes of gradients.

    Args:
        smallest: Smallest of the factors by which some gradients changed.
        largest: Largest of them; not a number if a gradient is no longer finite.
        unscaling: The part of the factor that undoes loss scaling.
        tolerance: Relative difference that rounding explains.

    Returns:
        What was done to the gradients, and the factor of the clipping.
    """
    if not (math.isfinite(smallest) and largest - smallest <= tolerance * largest):
        return "modified", None
    factor = largest / unscaling
    return ("raw", 1.0) if abs(factor - 1.0) <= tolerance else ("clipped", factor)
