"""The probe: attaches to a model, measures its gradients in every step, and hands out what it saw."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn
from torch.autograd import Variable

from gradprobe import sinks
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.findings import Finding
from gradprobe.errors import ArgumentError, GradprobeError
from gradprobe.observers import gradient_hooks
from gradprobe.observers.activations import Selection, select_modules
from gradprobe.observers.cuda_graphs import is_capturing
from gradprobe.observers.gradients import GradientReducer
from gradprobe.observers.junctions import junction_modules
from gradprobe.observers.parameters import ObservedParameter, find_parameters, unstepped_parameters
from gradprobe.observers.ring_buffer import Slot
from gradprobe.observers.signals import SignalObserver
from gradprobe.observers.updates import UpdateObserver
from gradprobe.probe.coverage import Coverage, CoverageLog
from gradprobe.probe.history import History
from gradprobe.probe.options import (
    Options,
    When,
    check_loss,
    check_max_norm,
    check_model,
)
from gradprobe.probe.step_boundaries import StepBoundaries
from gradprobe.snapshot.export import to_pandas
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.signals import SignalTable
from gradprobe.snapshot.snapshot import NonFinite, SiteTable, Snapshot

if TYPE_CHECKING:
    import pandas

_attached: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    params: bool = True,
    activations: Selection = False,
    junctions: bool = True,
    updates: bool = False,
    every: int = 1,
    activations_every: int = 1,
    updates_every: int = 1,
    capacity: int = 1024,
    backend: str = "auto",
    when: When = "auto",
    grad_scaler: torch.amp.GradScaler | None = None,
    process_group: object | None = None,
) -> Probe:
    """Attaches a probe to a model. It changes neither the training nor the random numbers.

    Args:
        model: Any module with at least one trainable parameter.
        optimizer: Closes a step each time it steps; without one, call `Probe.step()` once per step.
        params: Observe the gradients of the parameters.
        activations: Observe outputs of modules and the gradients that come back to them: True for every module without
            children that is no junction, a list of patterns of module names such as `["layer1.*", "head"]`, or a
            function of name and module.
        junctions: Observe the residual junctions, which are the `gradprobe.nn.ResidualAdd` modules of the model.
        updates: Observe how far the optimizer moves each parameter. Takes a copy of the parameters for the time of its
            step.
        every: Measure each step whose number is a multiple of this.
        activations_every: Of those steps, observe activations and junctions where the number is a multiple of this.
        updates_every: Of those steps, observe updates where the number is a multiple of this.
        capacity: Number of measured steps kept, newest first to stay.
        backend: "auto", or a name from `gradprobe.backends()`.
        when: When gradients are measured: "step" as the optimizer is about to use them; "backward" at the end of each
            backward, before anything else can change them; "hook" each as it becomes ready, for optimizers that step
            inside backward; "auto" is "step" with an optimizer and "backward" without.
        grad_scaler: The gradient scaler in use; numbers are then given unscaled, and skipped steps are marked.
        process_group: Not available yet.

    Returns:
        The probe; also a context manager that detaches at its end.

    Raises:
        ArgumentError: An argument is not what was needed, or the model has a probe already.
        BackendError: The backend cannot run on the model's device.
        NotImplementedError: Something was asked for that is not available yet.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(model, optimizer=optimizer) as probe:
        ...     model(torch.ones(4, 3)).sum().backward()
        ...     optimizer.step()
        >>> probe.latest()["bias"].norm
        4.0
    """
    if process_group is not None:
        raise NotImplementedError("process_group: not available in this version; leave it out")
    check_model(model)
    options = Options(
        optimizer=optimizer,
        params=params,
        activations=activations,
        junctions=junctions,
        updates=updates,
        every=every,
        activations_every=activations_every,
        updates_every=updates_every,
        capacity=capacity,
        backend=backend,
        when=when,
        grad_scaler=grad_scaler,
    )
    return Probe(model, options)


class Probe:
    """Measures the gradients of one model; made by `attach`, which describes the options."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        if model in _attached:
            raise ArgumentError("model: has a probe already; call its detach() first")
        optimizer = options.optimizer
        self._every, self._activations_every = options.every, options.activations_every
        self._updates_every = options.updates_every
        self._found = find_parameters(model)
        joined, unobserved = junction_modules(model) if options.junctions else ({}, ())
        chosen: dict[str, nn.Module] = {}
        if options.activations is not False:
            chosen = select_modules(model, options.activations, elsewhere=joined)
        if optimizer is not None and len(unstepped_parameters(optimizer, self._found)) == len(self._found.sites):
            raise ArgumentError("optimizer: need one that steps parameters of the model; it steps none of them")
        self._reducer = GradientReducer(self._found.parameters, options.backend)
        self._model = weakref.ref(model)
        self._when: When = options.when
        if self._when == "auto":
            self._when = "step" if optimizer is not None else "backward"
        self._averages = isinstance(model, nn.parallel.DistributedDataParallel) and self._when == "step"
        self._table = _site_table(self._found.sites)
        module_types = tuple(type(module).__name__ for module in chosen.values())
        signals = SignalTable(tuple(chosen), tuple(joined), module_types) if chosen or joined else None
        self._updates: UpdateObserver | None = None
        if options.updates:
            self._updates = UpdateObserver(self._found.parameters, self._table.names, options.backend, options.capacity)
        self._history = History(
            options.capacity,
            self._reducer.rows_on,
            self._table,
            self._reducer.in_site_order,
            signals,
            self._updates,
        )
        self._signal_observer: SignalObserver | None = None
        if signals is not None:
            device = next(iter(self._reducer.rows_on))
            self._signal_observer = SignalObserver(signals, chosen, joined, device, options.backend)
        self._coverage = CoverageLog(self._found, self._signal_observer, unobserved, optimizer)
        self._step = 0
        self._pause_depth = 0
        self._measured: Measured | None = None  # what the open step has measured
        self._clipped = False
        self._is_clipped_in_graph = False
        self._last_was_measured = False
        self._scale: torch.Tensor | float = 1.0
        self._provenance = Provenance("unscaled", "local", "pre-clip")
        self._detached = False
        self._hooks = self._install_taps()
        around = self._around_optimizer if options.updates else None
        self._boundaries = StepBoundaries(optimizer, options.grad_scaler, self._hooks, self._close, around)
        _attached[model] = self

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Closes the step: what was measured becomes a snapshot. Called for you where an optimizer was given.

        With an optimizer it may still be called, just before or after the optimizer's step, to add the loss.

        Args:
            loss: The loss of the step, with one element; it is not waited for.

        Raises:
            ArgumentError: The loss is no number, or the probe is detached.
        """
        self._check_attached()
        check_loss(loss)
        if not self._boundaries.closed_by_optimizer():
            self._boundaries.close_by_user(loss)
        elif loss is not None and self._last_was_measured:
            self._history.ring.add_loss(loss)

    def latest(self, wait: bool = False) -> Snapshot | None:
        """Gives the newest finished step.

        Args:
            wait: Wait for the device, so that the last closed step is there; otherwise it may be an earlier one.

        Returns:
            The snapshot, or None where no step is finished.
        """
        return self._history.latest(wait)

    def history(self) -> list[Snapshot]:
        """Gives the finished steps that are kept, oldest first; waits for the device."""
        return self._history.all()

    def to_pandas(self) -> pandas.DataFrame:
        """Gives the history as one tidy table: a row for each step and site, a column for each statistic."""
        return to_pandas(self.history())

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Writes the history to a new file, one JSON object for each step and site.

        Args:
            path: File to create.

        Raises:
            StoreError: The file exists or cannot be written.
        """
        sinks.write_jsonl(self.history(), path)

    def findings(self) -> list[Finding]:
        """Applies the rules of `gradprobe.diagnosis.diagnose` to the history."""
        return diagnose(self.history())

    def first_nonfinite(self) -> NonFinite | None:
        """Tells where NaN or infinity was first seen, in the order of execution, since attach; waits for the device.

        Known also when the step itself is no longer kept. With `activations=True` it names the module.

        Returns:
            The step, the site and the module, or None where everything was finite.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
            >>> probe = attach(model, activations=True)
            >>> model(torch.tensor([[1.0, float("inf")]])).sum().backward()
            >>> probe.step()
            >>> print(probe.first_nonfinite())
            step 0, forward: output of 0 has 2 non-finite of 2 values
        """
        return self._history.first_nonfinite()

    def coverage(self) -> Coverage:
        """Tells what the probe has seen, and what it cannot see."""
        return self._coverage.report(self._found, None if self._detached else self._model())

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> torch.Tensor:
        """Clips the gradients as `torch.nn.utils.clip_grad_norm_` does, with the norms that the probe takes anyway.

        The step's snapshot then holds the gradients from before clipping.

        Args:
            max_norm: Largest total norm allowed.
            error_if_nonfinite: Raise if the total norm is NaN or infinite; this waits for the device.

        Returns:
            The total norm before clipping, 0-d, in the gradients' dtype but at least float32.

        Raises:
            ArgumentError: `max_norm` is no number, or the probe is detached.
            RuntimeError: The total norm is not finite and `error_if_nonfinite` is set.

        Example:
            >>> model = nn.Linear(2, 1, bias=False)
            >>> probe = attach(model)
            >>> model(torch.tensor([[3.0, 4.0]])).backward()
            >>> probe.clip_grad_norm_(1.0)
            tensor(5.)
        """
        self._check_attached()
        check_max_norm(max_norm)
        rows = self._history.ring.rows()
        if self._is_capturing():  # each replay would write to the rows of a step that is over
            rows = {device: torch.empty_like(part) for device, part in rows.items()}
            self._reducer.measure(*self._hooks.gradients(), rows)
            self._is_clipped_in_graph = True
        elif self._measured is None or self._when == "hook" or self._hooks.modified():
            self._measure()
        total = self._reducer.total_norm(rows)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"clip_grad_norm_: need a finite total norm; got {total.item()}")
        gradients, regular = self._hooks.gradients()
        self._reducer.scale_(gradients, regular, (max_norm / (total + 1e-6)).clamp(max=1.0))
        self._clipped = True
        self._hooks.reset()  # a later backward shows as fired again
        return total.to(self._reducer.norm_dtype)

    @contextmanager
    def paused(self) -> Iterator[Probe]:
        """Measures nothing inside the block. Steps are still counted, so that their numbers stay the training's."""
        self._pause_depth += 1
        self._set_enabled()
        try:
            yield self
        finally:
            self._pause_depth -= 1
            self._set_enabled()

    def detach(self) -> None:
        """Removes every hook. What was measured stays readable. Calling it again does nothing."""
        if self._detached:
            return
        self._detached = True
        self._hooks.remove()
        self._boundaries.remove()
        if self._signal_observer is not None:
            self._signal_observer.remove()
        model = self._model()
        if model is not None and _attached.get(model) is self:
            del _attached[model]
        self._history.archive()
        if self._updates is not None:
            self._updates.release()
        self._reducer.release()
        self._coverage.note_unstepped(self._found)
        self._found = replace(self._found, parameters=())
        self._hooks = gradient_hooks.PythonGradientHooks((), None)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "detached" if self._detached else f"when={self._when!r}, every={self._every}"
        return f"Probe({len(self._found.sites)} sites, {self._coverage.n_measured} steps measured, {state})"

    def _install_taps(self) -> gradient_hooks.GradientHooks:
        me = weakref.ref(self)  # the hooks live in the probe; a strong reference here would keep both for ever

        def on_backward_end() -> None:
            probe = me()
            if probe is not None:
                probe._on_backward_end()

        def on_gradient(k: int) -> None:
            probe = me()
            if probe is not None:
                probe._on_gradient(k)

        needs_end = self._when == "backward" or self._averages
        return gradient_hooks.install(
            self._found.parameters,
            on_backward_end if needs_end else None,
            on_gradient if self._when == "hook" else None,
        )

    def _is_capturing(self) -> bool:
        return any(is_capturing(device) for device in self._reducer.rows_on)

    def _wanted(self) -> bool:
        return self._pause_depth == 0 and self._step % self._every == 0

    def _wants_signals(self) -> bool:
        return self._wanted() and self._step % self._activations_every == 0

    def _on_backward_end(self) -> None:
        if self._is_capturing():
            return
        if self._averages:  # DDP finishes its buckets after this; called again from there, the gradients are averaged
            Variable._execution_engine.queue_callback(self._hooks.mark_unmodified)
        else:
            self._measure()

    def _on_gradient(self, k: int) -> None:
        gradient = self._found.parameters[k].grad
        if gradient is None or self._is_capturing():
            return
        if self._measured is None:
            self._regroup_if_moved()
            n_sites = len(self._found.sites)
            self._measured = Measured(np.zeros(n_sites, dtype=np.bool_), np.zeros(n_sites, dtype=np.int64))
            self._describe("pre-clip")
        self._measured.numels[k] = self._reducer.measure_one(k, gradient, self._history.ring.rows())
        self._measured.present[k] = True

    def _measure(self) -> None:
        if self._hooks.converted():
            self._regroup_if_moved()
        done, modified, n_fired = self._hooks.measure(self._reducer.native_rows(self._history.ring.rows()))
        is_clipped = modified or (n_fired == 0 and self._is_clipped_in_graph)
        self._describe("post-clip" if is_clipped else "pre-clip")
        if done:
            self._measured = self._reducer.all_present
        else:
            self._regroup_if_moved()
            self._measured = self._reducer.measure(*self._hooks.gradients(), self._history.ring.rows())
        if self._wanted() and n_fired < len(self._found.sites):
            unhooked = self._measured.present & ~np.array(self._hooks.fired(), dtype=np.bool_)
            self._coverage.note_unhooked(self._step, unhooked)

    def _describe(self, clipping: Literal["pre-clip", "post-clip"]) -> None:
        scale = self._boundaries.inverse_scale()
        self._scale = 1.0 if scale is None else scale
        self._provenance = Provenance("unscaled", "averaged" if self._averages else "local", clipping)

    def _close(self, loss: torch.Tensor | float | None, skipped: torch.Tensor | float) -> bool:
        if self._is_capturing():
            self._coverage.note_capture(self._step)
            return False
        wanted = self._wanted()
        inverse = None if self._signal_observer is None else self._boundaries.take_inverse_of_backward()
        if wanted:
            # after a clip_grad_norm_ a fired tap means that another backward has added to the gradients
            if self._measured is None or (self._when == "step" and self._hooks.n_fired() > 0 and self._clipped):
                self._measure()
            self._finish(loss, skipped, 1.0 if inverse is None else inverse)
        if self._signal_observer is not None:
            self._signal_observer.close(None)
        self._last_was_measured = wanted and self._measured is not None
        self._measured = None
        self._clipped = False
        self._step += 1
        self._hooks.start_step()
        self._set_enabled()
        return True

    def _finish(
        self, loss: torch.Tensor | float | None, skipped: torch.Tensor | float, signal_scale: torch.Tensor | float
    ) -> None:
        measured = self._measured
        assert measured is not None
        is_complete = measured is self._reducer.all_present
        if not is_complete and not measured.present.any():
            self._measured = None
            self._coverage.note_no_gradient(self._step)
            return
        events = None
        if self._signal_observer is not None and self._wants_signals():
            events = self._signal_observer.close(self._history.ring.signal_rows())
            self._coverage.note_passing(self._step)
        slot = Slot(self._step, self._provenance, measured, events)
        self._history.ring.commit(slot, loss, self._scale, skipped, signal_scale)
        self._history.look_for_nonfinite()
        self._coverage.note(self._step, measured, is_complete)

    def _regroup_if_moved(self) -> None:
        if self._reducer.moved():
            self._history.archive()
            self._reducer.regroup()
            self._history.restart(self._reducer.rows_on)
            if self._updates is not None:
                self._updates.restart()

    def _around_optimizer(self, optimizer: torch.optim.Optimizer, is_after: bool, is_open: bool) -> None:
        assert self._updates is not None
        if self._is_capturing():
            return
        step = self._step if is_open else self._step - 1
        is_wanted = (self._wanted() if is_open else self._last_was_measured) and step % self._updates_every == 0
        if is_after:
            self._updates.end()
        else:
            self._updates.begin(optimizer, step if is_wanted else None)

    def _set_enabled(self) -> None:
        if self._detached:
            return
        self._hooks.set_enabled(self._wanted())
        if self._signal_observer is not None:
            self._signal_observer.set_enabled(self._wants_signals())

    def _check_attached(self) -> None:
        if self._detached:
            raise GradprobeError("the probe is detached; attach a new one")


def _site_table(sites: Sequence[ObservedParameter]) -> SiteTable:
    return SiteTable(
        names=tuple(site.name for site in sites),
        kinds=tuple(site.kind for site in sites),
        ndims=tuple(len(site.shape) for site in sites),
        index={name: k for k, site in enumerate(sites) for name in site.names},
    )
