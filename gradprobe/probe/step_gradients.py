"""Measures the gradients of the open step, and finds out what was done to them since."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.magnitudes import MagnitudeObserver, StepMagnitudes
from gradprobe.observers.ring_buffer import Slot
from gradprobe.observers.updates import UpdateObserver
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.grad_scaler import LossScale, Scalers, any_in_use
from gradprobe.probe.history import History
from gradprobe.probe.open_step import Change, Recording
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.probe.step_reduction import StepReduction
from gradprobe.snapshot.records import Measured, Provenance


class StepGradients:
    """Measures the gradients of the open step, with those parameters that the model has by then.

    Args:
        recording: Knows the open step.
        observer: Has hooks on the parameters.
        boundaries: Know the optimizers.
        scalers: The gradient scalers.
        history: Gets rows of other parameters if the model does.
        reduction: Has the rows to write to.
        updates: Gets the parameters too, None if updates are not measured.
        magnitudes: Counts the magnitudes of the gradients, None if they are not counted.
        coverage: Is told of gaps.
        fence: Takes the errors.
        measured_at: When gradients are measured; `Options.measured_at`.
    """

    def __init__(
        self,
        recording: Recording,
        observer: GradientObserver,
        boundaries: StepBoundaries,
        scalers: Scalers,
        history: History,
        reduction: StepReduction,
        updates: UpdateObserver | None,
        magnitudes: MagnitudeObserver | None,
        coverage: CoverageLog,
        fence: Fence,
        measured_at: str,
    ) -> None:
        self._recording = recording
        self._observer = observer
        self._boundaries = boundaries
        self._scalers = scalers
        self._history = history
        self._reduction = reduction
        self._updates = updates
        self._magnitudes = magnitudes
        self._coverage = coverage
        self._fence = fence
        self._measured_at = measured_at
        self._is_clipped_in_graph = False

    def stop(self) -> None:
        """Stops measuring gradients, for good; signals and losses are still recorded."""
        self._recording.are_gradients_off = True

    def follow(self) -> None:
        """Follows the model if it has other parameters than before; none of the old ones may have a hook that runs."""
        if not self._recording.is_off and not self._recording.are_gradients_off and self._observer.may_have_changed():
            self._look()

    def must_measure(self) -> bool:
        """Returns whether the gradients have to be measured as the step is closed."""
        opened = self._recording.open
        if opened.measured is None or self._measured_at == "hook" or opened.change is not None:
            return opened.measured is None
        return self._is_stale() or (self._measured_at == "step" and opened.clip_factor is None)

    def _is_stale(self) -> bool:
        """Returns whether the gradients were not measured after the newest backward pass of this step."""
        opened = self._recording.open
        is_old = opened.measured is None or opened.measured_after < opened.n_backwards
        return is_old or not self._observer.hooks.is_current()

    def measure(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Measures all gradients as they are now; `optimizer`: the one that steps now, None if none does."""
        if self._recording.are_gradients_off:
            return
        opened, observer = self._recording.open, self._observer
        if opened.n_backwards == 0:  # compiled autograd runs no hooks
            scales = self._scalers.read()
            opened.scales = [scale for scale in scales if optimizer is None or scale.belongs_to(optimizer)]
        self._look()
        measured, n_writes, n_fired = observer.measure(self._reduction.rows())
        if measured is not observer.meter.all_present and self._regroup_if_moved():
            measured, _, n_fired = observer.measure(self._reduction.rows())
        opened.measured, opened.measured_after = measured, opened.n_backwards
        opened.is_stepped_by_others = False
        unscaled = opened.unscaled(self._boundaries.optimizers, optimizer)
        opened.is_unscaled, opened.is_partly_unscaled = any(unscaled), any(unscaled) and not all(unscaled)
        # unscaling counts no write
        is_changed = n_writes > 0 or (n_fired == 0 and self._is_clipped_in_graph)
        opened.state = "modified" if is_changed else "raw"
        opened.is_averaged = observer.are_averaged()
        opened.clip_factor = opened.change = None
        if self._recording.is_due() and n_fired < len(observer.sites) and not opened.has_changed:
            unhooked = measured.present & ~np.array(observer.hooks.fired(), dtype=np.bool_)
            if self._coverage.are_new(unhooked) and self._look(is_suspect=True):
                self.measure(optimizer)
                return
            self._coverage.note_unhooked(opened.number, unhooked)
        if self._magnitudes is not None:
            opened.magnitudes = None
            self._count(self._magnitudes, lambda: enumerate(observer.hooks.gradients()[0]))

    def measure_ready(self, k: int, gradient: torch.Tensor) -> None:
        """Measures the gradient of parameter k, which is ready, inside the backward pass."""
        opened = self._recording.open
        if opened.measured is None:
            ready = self._observer.parameters()[k]
            if self._look():  # k was its position among the parameters before
                k = next((new for new, each in enumerate(self._observer.parameters()) if each is ready), -1)
                if k < 0:
                    return
            n_parameters = len(self._observer.sites)
            opened.measured = Measured(np.zeros(n_parameters, dtype=np.bool_), np.zeros(n_parameters, dtype=np.int64))
            opened.scales = self._scalers.read()
            opened.is_averaged = False
            self._observer.partials = []
        opened.measured.numels[k] = self._observer.meter.measure_one(k, gradient, self._reduction.rows())
        opened.measured.present[k] = True
        self._observer.note_ready(k)
        if self._magnitudes is not None:
            self._count(self._magnitudes, lambda: [(k, gradient)])

    def _count(
        self, observer: MagnitudeObserver, gradients: Callable[[], Iterable[tuple[int, torch.Tensor | None]]]
    ) -> None:
        """Counts the magnitudes of gradients, given with the positions of their parameters, if it is their turn."""
        opened = self._recording.open
        if not (observer.is_due(opened.number) and self._recording.is_due()):
            return
        with self._fence.around("magnitudes", observer.stop):
            counted = opened.magnitudes or StepMagnitudes([site.name for site in self._observer.sites])
            opened.magnitudes = None  # a part of them would be missing after an error
            unmeasured = self._observer.meter.unmeasured
            there = {k: one for k, one in gradients() if one is not None and k not in unmeasured}
            observer.count(there, counted)
            opened.magnitudes = counted

    def take_magnitudes(self, slot: Slot) -> None:
        """Gives the magnitudes of the measured gradients to their step."""
        counted = self._recording.open.magnitudes
        if counted is not None and self._magnitudes is not None and not self._recording.are_gradients_off:
            with self._fence.around("magnitudes", self._magnitudes.stop):
                counted.publish()
                slot.magnitudes = counted

    def end_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Finds out what the closure of an optimizer did to the gradients, before the optimizer writes to them."""
        if not self._recording.is_due() or self._observer.is_capturing():
            return
        if self.must_measure():
            self.measure(optimizer)
        opened = self._recording.open
        if opened.measured is not None:
            opened.change = self.compare(optimizer, opened.scale_of(optimizer))

    def compare(self, optimizer: torch.optim.Optimizer | None, scale: LossScale | None) -> Change:
        """Finds out what was done to the gradients after they were measured."""
        opened, hooks = self._recording.open, self._observer.hooks
        is_unwritten = hooks.n_writes() == 0 and not self._observer.hides_writes  # unscaling counts no write
        opened.is_written = not is_unwritten
        if self._recording.are_gradients_off or is_unwritten:
            if opened.clip_factor is None:
                return Change()
            return Change((opened.clip_factor, opened.clip_factor), tolerance=0.0)
        gradients = self._observer.gradients_stepped_by(optimizer)
        comparison = self._observer.meter.compare(gradients, self._reduction.rows())
        if comparison is None:
            return Change((math.inf, -math.inf)) if self._observer.whole is not None else Change()
        is_unscaled = scale is not None and not opened.is_unscaled and scale.is_removed_from(optimizer)
        return Change((comparison.smallest, comparison.largest), comparison.tolerance, is_unscaled)

    def _may_be_unscaled_since(self) -> bool:
        """Returns whether a gradient scaler may have written to the gradients since they were measured, unseen."""
        opened = self._recording.open
        if opened.is_stepped_by_others:
            return True
        if not opened.scales:
            return any_in_use()
        has_ended = any(scale.was_updated() for scale in opened.scales)
        return has_ended or (any(opened.unscaled(self._boundaries.optimizers)) and not opened.is_unscaled)

    def clip(self, max_norm: float, error_if_nonfinite: bool) -> torch.Tensor:
        """Clips the gradients, as `Probe.clip_grad_norm_` describes.

        Args:
            max_norm: Largest total norm allowed.
            error_if_nonfinite: Raise if the total norm is NaN or infinite.

        Returns:
            The total norm before clipping, 0-d.

        Raises:
            RuntimeError: The total norm is not finite and `error_if_nonfinite` is set.
        """
        is_capturing = self._observer.is_capturing()
        if self._observer.whole is None:
            self.follow()  # the rows may hold gradients of parameters that are gone
            if not is_capturing and (self._is_stale() or self._measured_at == "hook"):
                self.measure()
        else:
            with self._fence.around("gradients", self.stop):  # the other ranks are waiting
                self.follow()
                if not self._recording.is_off and (self._is_stale() or self._measured_at == "hook"):
                    self.measure()
        opened, hooks = self._recording.open, self._observer.hooks
        is_written = hooks.n_writes() > 0
        is_other = is_written or opened.clip_factor is not None or self._may_be_unscaled_since()
        cannot_measure_all = self._observer.unmeasured() or self._observer.has_other_gradients()
        is_local = self._observer.whole is None  # otherwise all ranks go the same way
        if is_local and (cannot_measure_all or self._recording.are_gradients_off or self._recording.is_off):
            parameters = [parameter for parameter in self._observer.all_parameters() if parameter.grad is not None]
            return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=error_if_nonfinite)
        # The rows of the step stay those of the backward pass, and a replay would write to those of an old step.
        self._reduction.complete()
        rows = None if is_capturing or is_other else self._reduction.rows()
        total, factor = self._observer.clip_(max_norm, error_if_nonfinite, rows)
        if is_capturing:
            self._is_clipped_in_graph = True
        elif not is_written:  # otherwise the comparison at the end of the step finds both changes
            opened.clip_factor = factor if opened.clip_factor is None else factor * opened.clip_factor
            hooks.mark()
        return total

    def provenance(self, optimizer: torch.optim.Optimizer | None, scale: LossScale | None) -> Provenance:
        """Says what the measured gradients are those of."""
        opened = self._recording.open
        has_unknown_scaler = scale is None and optimizer is None and any_in_use()
        if has_unknown_scaler:
            self._coverage.note_unknown_scaler(opened.number)
        is_unknown = opened.is_partly_unscaled or has_unknown_scaler
        return Provenance(
            "unknown" if is_unknown else "unscaled",
            self._observer.reduction(opened.is_averaged),
            opened.state,
        )

    def restart(self) -> None:
        """Makes the history take rows of the parameters that the observer has now."""
        observer = self._observer
        self._recording.open.measured = self._recording.open.change = self._recording.open.magnitudes = None
        self._history.archive()
        meter = observer.meter
        self._history.restart(observer.table, meter.rows_on, meter.in_model_order, observer.whole)
        if self._updates is not None:
            names = tuple(site.name for site in observer.sites)
            self._updates.restart(names, observer.meter.layouts, observer.whole)

    def _look(self, is_suspect: bool = False) -> bool:
        """Follows the model if there is a reason to and it has other parameters; returns whether it has."""
        change = self._observer.look(is_suspect)
        if self._observer.unfollowed:
            self._coverage.note_unfollowed(self._recording.open.number, self._observer.unfollowed)
        return self._take_change(change)

    def _regroup_if_moved(self) -> bool:
        return self._take_change(self._observer.regroup_if_moved())

    def _take_change(self, change: str | None) -> bool:
        if change is not None:
            self._recording.open.has_changed = True
            self.restart()
            self._boundaries.forget_parameters()
            self._coverage.note_changed(self._recording.open.number, change)
        return change is not None
