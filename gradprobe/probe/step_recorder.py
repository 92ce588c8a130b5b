"""Measures the open step of a model and closes it into the history."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable

from gradprobe.errors import ArgumentError
from gradprobe.observers import cuda_graphs, gradient_hooks
from gradprobe.observers.activations import select_modules
from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.junctions import junction_modules
from gradprobe.observers.parameters import ObservedParameters, find_parameters, unstepped_parameters
from gradprobe.observers.ring_buffer import Slot
from gradprobe.observers.signals import SignalObserver
from gradprobe.observers.updates import UpdateObserver
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.history import History
from gradprobe.probe.options import Options
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.signals import SignalTable
from gradprobe.snapshot.snapshot import SiteTable

_UNTOUCHED = Provenance("unscaled", "local", "pre-clip")


@dataclass(slots=True)
class OpenStep:
    """What is known of the step that is not closed yet.

    Attributes:
        number: Number of the step.
        measured: Which parameters were measured, None as long as none was.
        provenance: How the measured gradients came to be what they are.
        scale: Factor on the gradients that undoes loss scaling.
        is_clipped: The probe has clipped the gradients.
    """

    number: int
    measured: Measured | None = None
    provenance: Provenance = _UNTOUCHED
    scale: torch.Tensor | float = 1.0
    is_clipped: bool = False


class StepRecorder:
    """Installs the hooks of a probe, measures gradients when they are due, and closes each step.

    Attributes:
        parameters: The observed parameters; none after `release`.
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
        self.parameters: ObservedParameters = find_parameters(model)
        joined, unobserved = junction_modules(model) if options.junctions else ({}, ())
        chosen: dict[str, nn.Module] = {}
        if options.activations is not False:
            chosen = select_modules(model, options.activations, elsewhere=joined)
        optimizer = options.optimizer
        n_parameters = len(self.parameters.sites)
        if optimizer is not None and len(unstepped_parameters(optimizer, self.parameters)) == n_parameters:
            raise ArgumentError("optimizer: needed one that steps parameters of the model; it steps none of them")
        self._meter = GradientMeter(self.parameters.parameters, options.backend)
        is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        self._is_averaged = is_ddp and self._measured_at == "step"
        table = _site_table(self.parameters)
        module_types = tuple(type(module).__name__ for module in chosen.values())
        signals = SignalTable(tuple(chosen), tuple(joined), module_types) if chosen or joined else None
        self._updates: UpdateObserver | None = None
        if options.updates:
            self._updates = UpdateObserver(self.parameters.parameters, table.names, options.backend, options.capacity)
        self.history = History(
            options.capacity, self._meter.rows_on, table, self._meter.in_model_order, signals, self._updates
        )
        self._signal_observer: SignalObserver | None = None
        if signals is not None:
            device = next(iter(self._meter.rows_on))
            self._signal_observer = SignalObserver(signals, chosen, joined, device, options.backend)
        self.coverage = CoverageLog(self.parameters, self._signal_observer, unobserved, optimizer)
        self._open = OpenStep(0)
        self._pause_depth = 0
        self._last_was_measured = False
        self._is_clipped_in_graph = False
        self._is_released = False
        self._hooks = self._install_hooks()
        around = self._around_optimizer if options.updates else None
        self.boundaries = StepBoundaries(optimizer, options.grad_scaler, self._hooks, self._close, around)

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds the loss to the step that was closed last, if that was measured."""
        if self._last_was_measured:
            self.history.ring.add_loss(loss)

    def pause(self, by: int) -> None:
        """Begins a pause (1) or ends one (-1); pauses may be nested."""
        self._pause_depth += by
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
        rows = self.history.ring.rows()
        if self._is_capturing():  # each replay would write to the rows of a step that is over
            rows = {device: torch.empty_like(part) for device, part in rows.items()}
            self._meter.measure(*self._hooks.gradients(), rows)
            self._is_clipped_in_graph = True
        elif self._open.measured is None or self._measured_at == "hook" or self._hooks.modified():
            self._measure()
        total = self._meter.total_norm(rows)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"clip_grad_norm_: needed a finite total norm, got {total.item()}")
        gradients, regular = self._hooks.gradients()
        self._meter.scale_(gradients, regular, (max_norm / (total + 1e-6)).clamp(max=1.0))
        self._open.is_clipped = True
        self._hooks.reset()  # a later backward shows as fired again
        return total.to(self._meter.norm_dtype)

    def release(self) -> None:
        """Removes every hook and lets go of the parameters; the history stays readable."""
        self._is_released = True
        self._hooks.remove()
        self.boundaries.remove()
        if self._signal_observer is not None:
            self._signal_observer.remove()
        self.history.archive()
        if self._updates is not None:
            self._updates.release()
        self._meter.release()
        self.coverage.note_unstepped(self.parameters)
        self.parameters = replace(self.parameters, parameters=())
        self._hooks = gradient_hooks.PythonGradientHooks((), None)

    def _install_hooks(self) -> gradient_hooks.GradientHooks:
        me = weakref.ref(self)  # this object owns the hooks: a strong reference back would keep both alive forever

        def on_backward_end() -> None:
            recorder = me()
            if recorder is not None:
                recorder._on_backward_end()

        def on_gradient(k: int) -> None:
            recorder = me()
            if recorder is not None:
                recorder._on_gradient(k)

        needs_end = self._measured_at == "backward" or self._is_averaged
        return gradient_hooks.install(
            self.parameters.parameters,
            on_backward_end if needs_end else None,
            on_gradient if self._measured_at == "hook" else None,
        )

    def _is_capturing(self) -> bool:
        return any(cuda_graphs.is_capturing(device) for device in self._meter.rows_on)

    def _is_due(self) -> bool:
        return self._pause_depth == 0 and self._open.number % self._every == 0

    def _are_signals_due(self) -> bool:
        return self._is_due() and self._open.number % self._activations_every == 0

    def _set_enabled(self) -> None:
        if self._is_released:
            return
        self._hooks.set_enabled(self._is_due())
        if self._signal_observer is not None:
            self._signal_observer.set_enabled(self._are_signals_due())

    def _on_backward_end(self) -> None:
        if self._is_capturing():
            return
        if self._is_averaged:  # DDP reduces its buckets after this; in a callback queued now they are averaged
            Variable._execution_engine.queue_callback(self._hooks.mark_unmodified)
        else:
            self._measure()

    def _on_gradient(self, k: int) -> None:
        gradient = self.parameters.parameters[k].grad
        if gradient is None or self._is_capturing():
            return
        if self._open.measured is None:
            self._regroup_if_moved()
            n_parameters = len(self.parameters.sites)
            self._open.measured = Measured(
                np.zeros(n_parameters, dtype=np.bool_), np.zeros(n_parameters, dtype=np.int64)
            )
            self._describe("pre-clip")
        self._open.measured.numels[k] = self._meter.measure_one(k, gradient, self.history.ring.rows())
        self._open.measured.present[k] = True

    def _measure(self) -> None:
        if self._hooks.converted():
            self._regroup_if_moved()
        done, modified, n_fired = self._hooks.measure(self._meter.native_rows(self.history.ring.rows()))
        is_clipped = modified or (n_fired == 0 and self._is_clipped_in_graph)
        self._describe("post-clip" if is_clipped else "pre-clip")
        if done:
            self._open.measured = self._meter.all_present
        else:
            self._regroup_if_moved()
            self._open.measured = self._meter.measure(*self._hooks.gradients(), self.history.ring.rows())
        if self._is_due() and n_fired < len(self.parameters.sites):
            unhooked = self._open.measured.present & ~np.array(self._hooks.fired(), dtype=np.bool_)
            self.coverage.note_unhooked(self._open.number, unhooked)

    def _describe(self, clipping: Literal["pre-clip", "post-clip"]) -> None:
        scale = self.boundaries.inverse_scale()
        self._open.scale = 1.0 if scale is None else scale
        self._open.provenance = Provenance("unscaled", "averaged" if self._is_averaged else "local", clipping)

    def _close(self, loss: torch.Tensor | float | None, skipped: torch.Tensor | float) -> bool:
        if self._is_capturing():
            self.coverage.note_capture(self._open.number)
            return False
        inverse = None if self._signal_observer is None else self.boundaries.take_inverse_of_backward()
        if is_due := self._is_due():
            # A hook that fired after clip_grad_norm_ means that another backward pass has added to the gradients.
            is_stale = self._measured_at == "step" and self._open.is_clipped and self._hooks.n_fired() > 0
            if self._open.measured is None or is_stale:
                self._measure()
            self._finish(loss, skipped, 1.0 if inverse is None else inverse)
        if self._signal_observer is not None:
            self._signal_observer.close(None)
        self._last_was_measured = is_due and self._open.measured is not None
        self._open = OpenStep(self._open.number + 1)
        self._hooks.start_step()
        self._set_enabled()
        return True

    def _finish(
        self, loss: torch.Tensor | float | None, skipped: torch.Tensor | float, signal_scale: torch.Tensor | float
    ) -> None:
        step, measured = self._open.number, self._open.measured
        assert measured is not None
        is_complete = measured is self._meter.all_present
        if not is_complete and not measured.present.any():
            self._open.measured = None
            self.coverage.note_no_gradient(step)
            return
        events = None
        if self._signal_observer is not None and self._are_signals_due():
            events = self._signal_observer.close(self.history.ring.signal_rows())
            self.coverage.note_silent_modules(step)
        slot = Slot(step, self._open.provenance, measured, events)
        self.history.ring.commit(slot, loss, self._open.scale, skipped, signal_scale)
        self.history.look_for_nonfinite()
        self.coverage.note(step, measured, is_complete)

    def _regroup_if_moved(self) -> None:
        if self._meter.moved():
            self.history.archive()
            self._meter.regroup()
            self.history.restart(self._meter.rows_on)
            if self._updates is not None:
                self._updates.restart()

    def _around_optimizer(self, optimizer: torch.optim.Optimizer, is_after: bool, is_open: bool) -> None:
        assert self._updates is not None
        if self._is_capturing():
            return
        if is_after:
            self._updates.end()
            return
        step = self._open.number if is_open else self._open.number - 1
        is_measured = self._is_due() if is_open else self._last_was_measured
        is_due = is_measured and step % self._updates_every == 0
        self._updates.begin(optimizer, step if is_due else None)


def _site_table(parameters: ObservedParameters) -> SiteTable:
    sites = parameters.sites
    return SiteTable(
        names=tuple(site.name for site in sites),
        kinds=("parameter",) * len(sites),
        ndims=tuple(len(site.shape) for site in sites),
        index={name: k for k, site in enumerate(sites) for name in site.names},
    )
