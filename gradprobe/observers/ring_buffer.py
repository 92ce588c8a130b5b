"""A ring buffer of finished steps: rows on the device, read on the host without blocking the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gradprobe.ops.rows import N_NONFINITE, STATS
from gradprobe.snapshot.records import Events, FloatArray, Measured, Provenance

LOSS, SCALE, SKIPPED, SIGNAL_SCALE = range(4)  # columns of each step's extra row, on the first device


@dataclass(slots=True)
class Slot:
    """One step in the ring: the part that the host knows without waiting for a device.

    Attributes:
        step: Number of the step.
        provenance: Scale, reduction and clipping of its gradients.
        measured: Which parameters had a gradient, and their sizes.
        events: Events at activations and residual adds, None if those were not observed.
        extras: Those of the extra row's values that the host knows, by column; the others are in the extra row.
        has_loss: A loss was given.
        ready: For each device other than the host, the event after which its rows can be read.
    """

    step: int
    provenance: Provenance
    measured: Measured
    events: Events | None = None
    extras: dict[int, float] = field(default_factory=dict)
    has_loss: bool = False
    ready: dict[torch.device, torch.Event] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that has arrived on the host.

    Attributes:
        slot: The part that the host knew at once.
        rows: For each device, the rows of its parameters. Values of shape [K, 6].
        signals: The rows of activations and residual adds. [S, 6]
        loss: The loss, or None if none was given.
        scale: Factor that undoes loss scaling on the parameters' gradients.
        signal_scale: The same for the gradients at activations and residual adds.
        skipped: The optimizer's step was skipped.
    """

    slot: Slot
    rows: dict[torch.device, FloatArray]
    signals: FloatArray
    loss: float | None
    scale: float
    signal_scale: float
    skipped: bool


IN_FLIGHT = 16  # steps held by a device other than the host; older ones have long been copied


