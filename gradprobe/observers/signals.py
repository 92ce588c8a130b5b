"""Wires the observers of signals, i.e. activations and residual adds, to one signal buffer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from gradprobe.nn.residual import ResidualAdd
from gradprobe.observers.activations import ActivationHooks
from gradprobe.observers.fence import Fence
from gradprobe.observers.junctions import JunctionHooks
from gradprobe.observers.magnitudes import MagnitudeObserver, StepMagnitudes
from gradprobe.observers.signal_buffer import SignalBuffer
from gradprobe.snapshot.records import Events
from gradprobe.snapshot.signals import ACTIVATION_KINDS, SignalTable
from gradprobe.text.words import quoted

_MOST_LISTED = 5  # parts in a message
_MAGNITUDES = "the magnitudes of activations"
# Kinds of modules that models often hold for their rate alone, and call as a function.
_HELD_FOR_AN_ATTRIBUTE = ("Dropout", "StochasticDepth", "DropPath")


class SignalObserver:
    """Observes the outputs of modules, residual adds, and the gradients at both.

    An error in measuring switches off the output, the gradient or the residual add that it concerns, and is reported
    when the step is closed: once for all that fail alike. An error in counting magnitudes ends that alone.

    Attributes:
        table: The sites.
        magnitudes: How the magnitudes of the step closed last spread, None if they were not counted.

    Args:
        table: The sites of these modules and residual adds.
        activations: Modules to observe, by name.
        junctions: Residual adds to observe, by name.
        device: Where the rows lie.
        backend: Name of the back end, or "auto".
        fence: Takes the errors of measuring.
        magnitudes: Counts the values of activations by magnitude, None if they are not counted.
    """

    def __init__(
        self,
        table: SignalTable,
        activations: Mapping[str, nn.Module],
        junctions: Mapping[str, ResidualAdd],
        device: torch.device,
        backend: str,
        fence: Fence | None = None,
        magnitudes: MagnitudeObserver | None = None,
    ) -> None:
        self.table = table
        self.magnitudes: StepMagnitudes | None = None
        self._counter = magnitudes
        self._counted: StepMagnitudes | None = None  # those of the open step
        self._counting_error: Exception | None = None
        self._fence = fence or Fence()
        self._reported: set[tuple[str, str]] = set()
        self._observed = np.zeros(table.n_sites, dtype=np.bool_)  # [S]
        self._buffer = SignalBuffer(table.n_sites, device, backend, table.first_junction_site, self._fence.strict)
        self._activations = ActivationHooks(tuple(activations.values()), self._buffer)
        try:
            self._junctions = JunctionHooks(tuple(junctions.values()), self._buffer, table.first_junction_site)
        except BaseException:
            self._activations.remove()
            raise

    def set_enabled(self, enabled: bool, step: int = 0) -> None:
        """Turns the recording of signals on or off, and the counting of magnitudes if it is due in the open step."""
        self._buffer.enabled = enabled
        self._activations.follow_gate()
        is_due = self._counter is not None and self._counter.is_due(step)
        if not is_due:
            self._counted = None
        elif self._counted is None:
            self._counted = StepMagnitudes(self.table.names)
        self._buffer.on_event = self._count if is_due else None

    def call_before_forward(self, callback: Callable[[], None] | None) -> None:
        """Sets what is called before the next forward pass is observed: the step before it may be over."""
        self._buffer.gate.on_forward = callback

    def close(self, rows: torch.Tensor | None) -> Events | None:
        """Ends a step.

        Args:
            rows: Rows to write for the sites, float64 [S, 6]; None discards the step.

        Returns:
            The events of the step, None if it was discarded, had none, or could not be read.
        """
        events = None
        counted, self._counted, self._buffer.on_event, self.magnitudes = self._counted, None, None, None
        try:
            if rows is None or self._buffer.n_events == 0:
                self._buffer.clear()
            else:
                events = self._buffer.close(rows)
                self._observed |= events.measured.present
                self._publish(counted)
            self._activations.start_step()
            self._junctions.start_step()
        except Exception as error:  # noqa: BLE001
            events = None
            self._fence.caught("activations and residual adds", error)
            self._buffer.switch_all_off()
            self.remove()
        self._report()
        return events

    def silent(self) -> tuple[str, ...]:
        """Lists the modules that have returned nothing so far in the observed steps, if one would expect it of them."""
        seen = {name for name, present in zip(self.table.names, self._observed, strict=True) if present}
        seen.update(self.table.names[site] for site in self._buffer.off_sites())
        types = zip(self.table.activations, self.table.module_types, strict=True)
        seen.update(name for name, kind in types if any(held in kind for held in _HELD_FOR_AN_ATTRIBUTE))
        return tuple(name for name in (*self.table.activations, *self.table.junctions) if name not in seen)

    def unmeasured(self) -> tuple[str, ...]:
        """Lists the modules that returned tensors which no kernel accepts, or that could not be measured."""
        found = {self.table.activations[m] for m in self._activations.unmeasured}
        found.update(self.table.names[site] for site in self._buffer.off_sites())
        return tuple(name for name in (*self.table.activations, *self.table.junctions) if name in found)

    def remove(self) -> None:
        """Removes every hook, for good. The operators in compiled graphs stay, and do nothing from now on."""
        self._buffer.release()
        self._activations.remove()
        self._junctions.remove()
        self._report()

    def _count(self, site: int, values: torch.Tensor) -> None:
        counter, counted = self._counter, self._counted
        if counter is None or counted is None:
            return
        try:
            counter.count_event(site, values, counted)
        except Exception as error:
            if self._fence.strict:
                raise
            counter.stop()
            self._counted = self._buffer.on_event = None
            self._counting_error = error.with_traceback(None)

    def _publish(self, counted: StepMagnitudes | None) -> None:
        if counted is not None and self._counter is not None:
            with self._fence.around(_MAGNITUDES, self._counter.stop):
                counted.publish()
                self.magnitudes = counted

    def _report(self) -> None:
        """Reports the errors since the last report, those that differ only in numbers as one."""
        error_of_counting, self._counting_error = self._counting_error, None
        if error_of_counting is not None:
            self._fence.caught(_MAGNITUDES, error_of_counting)
        alike: dict[tuple[str, str], tuple[Exception, list[str]]] = {}
        for site, error in self._buffer.take_errors():
            kind = (type(error).__name__, re.sub(r"\d+", "", str(error)))
            alike.setdefault(kind, (error, []))[1].append(self._part(site))
        for kind, (error, parts) in alike.items():
            part = ", ".join(parts[:_MOST_LISTED])
            if len(parts) > _MOST_LISTED:
                part += f" and {len(parts) - _MOST_LISTED} more"
            if kind in self._reported:  # another module fails like those that the user knows of
                self._fence.failures[part] = f"{type(error).__name__}: {error}"
            else:
                self._reported.add(kind)
                self._fence.caught(part, error)

    def _part(self, site: int) -> str:
        name = quoted(self.table.names[site])
        if site >= self.table.first_junction_site:
            return f"the residual add {name}"
        return f"the output of {name}" if site % len(ACTIVATION_KINDS) == 0 else f"the gradient at the output of {name}"
