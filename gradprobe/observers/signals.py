"""Wires the observers of signals, i.e. activations and residual adds, to one signal buffer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from gradprobe.nn.residual import ResidualAdd
from gradprobe.observers.activations import ActivationHooks
from gradprobe.observers.junctions import JunctionHooks
from gradprobe.observers.signal_buffer import SignalBuffer
from gradprobe.snapshot.records import Events
from gradprobe.snapshot.signals import SignalTable


class SignalObserver:
    """Observes the outputs of modules, residual adds, and the gradients at both.

    Args:
        table: The sites of these modules and residual adds.
        activations: Modules to observe, by name.
        junctions: Residual adds to observe, by name.
        device: Where the rows lie.
        backend: Name of the back end, or "auto".
    """

    def __init__(
        self,
        table: SignalTable,
        activations: Mapping[str, nn.Module],
        junctions: Mapping[str, ResidualAdd],
        device: torch.device,
        backend: str,
    ) -> None:
        self.table = table
        self._observed = np.zeros(table.n_sites, dtype=np.bool_)  # [S]
        self._buffer = SignalBuffer(table.n_sites, device, backend)
        self._activations = ActivationHooks(tuple(activations.values()), self._buffer)
        self._junctions = JunctionHooks(tuple(junctions.values()), self._buffer, table.first_junction_site)

    def set_enabled(self, enabled: bool) -> None:
        """Turns the recording of signals on or off."""
        self._buffer.enabled = enabled
        self._activations.follow_gate()

    def close(self, rows: torch.Tensor | None) -> Events | None:
        """Ends a step.

        Args:
            rows: Rows to write for the sites, float64 [S, 6]; None discards the step.

        Returns:
            The events of the step, None if it was discarded or had none.
        """
        events = None
        if rows is None or self._buffer.n_events == 0:
            self._buffer.clear()
        else:
            events = self._buffer.close(rows)
            self._observed |= events.measured.present
        self._activations.start_step()
        self._junctions.start_step()
        return events

    def silent(self) -> tuple[str, ...]:
        """Lists the modules that have returned nothing so far in the observed steps."""
        returned = {name for name, present in zip(self.table.names, self._observed, strict=True) if present}
        return tuple(name for name in (*self.table.activations, *self.table.junctions) if name not in returned)

    def unmeasured(self) -> tuple[str, ...]:
        """Lists the modules that returned tensors which no kernel accepts."""
        return tuple(self.table.activations[m] for m in sorted(self._activations.unmeasured))

    def remove(self) -> None:
        """Removes every hook, for good. The operators in compiled graphs stay, and do nothing from now on."""
        self._buffer.release()
        self._activations.remove()
        self._junctions.remove()