class RingBuffer:
    """A ring of `capacity` steps on the host. Other devices hold the newest steps, copied to the host as they close.

    Args:
        capacity: Number of steps kept.
        rows_on: Number of parameter rows on each device.
        n_signals: Number of rows for activations and residual adds, on the first device, S.
    """

    def __init__(self, capacity: int, rows_on: Mapping[torch.device, int], n_signals: int = 0) -> None:
        self.capacity = capacity
        self._n_rows = dict(rows_on)
        # [capacity, K + S + 1, 6], or [IN_FLIGHT, K + S + 1, 6]: parameters, signals, extra row
        self._rings: dict[torch.device, torch.Tensor] = {}
        self._mirrors: dict[torch.device, torch.Tensor] = {}  # [capacity, K + S + 1, 6] on the host
        for device, n_rows in rows_on.items():
            step_shape = (n_rows + (n_signals if not self._rings else 0) + 1, len(STATS))
            if device.type == "cpu":
                # Touch the memory now: if the system lacks it, this fails here, and no step pays for page faults.
                ring = mirror = torch.zeros(capacity, *step_shape, dtype=torch.float64, device="cpu")
            else:
                ring = torch.zeros(min(capacity, IN_FLIGHT), *step_shape, dtype=torch.float64, device=device)
                mirror = torch.empty(capacity, *step_shape, dtype=torch.float64, device="cpu", pin_memory=True)
            self._rings[device] = ring
            self._mirrors[device] = mirror
        self._arrays = {device: mirror.numpy() for device, mirror in self._mirrors.items()}
        self._first = next(iter(self._rings), torch.device("cpu"))
        self._slots: list[Slot | None] = [None] * capacity
        self._next = 0
        self._rows = self._open_rows()

    def rows(self) -> dict[torch.device, torch.Tensor]:
        """Returns the parameter rows of the open step, for each device. Values of shape [K, 6]."""
        return self._rows

    def signal_rows(self) -> torch.Tensor:
        """Returns the open step's rows for activations and residual adds, on the first device. Shape [S, 6]."""
        return _at(self._rings[self._first], self._next)[self._n_rows[self._first] : -1]

    def commit(
        self,
        slot: Slot,
        loss: torch.Tensor | float | None,
        scale: torch.Tensor | float,
        skipped: torch.Tensor | float,
        signal_scale: torch.Tensor | float,
    ) -> None:
        """Finishes the open step and opens the next.

        Args:
            slot: The part that the host knows at once.
            loss: The loss, on any device.
            scale: Factor that undoes loss scaling on the parameters' gradients.
            skipped: Non-zero if the optimizer's step was skipped.
            signal_scale: Factor that undoes loss scaling on the gradients at activations and residual adds.
        """
        position = self._next
        self._slots[position] = slot
        self._write(position, SCALE, scale)
        self._write(position, SKIPPED, skipped)
        self._write(position, SIGNAL_SCALE, signal_scale)
        if loss is not None:
            slot.has_loss = True
            self._write(position, LOSS, loss)
        self._publish(position)
        self._next = (position + 1) % self.capacity
        self._rows = self._open_rows()

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds the loss, on any device, to the newest finished step."""
        position = (self._next - 1) % self.capacity
        slot = self._slots[position]
        if slot is None:
            raise IndexError("no step is finished yet")
        slot.has_loss = True
        self._write(position, LOSS, loss)
        if LOSS not in slot.extras:
            self._publish(position)

    def positions(self) -> list[int]:
        """Returns the positions of the finished steps in the ring, oldest first."""
        order = [(self._next + offset) % self.capacity for offset in range(self.capacity)]
        return [position for position in order if self._slots[position] is not None]

    @property
    def newest(self) -> int:
        """Position of the newest finished step."""
        return (self._next - 1) % self.capacity

    def is_finite(self, position: int, wait: bool) -> bool | None:
        """Returns whether all values of a finished step were finite.

        Args:
            position: One of `positions()`.
            wait: Wait for the device.

        Returns:
            None if the step has not arrived.
        """
        if not self._has_arrived(position, wait):
            return None
        # the row of a parameter without a gradient may hold old values; `Snapshot.first_nonfinite` ignores those
        slot = self._slots[position]
        return not any(
            array[position, : self._n_rows[device] if slot is None or slot.events is None else -1, N_NONFINITE].any()
            for device, array in self._arrays.items()
        )

    def read(self, position: int, wait: bool) -> FinishedStep | None:
        """Copies one finished step out of the ring.

        Args:
            position: One of `positions()`.
            wait: Wait for the device.

        Returns:
            The step, or None if it has not arrived.
        """
        slot = self._slots[position]
        if slot is None or not self._has_arrived(position, wait):
            return None
        copies = {device: array[position].copy() for device, array in self._arrays.items()}
        extra = copies[self._first][-1]  # [6]
        loss, scale, skipped, signal_scale = (
            slot.extras.get(column, float(extra[column])) for column in (LOSS, SCALE, SKIPPED, SIGNAL_SCALE)
        )
        rows = {device: copy[: self._n_rows[device]] for device, copy in copies.items()}
        signals = copies[self._first][self._n_rows[self._first] : -1]  # [S, 6]
        return FinishedStep(slot, rows, signals, loss if slot.has_loss else None, scale, signal_scale, skipped != 0)

    def _has_arrived(self, position: int, wait: bool) -> bool:
        slot = self._slots[position]
        assert slot is not None
        for event in slot.ready.values():
            if wait:
                event.synchronize()
            elif not event.query():
                return False
        return True

    def _open_rows(self) -> dict[torch.device, torch.Tensor]:
        return {device: _at(ring, self._next)[: self._n_rows[device]] for device, ring in self._rings.items()}

    def _write(self, position: int, column: int, value: torch.Tensor | float) -> None:
        slot = self._slots[position]
        assert slot is not None
        if isinstance(value, torch.Tensor):
            slot.extras.pop(column, None)
            _at(self._rings[self._first], position)[-1, column].copy_(value.detach().reshape(()), non_blocking=True)
        else:
            slot.extras[column] = float(value)

    def _publish(self, position: int) -> None:
        slot = self._slots[position]
        assert slot is not None
        for device, ring in self._rings.items():
            mirror = self._mirrors[device]
            if mirror is not ring:
                mirror[position].copy_(_at(ring, position), non_blocking=True)
                event = torch.Event(device)
                event.record()
                slot.ready[device] = event


def _at(ring: torch.Tensor, position: int) -> torch.Tensor:
    return ring.select(0, position % ring.shape[0])
