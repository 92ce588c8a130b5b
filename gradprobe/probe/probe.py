"""Attaches to a model, and hands out what was measured."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.errors import ArgumentError, GradprobeError
from gradprobe.log.writer import RunWriter
from gradprobe.observers.activations import Selection
from gradprobe.observers.unsupported import refuse_unsupported
from gradprobe.probe.coverage import Coverage
from gradprobe.probe.dump import versions, write_dump
from gradprobe.probe.options import (
    Options,
    When,
    check_loss,
    check_max_norm,
    check_model,
    check_n_steps,
    check_timeout,
    checked_json,
    checked_step,
)
from gradprobe.probe.step_recorder import StepRecorder
from gradprobe.probe.stream import Stream
from gradprobe.report import run as run_report
from gradprobe.sinks.jsonl import write_jsonl
from gradprobe.snapshot.export import to_pandas
from gradprobe.snapshot.snapshot import NonFinite, Snapshot
from gradprobe.text.markup import folded, form

if TYPE_CHECKING:
    import altair
    import pandas

    from gradprobe.diagnosis.finding import Finding
    from gradprobe.observers.agreement import ProcessGroups
    from gradprobe.sinks.sink import Sink

_attached: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    params: bool = True,
    activations: Selection = False,
    junctions: bool = True,
    updates: bool = False,
    magnitudes: bool = False,
    every: int = 1,
    activations_every: int = 1,
    updates_every: int = 1,
    magnitudes_every: int = 100,
    capacity: int = 1024,
    backend: str = "auto",
    when: When = "auto",
    grad_scaler: torch.amp.GradScaler | Sequence[torch.amp.GradScaler] | None = None,
    process_group: ProcessGroups = None,
    reduce_activations: bool = False,
    strict: bool = False,
    log_dir: str | PathLike[str] | None = None,
    sinks: Sequence[Sink] = (),
    on_finding: Callable[[Finding], object] | None = None,
    start_step: int = 0,
) -> Probe:
    """Attaches a probe to a model. The training and the random numbers stay as they are, bit for bit.

    Args:
        model: Any module with at least one trainable parameter. If its parameters change later (layers are replaced,
            unfrozen or added), the probe follows, unless they are sharded.
        optimizer: The optimizer of the training, or a list of them, wrapped or not; their step closes the step of the
            probe. Without one, the step of any optimizer that steps a parameter of the model does, or else
            `Probe.step()`.
        params: Observe the gradients of the parameters. Only True is supported.
        activations: Which module outputs to observe, with the gradients at those outputs: True for every module without
            children except residual adds, a list of module name patterns such as `["layer1.*", "head"]`, or a
            function of name and module.
        junctions: Observe the residual adds, i.e. the `gradprobe.nn.ResidualAdd` modules of the model.
        updates: Observe how far the optimizer moves each parameter. Copies the parameters for the duration of its step.
        magnitudes: Count the values of each gradient by magnitude, in powers of two: `Snapshot.magnitudes` then tells
            quantiles, kurtosis, and which share would underflow or overflow in float16, bfloat16 and float8, and
            `Snapshot.activation_magnitudes` the same of each observed module's output and its gradient. Not of
            gradients and activations that are reduced over ranks, such as the gradients of a sharded model.
        every: Measure the steps whose number is a multiple of this.
        activations_every: Of the measured steps, observe activations and residual adds in those whose number is a
            multiple of this.
        updates_every: Of the measured steps, observe updates in those whose number is a multiple of this.
        magnitudes_every: Of the measured steps, count magnitudes in those whose number is a multiple of this.
        capacity: Number of measured steps to keep; the oldest are dropped first. Memory is taken as steps are recorded.
        backend: "auto", or a name from `gradprobe.backends()`.
        when: When to measure the gradients: "auto" or "backward" at the end of each backward pass, so before clipping;
            "step" just before the optimizer uses them, so after clipping, except by `Probe.clip_grad_norm_`; "hook"
            each one as soon as it is ready, for optimizers that step inside the backward pass: leave `optimizer` out
            and close the steps with `Probe.step()`.
        grad_scaler: The gradient scaler in use, or a list of them. Numbers are then reported unscaled, and skipped
            steps are marked. A scaler that is not given is found at the first step that it does not skip.
        process_group: Whose parts make up the gradients. None: what the parameters say; if they are DTensors (FSDP2,
            tensor parallelism) or managed by FSDP1, the numbers are those of the whole gradient, the same on every
            rank. All ranks that hold a part then have to attach, and detach, together. "local": this rank's part
            alone. A process group: plain tensors, too, are pieces of a whole over this group, as in hand-made
            sharding, expert or pipeline parallelism. A mapping of name patterns to groups says so of the parameters
            that fit, whatever they say themselves; the first pattern that fits counts.
        reduce_activations: Reduce activations and residual adds over the same ranks: their statistics are then those of
            the elements on all ranks together, copies included. Otherwise they are those of this rank.
        strict: Raise the errors of measuring. Otherwise whatever fails is reported once and no longer measured, and the
            training goes on as without a probe.
        log_dir: Folder to which the finished steps stream from another thread: tables in Parquet, or in JSON Lines
            without pyarrow, for `gradprobe.log.read_run`, pandas, polars and DuckDB. A folder that exists is continued,
            and nothing in it is overwritten. Killing the process loses at most the last seconds.
        sinks: Where else they go, e.g. `[gradprobe.sinks.CSV("steps.csv")]`. Like the log and `on_finding`, on rank 0
            only. One that fails is switched off with a warning; that holds with `strict`, too.
        on_finding: Called with each new finding, within seconds. In a thread of its own, so that the training never
            waits: set a flag or call `Probe.dump`, but leave the model alone. What it raises is only reported.
        start_step: Number of the first step. That of the training, if it resumes; see `Probe.load_state_dict`.

    Returns:
        The probe. It is also a context manager that detaches on exit.

    Raises:
        ArgumentError: An argument is invalid, the model already has a probe, or its gradients cannot be measured: it
            is on another device than the CPU or a GPU of type cuda, or sharded in a way that is not supported
            (DeepSpeed, Megatron). Or ranks that hold a part of the model did not attach, or with other options.
        BackendError: The back end cannot run on the model's device.
        StoreError: The log's folder cannot be written, or another probe is writing there.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(model, optimizer=optimizer) as probe:
        ...     model(torch.ones(4, 3)).sum().backward()
        ...     optimizer.step()
        >>> probe.latest()["bias"].norm
        4.0
    """
    check_model(model)
    options = Options(
        optimizer=optimizer,
        params=params,
        activations=activations,
        junctions=junctions,
        updates=updates,
        magnitudes=magnitudes,
        every=every,
        activations_every=activations_every,
        updates_every=updates_every,
        magnitudes_every=magnitudes_every,
        capacity=capacity,
        backend=backend,
        when=when,
        grad_scaler=grad_scaler,
        process_group=process_group,
        reduce_activations=reduce_activations,
        strict=strict,
        log_dir=log_dir,
        sinks=sinks,
        on_finding=on_finding,
        start_step=start_step,
    )
    with torch.inference_mode(False):  # otherwise no training could write to the rows
        return Probe(model, options)


class Probe:
    """Measures the gradients of one model. Made by `attach`, which describes the options."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        if model in _attached:
            raise ArgumentError("model: already has a probe; call its detach() first")
        refuse_unsupported(model)
        self._model = weakref.ref(model)
        self._description = f"when={options.measured_at!r}, every={options.every}"
        self._on_finding = options.on_finding
        self._stream: Stream | None = None
        self._is_detached = False
        is_streaming = options.has_stream and _is_first_rank()
        self._about: dict[str, object] = {
            "model": type(model).__name__,
            "options": options.described(),
            "versions": versions(),
        }
        # before the ranks meet: afterwards, none may fail
        writer = RunWriter(options.log_dir, self._about) if is_streaming and options.log_dir is not None else None
        try:
            self._recorder = StepRecorder(model, options)
            if is_streaming:
                about = {**self._about, "parameters": list(self._recorder.names)}
                self._stream = Stream(self, self._recorder.history, writer, options.sinks, about, self._tell)
        except BaseException:
            if writer is not None:
                writer.close()
            if hasattr(self, "_recorder"):
                self._recorder.release()
            raise
        _attached[model] = self

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Closes a step that no optimizer closes and records it as a snapshot; otherwise only adds the loss.

        Call it once per backward pass, best after the optimizer's step: if it comes first and `attach` was given no
        optimizer, it closes the very first step, which then shows nothing of a clipping between the two calls.

        Args:
            loss: The loss, one element. A tensor on a device is not waited for. The losses of a step's micro-batches
                are averaged.

        Raises:
            ArgumentError: The loss is not one real number.
            GradprobeError: The probe is detached.
        """
        self._check_attached()
        check_loss(loss)
        self._recorder.boundaries.close_by_user(loss)

    def latest(self, wait: bool = False) -> Snapshot | None:
        """Returns the newest finished step.

        Args:
            wait: Wait for the device, so that the step closed last is returned; otherwise it may be an earlier one.

        Returns:
            The snapshot, or None if no step is finished.
        """
        self._settle()
        return self._recorder.history.latest(wait)

    def history(self) -> list[Snapshot]:
        """Returns the finished steps still kept, oldest first. Waits for the device."""
        self._settle()
        return self._recorder.history.all()

    def drain(self) -> list[Snapshot]:
        """Returns each finished step once, oldest first: those since the last call that the history still holds.

        Never waits for the device: a step that has not arrived comes with the next call, as does the newest while it
        lacks a loss that other steps have.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> with attach(model) as probe:
            ...     for _ in range(3):
            ...         model(torch.ones(1, 2)).sum().backward()
            ...         probe.step()
            >>> [snapshot.step for snapshot in probe.drain()], probe.drain()
            ([0, 1, 2], [])
        """
        self._settle()
        return self._recorder.history.drain()

    def to_pandas(self) -> pandas.DataFrame:
        """Returns the history as a tidy table: one row per step and observed tensor, one column per statistic."""
        return to_pandas(self.history())

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Writes the history to a new file, one JSON object per step and observed tensor.

        Args:
            path: File to create.

        Raises:
            StoreError: The file exists or cannot be written.
        """
        write_jsonl(self.history(), path)

    def findings(self) -> Diagnosis:
        """Applies the rules of `gradprobe.diagnosis` to all steps since attach, kept in the history or not.

        Waits for the device. The rules are applied as the steps come; this only judges the newest again.

        Returns:
            The findings, causes before symptoms and otherwise the most severe first, and how much was judged; print it
            to read it.

        Example:
            >>> probe = attach(nn.Linear(3, 1))
            >>> print(probe.findings())
            No gradient was measured, so nothing is known: no backward pass has reached the model since attach.
        """
        self._settle()
        diagnosis = self._recorder.history.diagnosis()
        return replace(diagnosis, note=self._recorder.why_blind(has_steps=diagnosis.n_steps > 0))

    def report(self, path: str | PathLike[str]) -> None:
        """Writes a page with the findings, charts and tables of the history. Waits for the device.

        Args:
            path: The HTML file; an existing one is replaced.

        Raises:
            ArgumentError: A library that draws is not installed.
            StoreError: The file cannot be written.
        """
        run_report.write_page(self.history(), self.findings(), path)

    def plot(self, kind: str = "heatmap") -> altair.HConcatChart | altair.VConcatChart:
        """Draws one chart of the history; its `save` writes PNG, SVG, PDF or HTML. Waits for the device.

        Args:
            kind: "loss" with the findings, "heatmap" of gradient norms over layers and steps, "update_ratio",
                "magnitude" against the dtype's range, "shortcut_share" of residual adds, or "dead_units".

        Raises:
            ArgumentError: The kind is unknown, the run did not record what the chart shows, or a library that draws is
                not installed.
        """
        return run_report.plot(self.history(), self.findings(), kind)

    def first_nonfinite(self) -> NonFinite | None:
        """Returns where NaN or infinity was first seen since attach, in order of execution. Waits for the device.

        It is remembered after its step has left the history. With `activations=True` it names the module.

        Returns:
            The step, the tensor and the module, or None if everything was finite.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
            >>> probe = attach(model, activations=True)
            >>> model(torch.tensor([[1.0, float("inf")]])).sum().backward()
            >>> probe.step()
            >>> print(probe.first_nonfinite())
            step 0, forward: 2 of 2 values are not finite in the output of '0'
        """
        self._settle()
        return self._recorder.history.first_nonfinite()

    def coverage(self) -> Coverage:
        """Returns what the probe has observed, and what it cannot observe."""
        self._settle()
        return self._recorder.coverage.report(self._recorder.boundaries.optimizers)

    @property
    def stored_step(self) -> int | None:
        """Number of the newest step in the run folder, None if there is none: killing the process does not lose it."""
        return None if self._stream is None else self._stream.stored_step

    def flush(self, timeout_s: float = 30.0) -> int | None:
        """Waits until the finished steps are in the run folder and have been handed to the sinks.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            `stored_step`.

        Raises:
            ArgumentError: The time is not above zero.
        """
        check_timeout(timeout_s)
        self._settle()
        if self._stream is not None:
            self._stream.flush(timeout_s)
        return self.stored_step

    def state_dict(self) -> dict[str, int]:
        """Returns what a checkpoint needs so that a probe of the resumed training goes on counting.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> probe = attach(model, start_step=100)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> probe.step()
            >>> probe.state_dict()
            {'step': 101}
        """
        self._settle()
        return {"step": self._recorder.number}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting where a checkpoint was made. Call it between two steps, on every rank.

        Steps of that number or a larger one are dropped from the history, and replaced when the log is read.

        Args:
            state: From `state_dict`.

        Raises:
            ArgumentError: The state is not one of a probe.
            GradprobeError: The probe is detached.
        """
        self._check_attached()
        self._recorder.go_to(checked_step(state))

    def dump(self, path: str | PathLike[str], *, batch_ids: object = None, n_steps: int | None = None) -> None:
        """Writes what is needed to look at a training that has broken, and to repeat its step, to a new folder.

        That is the newest steps and the findings as a run folder, the states of the random number generators of torch,
        NumPy and Python in random_states.pt, and the batch ids in about.json.

        Args:
            path: The folder.
            batch_ids: What identifies the batch at hand; anything that JSON can hold.
            n_steps: Number of steps to write, None for all that the history holds.

        Raises:
            ArgumentError: `n_steps` is not above zero, or JSON cannot hold the batch ids.
            StoreError: The folder is not empty or cannot be written.
        """
        given: dict[str, object] = {"step": self._recorder.number, "batch_ids": checked_json("batch_ids", batch_ids)}
        check_n_steps(n_steps)
        kept = self.history()
        write_dump(Path(path), kept[-(n_steps or len(kept)) :], self.findings(), self._about, given)

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> torch.Tensor:
        """Clips the gradients as `torch.nn.utils.clip_grad_norm_` does, reusing the norms that the probe measures.

        The snapshot of the step holds the gradients before this clipping: those that were changed since the backward
        pass are measured again.

        Args:
            max_norm: Largest total norm allowed.
            error_if_nonfinite: Raise if the total norm is NaN or infinite. This waits for the device.

        Returns:
            The total norm before clipping, 0-d, in the widest dtype of the gradients but at least float32.

        Raises:
            ArgumentError: `max_norm` is not a number above zero.
            GradprobeError: The probe is detached.
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
        """Pauses measuring inside the block. Steps are still counted, so step numbers stay those of the training.

        `torch.jit.script` needs a pause if activations are observed: it rejects their hooks, which are removed
        meanwhile.
        """
        with self._recorder.paused():
            yield self

    def detach(self) -> None:
        """Removes every hook, and stores the last steps. The history stays readable. Further calls do nothing.

        It waits at most ten seconds for the log and the sinks.
        """
        if self._is_detached:
            return
        self._is_detached = True
        try:
            self._recorder.release()
        finally:
            model = self._model()
            if model is not None and _attached.get(model) is self:
                del _attached[model]
            if self._stream is not None:
                self._stream.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        n_parameters, n_measured = self._recorder.n_parameters, self._recorder.coverage.n_measured
        state = "detached" if self._is_detached else self._description
        return f"Probe({n_parameters} parameters, {n_measured} steps measured, {state})"

    def _repr_html_(self) -> str:
        newest, shown = self.latest(), [self.findings()._repr_html_()]
        if newest is not None:
            shown.append(folded("Newest step", [newest._repr_html_()]))
        shown.append(folded("Coverage", [self.coverage()._repr_html_()]))
        return form(repr(self), shown)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied or unpickled owner has no probe

    def _settle(self) -> None:
        is_callback = self._stream is not None and self._stream.is_own_thread  # beside the training
        if not self._is_detached and not is_callback:
            self._recorder.settle()

    def _tell(self, finding: Finding) -> None:
        if self._on_finding is not None:
            self._on_finding(finding)

    def _check_attached(self) -> None:
        if self._is_detached:
            raise GradprobeError("the probe is detached; attach a new one")


def _is_first_rank() -> bool:
    """Returns whether this process writes for all: those of torchrun have a number before they are a group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
