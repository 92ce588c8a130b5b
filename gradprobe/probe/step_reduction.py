"""Takes closed steps into the history; those of a sharded model are first reduced over the ranks."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch

from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.ring_buffer import Slot
from gradprobe.observers.shards import Shared
from gradprobe.probe.history import History
from gradprobe.probe.open_step import OpenStep
from gradprobe.snapshot.records import Measured


class ClosedStep(NamedTuple):
    """A closed step; the values are those of `RingBuffer.commit`."""

    slot: Slot
    loss: torch.Tensor | float | None
    scale: torch.Tensor | float
    skipped: torch.Tensor | float
    signal_scale: torch.Tensor | float
    ratios: tuple[torch.Tensor | float, torch.Tensor | float]


class StepReduction:
    """Commits closed steps.

    The collectives of a step start when it is closed and are waited for at the next occasion, mostly after the
    optimizer. Which steps have some follows from their number alone, so that all ranks agree.

    Args:
        history: Takes the steps.
        observer: Has measured the gradients.
        every: As for `attach`.
    """

    def __init__(self, history: History, observer: GradientObserver, every: int) -> None:
        self._history = history
        self._observer = observer
        self._every = every
        self._lock = threading.RLock()  # another thread may read
        self._is_under_way = False
        self._pending: ClosedStep | None = None  # whose gradients are being reduced

    def rows(self) -> dict[torch.device, torch.Tensor]:
        """Returns the rows of this rank's gradients in the open step. Values of shape [K, 6]."""
        whole = self._observer.whole
        return self._history.ring.rows() if whole is None else whole.local_rows

    def commit(self, opened: OpenStep, step: ClosedStep, has_gradients: bool, is_skipped: bool) -> None:
        """Takes a step.

        Args:
            opened: What was known of it while it was open.
            step: The step.
            has_gradients: This rank has measured some.
            is_skipped: A gradient scaler has skipped the optimizer's step, on all ranks; nothing is reduced.
        """
        whole, ring = self._observer.whole, self._history.ring
        if whole is None or is_skipped:
            if whole is not None:
                ring.rows()[whole.device].zero_()
            self._write(step)
            return
        step.slot.tolerance = whole.tolerance
        events = step.slot.events
        self._start(
            opened.number,
            whole.local_rows if has_gradients else None,
            step,
            None if events is None else (ring.signal_rows(), events.measured),
        )
        opened.is_shared = True

    def take_part(self, opened: OpenStep) -> None:
        """Joins the other ranks in a step of which this one has nothing to tell."""
        if self._observer.whole is not None and opened.number % self._every == 0 and not opened.is_shared:
            opened.is_shared = True
            self._start(opened.number, None, None, None)

    def complete(self) -> None:
        """Finishes the step whose gradients are being reduced."""
        whole = self._observer.whole
        if whole is None:
            return
        with self._lock:
            if not self._is_under_way:
                return
            self._is_under_way = False
            step, self._pending = self._pending, None
            ring = self._history.ring
            told = whole.finish(ring.rows()[whole.device], ring.signal_rows() if whole.n_signals > 0 else None)
            if step is not None:
                self._write(step._replace(skipped=told.skipped, ratios=(told.smallest, told.largest)))

    def _start(
        self,
        number: int,
        rows: Mapping[torch.device, torch.Tensor] | None,
        step: ClosedStep | None,
        signals: tuple[torch.Tensor, Measured] | None,
    ) -> None:
        whole = self._observer.whole
        assert whole is not None
        if rows is None:
            self._observer.find_partials()
        measured = None if step is None else step.slot.measured
        shared = Shared() if step is None else Shared(*step.ratios, step.skipped)
        with self._lock:
            whole.start(number, rows, measured, self._observer.partials, shared, signals)
            self._is_under_way, self._pending = True, step
            self._observer.partials = []  # they keep gradients alive

    def _write(self, step: ClosedStep) -> None:
        self._history.commit(step)
