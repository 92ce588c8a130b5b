"""Measures the open step of a model and closes it into the history."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.nn.residual import watchers
from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.parameters import stepped_by
from gradprobe.observers.ring_buffer import LOSS, SKIPPED, Slot
from gradprobe.observers.signals import SignalObserver
from gradprobe.observers.updates import UpdateObserver
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.grad_scaler import LossScale, Scalers, any_in_use
from gradprobe.probe.history import History
from gradprobe.probe.open_step import Change, OpenStep, kept, mean
from gradprobe.probe.options import Options
from gradprobe.probe.signal_choice import SignalChoice
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.probe.step_reduction import ClosedStep, StepReduction
from gradprobe.probe.stream import LEAST_CAPACITY
from gradprobe.snapshot.records import Measured, Provenance

_MANY_BACKWARDS = 100  # that no step has closed


class StepRecorder:
    """Installs the hooks of a probe, measures gradients when they are due, and closes each step.

    Attributes:
        history: The closed steps.
        coverage: What was seen, and what was not.
        boundaries: Tells when a step ends.

    Args:
        model: The observed model.
        options: Those of `attach`.

    Raises:
        ArgumentError: The model or the optimizer does not fit.
        BackendError: The back end cannot run on the model's device.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._measured_at = options.measured_at  # the options themselves hold the optimizer
        self._every, self._activations_every = options.every, options.activations_every
        self._updates_every = options.updates_every
        self._fence = Fence(options.strict)
        self._open = OpenStep(options.start_step)
        self._first = options.start_step  # number of the first step
        self._n_pending = 0  # steps in a row that the user has closed while gradients accumulated
        self._pending_losses: list[torch.Tensor | float] = []
        self._last_losses: list[torch.Tensor | float] = []
        self._last_was_measured = self.has_all_losses = False
        self._verdict: LossScale | None = None  # tells whether the step that the user has closed is skipped
        self._before_forward = _weakly(self._settle_before_forward)
        self._pause_depth = 0
        self._is_clipped_in_graph = False
        self._is_whole = False  # another thread may be in a backward pass while the hooks are put on
        self._are_gradients_off = self._is_off = self._is_released = False
        self._choice = SignalChoice(model, options)
        self._are_adds_new = False  # the model has other residual adds than at the start of the open step
        capacity = max(options.capacity, LEAST_CAPACITY) if options.has_stream else options.capacity
        self._updates: UpdateObserver | None = None
        if options.updates:
            self._updates = UpdateObserver(options.backend, capacity, self._fence)
        self.history = History(options.capacity, capacity, self._choice.table, self._updates, self._fence)
        self._scalers = Scalers(options.grad_scalers)
        self._signal_observer: SignalObserver | None = None
        self._observer = GradientObserver(
            model,
            options.backend,
            _weakly(self._on_backward_end),
            _weakly(self._on_gradient) if self._measured_at == "hook" else None,
            self._fence,
        )
        self._reduction = StepReduction(self.history, self._observer, self._every)
        try:
            self._restart()
            self._signal_observer = self._choice.observe(self._device(), self._fence)
            self.coverage = CoverageLog(self._observer, self._signal_observer, self._choice.unobserved, self._fence)
            optimizers = options.optimizers
            if optimizers and not any(any(stepped_by(each, self._observer.parameters())) for each in optimizers):
                raise ArgumentError("optimizer: needed one that steps parameters of the model; it steps none of them")
            self.boundaries = StepBoundaries(
                optimizers, self._observer, self, self._fence, is_in_backward=self._measured_at == "hook"
            )
            # the last of all: when the ranks have met, none may fail
            table = self._choice.table
            names = table.names if table is not None and options.reduce_activations else ()
            if self._observer.meet(options.process_group, options.common(names), len(names)):
                self._restart()
            self._set_enabled()
            self._are_adds_agreed_on = options.reduce_activations and self._observer.whole is not None
            watchers.add(self)
            self._is_whole = True
        except BaseException:
            self._observer.release()
            if hasattr(self, "boundaries"):
                self.boundaries.remove()
            if self._signal_observer is not None:
                self._signal_observer.remove()
            raise

    def follow(self) -> None:
        """Follows the model if it has other parameters than before; none of the old ones may have a hook that runs."""
        if not self._is_off and not self._are_gradients_off and self._observer.may_have_changed():
            self._look()

    def take_up(self) -> None:
        """Follows the model if it has other residual adds than before, in the next step if this one has begun."""
        if self._is_released or self._is_off or not self._choice.is_outdated():
            return
        if self._are_adds_agreed_on:
            self.coverage.note_unfollowed(self._open.number, "it has other residual adds")
            return
        self._are_adds_new = self._open.n_backwards > 0
        if not self._are_adds_new:
            with self._fence.around("activations and residual adds", self._stop_signals):
                self._observe_new_adds()

    def settle(self, *, is_late: bool = False) -> None:
        """Closes the open step if a gradient scaler has skipped it, and learns whether it skipped the one before.

        Args:
            is_late: The next backward pass has already run.
        """
        self._reduction.complete()
        if self._verdict is not None and self._verdict.was_updated():
            self._amend(SKIPPED, self._verdict.has_fallen())
            self._verdict = None
        updated = next((scale for scale in self._open.scales if scale.was_updated()), None)
        if updated is not None:
            self._close(None, updated.has_fallen(), is_late=is_late, is_skipped=True)
            self.boundaries.note_skipped()

    def close(self, optimizer: torch.optim.Optimizer | None, loss: torch.Tensor | float | None = None) -> bool:
        """Closes the open step.

        Args:
            optimizer: The optimizer that steps, None if the user closes the step.
            loss: The loss, if the user gives one.

        Returns:
            Whether the step was closed.
        """
        is_closed = False
        with self._fence.around("a step", self.stop):
            accumulates = self._open.accumulates
            if optimizer is None:
                opened = self._open
                if loss is not None:
                    opened.losses.append(kept(loss))
                is_closed = self._close(None, 0.0)
                if is_closed:
                    self._n_pending = self._n_pending + 1 if accumulates else 1
                    self._pending_losses = [*(self._pending_losses if accumulates else ()), *opened.losses]
                    is_waiting = bool(opened.scales) and not opened.scales[0].was_updated()
                    self._verdict = opened.scales[0] if is_waiting else None
            else:
                self._verdict = None
                if accumulates and self._n_pending > 0 and not self.boundaries.has_stepped:
                    self._take_back()
                self._n_pending = 0
                is_closed = self._close(optimizer, getattr(optimizer, "found_inf", None))
        return is_closed

    def request(self, loss: torch.Tensor | float | None) -> None:
        """Takes a loss of the open step, which an optimizer is expected to close; a step has the mean of its losses."""
        self._open.is_requested = True
        if loss is not None:
            self._open.losses.append(kept(loss))

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds a loss to the step that was closed last."""
        if self._last_was_measured:
            self._last_losses.append(kept(loss))
            self._amend(LOSS, mean(self._last_losses))

    def note_stepped(self) -> None:
        """Notes that the optimizer has made the step that the user has closed."""
        self._verdict = None
        first, newest = self._open.number - self._n_pending, self._open.number - 1
        if self._n_pending > 1 and not self.boundaries.has_stepped and self.history.merge(first, newest):
            # what the user has closed were micro-batches: their gradients are in the last one
            self._open.number = first + 1
            self._last_losses = self._pending_losses
            if self._pending_losses:
                self._amend(LOSS, mean(self._pending_losses))
        self._n_pending = 0

    def note_scaler(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Learns which gradient scaler steps an optimizer of the model, None for the optimizer's own step."""
        opened = self._open
        if scaler is None:  # a loss that was scaled would not be stepped on like this, unless it was unscaled
            opened.scales = [scale for scale in opened.scales if scale.is_removed_from(optimizer)]
        else:
            self._scalers.adopt(scaler)
            if opened.n_backwards > 0 and not opened.scales:
                opened.scales = self._scalers.read()

    def note_other_step(self) -> None:
        """Notes that an optimizer that was not given steps the model."""
        self._open.is_stepped_by_others = True

    def end_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Finds out what the closure of an optimizer did to the gradients, before the optimizer writes to them."""
        if not self._is_due() or self._observer.is_capturing():
            return
        if self._must_measure():
            self._measure(optimizer)
        if self._open.measured is not None:
            self._open.change = self._compare(optimizer, self._open.scale_of(optimizer))

    def around(self, optimizer: torch.optim.Optimizer, is_after: bool, is_open: bool) -> None:
        """Measures the update that an optimizer makes, and takes what was reduced meanwhile."""
        if is_after:
            self._reduction.complete()
        if self._updates is None or self._observer.is_capturing():
            return
        with self._fence.around("updates", self._stop_updates):
            if is_after:
                self._updates.end()
                return
            step = self._open.number if is_open else self._open.number - 1
            is_measured = self._is_due() if is_open else self._last_was_measured
            is_due = step % self._updates_every == 0
            must_join = is_due and step % self._every == 0
            self._updates.begin(optimizer, self._observer.parameters(), step, is_measured and is_due, must_join)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measures nothing in the block; blocks may be nested or overlap."""
        self._pause_depth += 1
        self._set_enabled()
        try:
            yield
        finally:
            self._pause_depth -= 1
            self._set_enabled()

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
                self._measure()
        else:
            with self._fence.around("gradients", self._stop_gradients):  # the other ranks are waiting
                self.follow()
                if not self._is_off and (self._is_stale() or self._measured_at == "hook"):
                    self._measure()
        opened, hooks = self._open, self._observer.hooks
        is_written = hooks.n_writes() > 0
        is_other = is_written or opened.clip_factor is not None or self._may_be_unscaled_since()
        cannot_measure_all = self._observer.unmeasured() or self._observer.has_other_gradients()
        is_local = self._observer.whole is None  # otherwise all ranks go the same way
        if is_local and (cannot_measure_all or self._are_gradients_off or self._is_off):
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

    def why_blind(self, has_steps: bool) -> str:
        """Says what keeps the probe from measuring, or if it has no steps why not; empty if nothing does."""
        if self._fence.failures:
            part, error = next(iter(self._fence.failures.items()))
            return f"measuring {part} has failed: {error}"
        if has_steps:
            return ""
        if self._open.number > self._first:
            return f"{self._open.number - self._first} steps have ended, in none of them was a gradient measured"
        if not self._observer.has_fired():
            return "no backward pass has reached the model since attach"
        return self.boundaries.why_open()

    def release(self) -> None:
        """Removes every hook and lets go of the parameters; the history stays readable."""
        try:
            self.settle()
            self.coverage.release(self.boundaries.optimizers)
        finally:
            self._is_released = True
            self._observer.release()
            self.boundaries.remove()
            if self._signal_observer is not None:
                self._signal_observer.remove()
        self.history.archive()
        if self._updates is not None:
            self._updates.restart((), ())

    @property
    def number(self) -> int:
        """Number of the open step."""
        return self._open.number

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the observed parameters."""
        return self._observer.table.names

    def go_to(self, step: int) -> None:
        """Gives the open step a number, as when a training resumes; later ones in the history are dropped.

        Args:
            step: The number.
        """
        self.settle()
        self._restart()
        self.history.supersede(step)
        self._open, self._first = OpenStep(step), step
        self._n_pending, self._last_was_measured = 0, False
        self._set_enabled()

    @property
    def n_parameters(self) -> int:
        """Number of observed parameters."""
        return len(self._observer.sites)

    def _on_backward_end(self) -> None:
        if not self._is_whole:
            return
        with self._fence.around("gradients", self._stop_gradients):
            self._end_backward()

    def _on_gradient(self, k: int, gradient: torch.Tensor) -> None:
        if not self._is_whole:
            return
        with self._fence.around("gradients", self._stop_gradients):
            self._measure_ready(k, gradient)

    def _settle_before_forward(self) -> None:
        with self._fence.around("a step", self.stop):
            self.settle()

    def _end_backward(self) -> None:
        hooks = self._observer.hooks
        if error := hooks.take_error():
            raise RuntimeError(error)
        self.settle(is_late=True)
        if self._observer.is_capturing():  # nothing runs now, and replays run no hook
            self._observer.start_step()
            return
        if self._open.is_requested and self._open.measured is not None and not hooks.accumulates():
            # the gradients of the step that the user wanted to close are gone, and no optimizer has used them
            self._close(None, 0.0, is_late=True)
        self._take_up_late()
        opened = self._open
        opened.n_backwards += 1
        opened.change = None
        if opened.n_backwards == 1:
            opened.accumulates = hooks.accumulates()
        opened.scales = self._scalers.read()
        if opened.n_backwards == _MANY_BACKWARDS:
            self.coverage.note_never_closed(opened.number, _MANY_BACKWARDS, self.boundaries.why_open())
        if self._measured_at == "backward" and self._is_due():
            self._measure()  # nobody knows whether it is the last one of the step
            opened.state = "raw"  # whatever wrote to gradients inside the backward pass belongs to it
        elif self._measured_at == "step" or self._observer.are_averaged():
            hooks.mark()  # also gradients that this backward pass did not reach may have been zeroed before it
        if opened.scales and self._signal_observer is not None:  # the scaler may skip this step unnoticed
            self._signal_observer.call_before_forward(self._before_forward)

    def _measure_ready(self, k: int, gradient: torch.Tensor) -> None:
        if self._observer.is_capturing() or not self._is_due():
            return
        self._take_up_late()
        opened = self._open
        if opened.measured is None:
            ready = self._observer.parameters()[k]
            if self._look():  # k was its position among the parameters before
                k = next((new for new, each in enumerate(self._observer.parameters()) if each is ready), -1)
                if k < 0:
                    return
            n_parameters = self.n_parameters
            opened.measured = Measured(np.zeros(n_parameters, dtype=np.bool_), np.zeros(n_parameters, dtype=np.int64))
            opened.scales = self._scalers.read()
            opened.is_averaged = False
            self._observer.partials = []
        opened.measured.numels[k] = self._observer.meter.measure_one(k, gradient, self._reduction.rows())
        opened.measured.present[k] = True
        self._observer.note_ready(k)

    def _is_stale(self) -> bool:
        """Returns whether the gradients were not measured after the newest backward pass of this step."""
        is_old = self._open.measured is None or self._open.measured_after < self._open.n_backwards
        return is_old or not self._observer.hooks.is_current()

    def _measure(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        if self._are_gradients_off:
            return
        opened, observer = self._open, self._observer
        if opened.n_backwards == 0:  # compiled autograd runs no hooks
            scales = self._scalers.read()
            opened.scales = [scale for scale in scales if optimizer is None or scale.belongs_to(optimizer)]
        self._look()
        measured, n_writes, n_fired = observer.measure(self._reduction.rows())
        if measured is not observer.meter.all_present and self._regroup_if_moved():
            measured, _, n_fired = observer.measure(self._reduction.rows())
        opened.measured, opened.measured_after = measured, opened.n_backwards
        opened.is_stepped_by_others = False
        unscaled = opened.unscaled(self.boundaries.optimizers, optimizer)
        opened.is_unscaled, opened.is_partly_unscaled = any(unscaled), any(unscaled) and not all(unscaled)
        # unscaling counts no write
        is_changed = n_writes > 0 or (n_fired == 0 and self._is_clipped_in_graph)
        opened.state = "modified" if is_changed else "raw"
        opened.is_averaged = observer.are_averaged()
        opened.clip_factor = opened.change = None
        if self._is_due() and n_fired < self.n_parameters and not opened.has_changed:
            unhooked = measured.present & ~np.array(observer.hooks.fired(), dtype=np.bool_)
            if self.coverage.are_new(unhooked) and self._look(is_suspect=True):
                self._measure(optimizer)
                return
            self.coverage.note_unhooked(opened.number, unhooked)

    def _look(self, is_suspect: bool = False) -> bool:
        """Follows the model if there is a reason to and it has other parameters; returns whether it has."""
        change = self._observer.look(is_suspect)
        if self._observer.unfollowed:
            self.coverage.note_unfollowed(self._open.number, self._observer.unfollowed)
        return self._take_change(change)

    def _regroup_if_moved(self) -> bool:
        return self._take_change(self._observer.regroup_if_moved())

    def _take_change(self, change: str | None) -> bool:
        if change is not None:
            self._open.has_changed = True
            self._restart()
            self.boundaries.forget_parameters()
            self.coverage.note_changed(self._open.number, change)
        return change is not None

    def _restart(self) -> None:
        observer = self._observer
        self._open.measured = self._open.change = None
        self.history.archive()
        meter = observer.meter
        self.history.restart(observer.table, meter.rows_on, meter.in_model_order, observer.whole)
        if self._updates is not None:
            names = tuple(site.name for site in observer.sites)
            self._updates.restart(names, observer.meter.layouts, observer.whole)

    def _is_due(self) -> bool:
        return self._pause_depth == 0 and self._open.number % self._every == 0 and not self._is_off

    def _are_signals_due(self) -> bool:
        is_turn = self._open.number % self._activations_every == 0
        return self._is_due() and is_turn and not self._open.has_missed_forward

    def _device(self) -> torch.device:
        """Returns where the rows of signals lie."""
        return next(iter(self._observer.meter.rows_on))

    def _take_up_late(self) -> None:
        """Follows the model now that the step before has its update and loss, and nothing of this one is measured."""
        if self._are_adds_new and self._open.n_backwards == 0 and self._open.measured is None:
            self._open.has_missed_forward = True
            self.take_up()

    def _observe_new_adds(self) -> None:
        self._are_adds_new = False
        self._stop_signals()
        self.history.archive()
        self._choice.choose()
        self.history.signals = self._choice.table
        self._restart()
        self._signal_observer = self._choice.observe(self._device(), self._fence)
        self.coverage.follow_signals(self._signal_observer, self._choice.unobserved)
        self._set_enabled()

    def _stop_signals(self) -> None:
        if self._signal_observer is not None:
            self._signal_observer.remove()
            self._signal_observer = None

    def _set_enabled(self) -> None:
        if self._signal_observer is not None and not self._is_released:
            self._signal_observer.set_enabled(self._are_signals_due())

    def stop(self) -> None:
        """Stops measuring, for good; the hooks stay until `release`, and do nothing."""
        self._is_off = True
        self._set_enabled()

    def _stop_gradients(self) -> None:
        self._are_gradients_off = True

    def _stop_updates(self) -> None:
        if self._updates is not None:
            self._updates.stop()

    def _close(
        self,
        optimizer: torch.optim.Optimizer | None,
        skipped: torch.Tensor | float | None,
        *,
        is_late: bool = False,
        is_skipped: bool = False,
    ) -> bool:
        if self._observer.is_capturing():
            self.coverage.note_capture(self._open.number)
            self._observer.start_step()
            return False
        is_due, closed = self._is_due(), self._open
        self._last_was_measured = False
        try:
            self._reduction.complete()
            if is_due:
                if self._must_measure() and not is_late:
                    self._measure(optimizer)
                self._finish(optimizer, 0.0 if skipped is None else skipped, is_late, is_skipped)
            self._last_was_measured = is_due and closed.measured is not None
        finally:  # all ranks stay at the same step
            self._last_losses = closed.losses
            self.has_all_losses = len(closed.losses) >= closed.n_backwards > 0
            self._open = OpenStep(closed.number + 1)
            self.boundaries.is_contested = False
            if not is_late:
                if closed.is_written:  # the next backward pass may add to the gradients as they are now
                    self._observer.hooks.mark()
                self._observer.start_step()
            if not is_skipped:
                self._reduction.take_part(closed)
        if self._signal_observer is not None:
            self._signal_observer.close(None)
            self._signal_observer.call_before_forward(None)
        self._set_enabled()
        return True

    def _must_measure(self) -> bool:
        """Returns whether the gradients have to be measured as the step is closed."""
        opened = self._open
        if opened.measured is None or self._measured_at == "hook" or opened.change is not None:
            return opened.measured is None
        return self._is_stale() or (self._measured_at == "step" and opened.clip_factor is None)

    def _finish(
        self,
        optimizer: torch.optim.Optimizer | None,
        skipped: torch.Tensor | float,
        is_late: bool,
        is_skipped: bool,
    ) -> None:
        opened, whole = self._open, self._observer.whole
        if self._are_gradients_off:  # signals and losses are still recorded
            nothing = np.zeros(self.n_parameters, dtype=np.int64)
            opened.measured = Measured(nothing.astype(np.bool_), nothing)
        if whole is not None and opened.measured is None:  # other ranks may have gradients
            opened.measured = self._observer.meter.none_present
        measured, is_complete = opened.measured, opened.measured is self._observer.meter.all_present
        has_gradients = is_complete or (measured is not None and bool(measured.present.any()))
        if measured is None or not (has_gradients or self._are_gradients_off or whole is not None):
            opened.measured = None
            self.coverage.note_no_gradient(opened.number)
            return
        scale = self._open.scale_of(optimizer)
        slot = Slot(opened.number, self._provenance(optimizer, scale), measured)
        slot.is_contested = self.boundaries.is_contested
        # the other part of a GAN adds to gradients that are cleared before the backward pass that counts
        slot.is_accumulated = opened.accumulates and self.boundaries.has_stepped and not slot.is_contested
        change = opened.change or (Change() if is_late else self._compare(optimizer, scale))
        slot.tolerance, slot.is_unscaled = change.tolerance, change.is_unscaled
        if self._signal_observer is not None and self._are_signals_due() and not is_late:
            slot.events = self._signal_observer.close(self.history.ring.signal_rows())
            self.coverage.note_silent_modules(opened.number)
        inverse: torch.Tensor | float = 1.0 if scale is None else scale.inverse
        loss = mean(opened.losses) if opened.losses else None
        gradient_scale = 1.0 if opened.is_unscaled else inverse
        closed = ClosedStep(slot, loss, gradient_scale, skipped, inverse, change.ratios)
        self._reduction.commit(opened, closed, has_gradients, is_skipped)
        if not self._are_gradients_off:
            self.coverage.note(opened.number, measured, is_complete)

    def _compare(self, optimizer: torch.optim.Optimizer | None, scale: LossScale | None) -> Change:
        """Finds out what was done to the gradients after they were measured."""
        opened, hooks = self._open, self._observer.hooks
        is_unwritten = hooks.n_writes() == 0 and not self._observer.hides_writes  # unscaling counts no write
        opened.is_written = not is_unwritten
        if self._are_gradients_off or is_unwritten:
            if opened.clip_factor is None:
                return Change()
            return Change((opened.clip_factor, opened.clip_factor), tolerance=0.0)
        gradients = self._observer.gradients_stepped_by(optimizer)
        comparison = self._observer.meter.compare(gradients, self._reduction.rows())
        if comparison is None:
            return Change((math.inf, -math.inf)) if self._observer.whole is not None else Change()
        is_unscaled = scale is not None and not opened.is_unscaled and scale.is_removed_from(optimizer)
        return Change((comparison.smallest, comparison.largest), comparison.tolerance, is_unscaled)

    def _provenance(self, optimizer: torch.optim.Optimizer | None, scale: LossScale | None) -> Provenance:
        opened = self._open
        has_unknown_scaler = scale is None and optimizer is None and any_in_use()
        if has_unknown_scaler:
            self.coverage.note_unknown_scaler(opened.number)
        is_unknown = opened.is_partly_unscaled or has_unknown_scaler
        return Provenance(
            "unknown" if is_unknown else "unscaled",
            self._observer.reduction(opened.is_averaged),
            opened.state,
        )

    def _may_be_unscaled_since(self) -> bool:
        """Returns whether a gradient scaler may have written to the gradients since they were measured, unseen."""
        opened = self._open
        if opened.is_stepped_by_others:
            return True
        if not opened.scales:
            return any_in_use()
        has_ended = any(scale.was_updated() for scale in opened.scales)
        return has_ended or (any(opened.unscaled(self.boundaries.optimizers)) and not opened.is_unscaled)

    def _take_back(self) -> None:
        """Makes the steps that the user has closed last part of the open one: their gradients accumulated."""
        self._open.number -= self._n_pending
        self.history.supersede(self._open.number)
        self._open.losses = [*self._pending_losses, *self._open.losses]

    def _amend(self, column: int, value: torch.Tensor | float) -> None:
        if self.history.ring.positions():
            self.history.ring.amend(column, value)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that calls a method as long as its object lives: hooks must not keep their owner alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call
