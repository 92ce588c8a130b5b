"""Attaches to a model, and hands out what was measured."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradprobe import sinks
from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.diagnosis.findings import Finding
from gradprobe.errors import ArgumentError, GradprobeError
from gradprobe.observers.activations import Selection
from gradprobe.probe.coverage import Coverage
from gradprobe.probe.options import Options, When, check_loss, check_max_norm, check_model
from gradprobe.probe.step_recorder import StepRecorder
from gradprobe.snapshot.export import to_pandas
from gradprobe.snapshot.snapshot import NonFinite, Snapshot

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
    """Measures the gradients of one model. Made by `attach`, which describes the options."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        if model in _attached:
            raise ArgumentError("model: has a probe already; call its detach() first")
        self._model = weakref.ref(model)
        self._description = f"when={options.measured_at!r}, every={options.every}"
        self._recorder = StepRecorder(model, options)
        self._is_detached = False
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
        boundaries = self._recorder.boundaries
        if not boundaries.closed_by_optimizer():
            boundaries.close_by_user(loss)
        elif loss is not None:
            self._recorder.add_loss(loss)

    def latest(self, wait: bool = False) -> Snapshot | None:
        """Gives the newest finished step.

        Args:
            wait: Wait for the device, so that the last closed step is there; otherwise it may be an earlier one.

        Returns:
            The snapshot, or None where no step is finished.
        """
        return self._recorder.history.latest(wait)

    def history(self) -> list[Snapshot]:
        """Gives the finished steps that are kept, oldest first; waits for the device."""
        return self._recorder.history.all()

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
        return self._recorder.history.first_nonfinite()

    def coverage(self) -> Coverage:
        """Tells what the probe has seen, and what it cannot see."""
        model = None if self._is_detached else self._model()
        return self._recorder.coverage.report(self._recorder.parameters, model)

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
        return self._recorder.clip(max_norm, error_if_nonfinite)

    @contextmanager
    def paused(self) -> Iterator[Probe]:
        """Measures nothing inside the block. Steps are still counted, so that their numbers stay the training's."""
        self._recorder.pause(1)
        try:
            yield self
        finally:
            self._recorder.pause(-1)

    def detach(self) -> None:
        """Removes every hook. What was measured stays readable. Calling it again does nothing."""
        if self._is_detached:
            return
        self._is_detached = True
        self._recorder.release()
        model = self._model()
        if model is not None and _attached.get(model) is self:
            del _attached[model]

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        n_parameters, n_measured = len(self._recorder.parameters.sites), self._recorder.coverage.n_measured
        state = "detached" if self._is_detached else self._description
        return f"Probe({n_parameters} parameters, {n_measured} steps measured, {state})"

    def _check_attached(self) -> None:
        if self._is_detached:
            raise GradprobeError("the probe is detached; attach a new one")
