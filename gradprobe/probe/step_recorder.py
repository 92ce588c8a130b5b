"""Installs the hooks of a probe, and passes on what they tell: a gradient, the end of a backward pass, a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.nn.residual import watchers
from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.magnitudes import MagnitudeObserver
from gradprobe.observers.parameters import stepped_by
from gradprobe.observers.ring_buffer import LOSS, SKIPPED
from gradprobe.observers.updates import UpdateObserver
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.grad_scaler import LossScale, Scalers
from gradprobe.probe.history import History
from gradprobe.probe.open_step import OpenStep, Recording, kept, mean
from gradprobe.probe.options import Options
from gradprobe.probe.signal_choice import SignalChoice
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.probe.step_closer import StepCloser
from gradprobe.probe.step_gradients import StepGradients
from gradprobe.probe.step_reduction import StepReduction
from gradprobe.probe.step_signals import StepSignals
from gradprobe.probe.stream import LEAST_CAPACITY

_MANY_BACKWARDS = 100  # that no step has closed


class StepRecorder:
    """Measures gradients when they are due, and closes each step.

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
        self._updates_every = options.updates_every
        self._fence = Fence(options.strict)
        self._recording = Recording(options.every, OpenStep(options.start_step))
        self._first = options.start_step  # number of the first step
        self._n_pending = 0  # steps in a row that the user has closed while gradients accumulated
        self._pending_losses: list[torch.Tensor | float] = []
        self._verdict: LossScale | None = None  # tells whether the step that the user has closed is skipped
        self._before_forward = _weakly(self._settle_before_forward)
        self._is_whole = False  # another thread may be in a backward pass while the hooks are put on
        choice = SignalChoice(model, options)
        capacity = max(options.capacity, LEAST_CAPACITY) if options.has_stream else options.capacity
        self._updates: UpdateObserver | None = None
        if options.updates:
            self._updates = UpdateObserver(options.backend, capacity, self._fence)
        self.history = History(options.capacity, capacity, choice.table, self._updates, self._fence)
        self._scalers = Scalers(options.grad_scalers)
        self._observer = GradientObserver(
            model,
            options.backend,
            _weakly(self._on_backward_end),
            _weakly(self._on_gradient) if self._measured_at == "hook" else None,
            self._fence,
        )
        self._reduction = StepReduction(self.history, self._observer, options.every)
        try:
            optimizers = options.optimizers
            if optimizers and not any(any(stepped_by(each, self._observer.parameters())) for each in optimizers):
                raise ArgumentError("optimizer: needed one that steps parameters of the model; it steps none of them")
            self.boundaries = StepBoundaries(
                optimizers, self._observer, self, self._fence, is_in_backward=self._measured_at == "hook"
            )
            self.coverage = CoverageLog(self._observer, self._fence)
            self._gradients = StepGradients(
                self._recording,
                self._observer,
                self.boundaries,
                self._scalers,
                self.history,
                self._reduction,
                self._updates,
                MagnitudeObserver(options.magnitudes_every, options.backend) if options.magnitudes else None,
                self.coverage,
                self._fence,
                self._measured_at,
            )
            self._gradients.restart()
            self._signals = StepSignals(
                self._recording,
                choice,
                options.activations_every,
                self._observer,
                self._gradients.restart,
                self.history,
                self.coverage,
                self._fence,
            )
            self._closer = StepCloser(
                self._recording,
                self._observer,
                self._gradients,
                self._signals,
                self.boundaries,
                self._reduction,
                self.history,
                self.coverage,
            )
            self.boundaries.watch()
            # the last of all: when the ranks have met, none may fail
            names = choice.table.names if choice.table is not None and options.reduce_activations else ()
            if self._observer.meet(options.process_group, options.common(names), len(names)):
                self._gradients.restart()
                self._refuse_whole(options)
            self._signals.switch()
            if options.reduce_activations and self._observer.whole is not None:
                self._signals.agree()
            watchers.add(self)
            self._is_whole = True
        except BaseException:
            self._observer.release()
            if hasattr(self, "boundaries"):
                self.boundaries.remove()
            if hasattr(self, "_signals"):
                self._signals.remove()
            raise

    def _refuse_whole(self, options: Options) -> None:
        """Raises ArgumentError, on all ranks, if an option asks for what is not reduced over them."""
        whole = self._observer.whole
        if options.magnitudes and whole is not None and not whole.are_copies:
            raise ArgumentError(
                "magnitudes: needed gradients that each rank holds whole, got parts that are reduced over the ranks; "
                "with process_group='local', the magnitudes are those of this rank's parts"
            )

    def follow(self) -> None:
        """Follows the model if it has other parameters than before; none of the old ones may have a hook that runs."""
        self._gradients.follow()

    def take_up(self) -> None:
        """Follows the model if it has other residual adds than before, in the next step if this one has begun."""
        self._signals.take_up()

    def settle(self, *, is_late: bool = False) -> None:
        """Closes the open step if a gradient scaler has skipped it, and learns whether it skipped the one before.

        Args:
            is_late: The next backward pass has already run.
        """
        self._reduction.complete()
        if self._verdict is not None and self._verdict.was_updated():
            self._closer.amend(SKIPPED, self._verdict.has_fallen())
            self._verdict = None
        updated = next((scale for scale in self._recording.open.scales if scale.was_updated()), None)
        if updated is not None:
            self._closer.close(None, updated.has_fallen(), is_late=is_late, is_skipped=True)
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
            accumulates = self._recording.open.accumulates
            if optimizer is None:
                opened = self._recording.open
                if loss is not None:
                    opened.losses.append(kept(loss))
                is_closed = self._closer.close(None, 0.0)
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
                is_closed = self._closer.close(optimizer, getattr(optimizer, "found_inf", None))
        return is_closed

    def request(self, loss: torch.Tensor | float | None) -> None:
        """Takes a loss of the open step, which an optimizer is expected to close; a step has the mean of its losses."""
        self._recording.open.is_requested = True
        if loss is not None:
            self._recording.open.losses.append(kept(loss))

    @property
    def has_all_losses(self) -> bool:
        """Whether at least one loss per backward pass was given of the step closed last."""
        return self._closer.has_all_losses

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds a loss to the step that was closed last."""
        self._closer.add_loss(loss)

    def note_stepped(self) -> None:
        """Notes that the optimizer has made the step that the user has closed."""
        self._verdict = None
        first, newest = self._recording.open.number - self._n_pending, self._recording.open.number - 1
        if self._n_pending > 1 and not self.boundaries.has_stepped and self.history.merge(first, newest):
            # what the user has closed were micro-batches: their gradients are in the last one
            self._recording.open.number = first + 1
            self._closer.last_losses = self._pending_losses
            if self._pending_losses:
                self._closer.amend(LOSS, mean(self._pending_losses))
        self._n_pending = 0

    def note_scaler(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        """Learns which gradient scaler steps an optimizer of the model, None for the optimizer's own step."""
        opened = self._recording.open
        if scaler is None:  # a loss that was scaled would not be stepped on like this, unless it was unscaled
            opened.scales = [scale for scale in opened.scales if scale.is_removed_from(optimizer)]
        else:
            self._scalers.adopt(scaler)
            if opened.n_backwards > 0 and not opened.scales:
                opened.scales = self._scalers.read()

    def note_other_step(self) -> None:
        """Notes that an optimizer that was not given steps the model."""
        self._recording.open.is_stepped_by_others = True

    def end_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Finds out what the closure of an optimizer did to the gradients, before the optimizer writes to them."""
        self._gradients.end_closure(optimizer)

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
            step = self._recording.open.number if is_open else self._recording.open.number - 1
            is_measured = self._recording.is_due() if is_open else self._closer.last_was_measured
            is_due = step % self._updates_every == 0
            must_join = is_due and step % self._recording.every == 0
            self._updates.begin(optimizer, self._observer.parameters(), step, is_measured and is_due, must_join)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measures nothing in the block; blocks may be nested or overlap."""
        self._recording.n_pauses += 1
        self._signals.switch()
        try:
            yield
        finally:
            self._recording.n_pauses -= 1
            self._signals.switch()

    def clip(self, max_norm: float, error_if_nonfinite: bool) -> torch.Tensor:
        """Clips the gradients, as `Probe.clip_grad_norm_` describes; returns the total norm before, 0-d."""
        return self._gradients.clip(max_norm, error_if_nonfinite)

    def why_blind(self, has_steps: bool) -> str:
        """Says what keeps the probe from measuring, or if it has no steps why not; empty if nothing does."""
        if self._fence.failures:
            part, error = next(iter(self._fence.failures.items()))
            return f"measuring {part} has failed: {error}"
        if has_steps:
            return ""
        n_ended = self._recording.open.number - self._first
        if n_ended > 0:
            return f"{n_ended} steps have ended, in none of them was a gradient measured"
        if not self._observer.has_fired():
            return "no backward pass has reached the model since attach"
        return self.boundaries.why_open()

    def release(self) -> None:
        """Removes every hook and lets go of the parameters; the history stays readable."""
        try:
            self.settle()
            self.coverage.release(self.boundaries.optimizers)
        finally:
            self._signals.release()
            self._observer.release()
            self.boundaries.remove()
        self.history.archive()
        if self._updates is not None:
            self._updates.restart((), ())

    @property
    def number(self) -> int:
        """Number of the open step."""
        return self._recording.open.number

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
        self._gradients.restart()
        self.history.supersede(step)
        self._recording.open, self._first = OpenStep(step), step
        self._n_pending, self._closer.last_was_measured = 0, False
        self._signals.switch()

    @property
    def n_parameters(self) -> int:
        """Number of observed parameters."""
        return len(self._observer.sites)

    def _on_backward_end(self) -> None:
        if not self._is_whole:
            return
        with self._fence.around("gradients", self._gradients.stop):
            self._end_backward()

    def _on_gradient(self, k: int, gradient: torch.Tensor) -> None:
        if not self._is_whole:
            return
        with self._fence.around("gradients", self._gradients.stop):
            if not self._observer.is_capturing() and self._recording.is_due():
                self._signals.take_up_late()
                self._gradients.measure_ready(k, gradient)

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
        if self._recording.open.is_requested and self._recording.open.measured is not None and not hooks.accumulates():
            # the gradients of the step that the user wanted to close are gone, and no optimizer has used them
            self._closer.close(None, 0.0, is_late=True)
        self._signals.take_up_late()
        opened = self._recording.open
        opened.n_backwards += 1
        opened.change = None
        if opened.n_backwards == 1:
            opened.accumulates = hooks.accumulates()
        opened.scales = self._scalers.read()
        if opened.n_backwards == _MANY_BACKWARDS:
            self.coverage.note_never_closed(opened.number, _MANY_BACKWARDS, self.boundaries.why_open())
        if self._measured_at == "backward" and self._recording.is_due():
            self._gradients.measure()  # nobody knows whether it is the last one of the step
            opened.state = "raw"  # whatever wrote to gradients inside the backward pass belongs to it
        elif self._measured_at == "step" or self._observer.are_averaged():
            hooks.mark()  # also gradients that this backward pass did not reach may have been zeroed before it
        if opened.scales and self._signals.observer is not None:  # the scaler may skip this step unnoticed
            self._signals.observer.call_before_forward(self._before_forward)

    def stop(self) -> None:
        """Stops measuring, for good; the hooks stay until `release`, and do nothing."""
        self._recording.is_off = True
        self._signals.switch()

    def _stop_updates(self) -> None:
        if self._updates is not None:
            self._updates.stop()

    def _take_back(self) -> None:
        """Makes the steps that the user has closed last part of the open one: their gradients accumulated."""
        self._recording.open.number -= self._n_pending
        self.history.supersede(self._recording.open.number)
        self._recording.open.losses = [*self._pending_losses, *self._recording.open.losses]


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that calls a method as long as its object lives: hooks must not keep their owner alive."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        alive = reference()
        if alive is not None:
            alive(*arguments)

    return call
