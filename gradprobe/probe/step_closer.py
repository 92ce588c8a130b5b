"""Closes the open step: takes its gradients, signals and losses into the history."""

from __future__ import annotations

import numpy as np
import torch

from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.ring_buffer import LOSS, Slot
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.history import History
from gradprobe.probe.open_step import Change, OpenStep, Recording, kept, mean
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.probe.step_gradients import StepGradients
from gradprobe.probe.step_reduction import ClosedStep, StepReduction
from gradprobe.probe.step_signals import StepSignals
from gradprobe.snapshot.records import Measured


class StepCloser:
    """Closes steps, and knows the one that was closed last.

    Attributes:
        last_was_measured: The step that was closed last is in the history.
        last_losses: Its losses.
        has_all_losses: They are at least as many as its backward passes.

    Args:
        recording: Knows the open step.
        observer: Has hooks on the parameters.
        gradients: Measure what is not measured yet.
        signals: The activations and residual adds.
        boundaries: Know which optimizers step.
        reduction: Commits the steps.
        history: Takes them.
        coverage: Is told of gaps.
    """

    def __init__(
        self,
        recording: Recording,
        observer: GradientObserver,
        gradients: StepGradients,
        signals: StepSignals,
        boundaries: StepBoundaries,
        reduction: StepReduction,
        history: History,
        coverage: CoverageLog,
    ) -> None:
        self._recording = recording
        self._observer = observer
        self._gradients = gradients
        self._signals = signals
        self._boundaries = boundaries
        self._reduction = reduction
        self._history = history
        self._coverage = coverage
        self.last_losses: list[torch.Tensor | float] = []
        self.last_was_measured = self.has_all_losses = False

    def close(
        self,
        optimizer: torch.optim.Optimizer | None,
        skipped: torch.Tensor | float | None,
        *,
        is_late: bool = False,
        is_skipped: bool = False,
    ) -> bool:
        """Closes the open step and begins the next.

        Args:
            optimizer: The optimizer that steps, None if none does.
            skipped: Whether a gradient scaler skips the optimizer's step, as 0 or 1; 0-d if the device knows.
            is_late: The next backward pass has already run.
            is_skipped: A gradient scaler has skipped the step.

        Returns:
            Whether the step was closed: not while a CUDA graph is captured.
        """
        if self._observer.is_capturing():
            self._coverage.note_capture(self._recording.open.number)
            self._observer.start_step()
            return False
        is_due, closed = self._recording.is_due(), self._recording.open
        self.last_was_measured = False
        try:
            self._reduction.complete()
            if is_due:
                if self._gradients.must_measure() and not is_late:
                    self._gradients.measure(optimizer)
                self._finish(optimizer, 0.0 if skipped is None else skipped, is_late, is_skipped)
            self.last_was_measured = is_due and closed.measured is not None
        finally:  # all ranks stay at the same step
            self.last_losses = closed.losses
            self.has_all_losses = len(closed.losses) >= closed.n_backwards > 0
            self._recording.open = OpenStep(closed.number + 1)
            self._boundaries.is_contested = False
            if not is_late:
                if closed.is_written:  # the next backward pass may add to the gradients as they are now
                    self._observer.hooks.mark()
                self._observer.start_step()
            if not is_skipped:
                self._reduction.take_part(closed)
        if self._signals.observer is not None:
            self._signals.observer.close(None)
            self._signals.observer.call_before_forward(None)
        self._signals.switch()
        return True

    def _finish(
        self,
        optimizer: torch.optim.Optimizer | None,
        skipped: torch.Tensor | float,
        is_late: bool,
        is_skipped: bool,
    ) -> None:
        opened, whole = self._recording.open, self._observer.whole
        if self._recording.are_gradients_off:  # signals and losses are still recorded
            nothing = np.zeros(len(self._observer.sites), dtype=np.int64)
            opened.measured = Measured(nothing.astype(np.bool_), nothing)
        if whole is not None and opened.measured is None:  # other ranks may have gradients
            opened.measured = self._observer.meter.none_present
        measured, is_complete = opened.measured, opened.measured is self._observer.meter.all_present
        has_gradients = is_complete or (measured is not None and bool(measured.present.any()))
        if measured is None or not (has_gradients or self._recording.are_gradients_off or whole is not None):
            opened.measured = None
            self._coverage.note_no_gradient(opened.number)
            return
        scale = self._recording.open.scale_of(optimizer)
        slot = Slot(opened.number, self._gradients.provenance(optimizer, scale), measured)
        slot.is_contested = self._boundaries.is_contested
        # the other part of a GAN adds to gradients that are cleared before the backward pass that counts
        slot.is_accumulated = opened.accumulates and self._boundaries.has_stepped and not slot.is_contested
        change = opened.change or (Change() if is_late else self._gradients.compare(optimizer, scale))
        slot.tolerance, slot.is_unscaled = change.tolerance, change.is_unscaled
        if self._signals.observer is not None and self._signals.are_due() and not is_late:
            slot.events = self._signals.observer.close(self._history.ring.signal_rows())
            slot.signal_magnitudes = self._signals.observer.magnitudes
            self._coverage.note_silent_modules(opened.number)
        if opened.magnitudes is not None:
            self._gradients.take_magnitudes(slot)
        inverse: torch.Tensor | float = 1.0 if scale is None else scale.inverse
        loss = mean(opened.losses) if opened.losses else None
        gradient_scale = 1.0 if opened.is_unscaled else inverse
        closed = ClosedStep(slot, loss, gradient_scale, skipped, inverse, change.ratios)
        self._reduction.commit(opened, closed, has_gradients, is_skipped)
        if not self._recording.are_gradients_off:
            self._coverage.note(opened.number, measured, is_complete)

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds a loss to the step that was closed last."""
        if self.last_was_measured:
            self.last_losses.append(kept(loss))
            self.amend(LOSS, mean(self.last_losses))

    def amend(self, column: int, value: torch.Tensor | float) -> None:
        """Changes a value of the step that was closed last: `LOSS` or `SKIPPED`."""
        if self._history.ring.positions():
            self._history.ring.amend(column, value)
