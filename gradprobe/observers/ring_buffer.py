"""A ring buffer of finished steps: rows on the device, read on the host without blocking the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from gradprobe.observers.magnitudes import StepMagnitudes
from gradprobe.ops.rows import N_NONFINITE, STATS
from gradprobe.snapshot.records import Events, FloatArray, Measured, Provenance

# Columns of each step's extra row, on the first device.
LOSS, SCALE, SKIPPED, SIGNAL_SCALE, SMALLEST_RATIO, LARGEST_RATIO = range(6)


@dataclass(slots=True)
class Slot:
    """One step in the ring: the part that the host knows without waiting for a device.

    Attributes:
        step: Number of the step.
        provenance: Scale, reduction and state of its gradients.
        measured: Which parameters had a gradient, and their sizes.
        events: Events at activations and residual adds, None if those were not observed.
        tolerance: If the gradients changed after they were measured: relative difference of the two ratios in the
            extra row that rounding explains. Otherwise None.
        is_unscaled: That change includes the division by the loss scale.
        is_superseded: The step turned out to be part of a later one.
        is_accumulated: As in `Snapshot`.
        is_contested: As in `Snapshot`.
        serial: Its number among all steps that were committed.
        magnitudes: How the magnitudes of its gradients spread, None if they were not counted.
        signal_magnitudes: The same of its activations.
        extras: Those of the extra row's values that the host knows, by column; the others are in the extra row.
        has_loss: A loss was given.
        ready: For each device other than the host, the event after which its rows can be read.
    """

    step: int
    provenance: Provenance
    measured: Measured
    events: Events | None = None
    tolerance: float | None = None
    is_unscaled: bool = False
    is_superseded: bool = False
    is_accumulated: bool = False
    is_contested: bool = False
    serial: int = 0
    magnitudes: StepMagnitudes | None = None
    signal_magnitudes: StepMagnitudes | None = None
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
        ratios: Smallest and largest factor by which the gradients changed after they were measured.
    """

    slot: Slot
    rows: dict[torch.device, FloatArray]
    signals: FloatArray
    loss: float | None
    scale: float
    signal_scale: float
    skipped: bool
    ratios: tuple[float, float]

    @property
    def has_nonfinite(self) -> bool:
        """Whether a value may not have been finite; the row of a parameter without a gradient may hold old values."""
        return any(rows[:, N_NONFINITE].any() for rows in (*self.rows.values(), self.signals))


IN_FLIGHT = 16  # steps held by a device other than the host; older ones have long been copied


_BLOCK_BYTES = 8 * 2**20  # of host memory allocated at once


class RingBuffer:
    """A ring of `capacity` finished steps and the open one, on the host.

    Other devices hold the newest steps, copied to the host as they close. The memory grows with the number of steps, up
    to the capacity.

    Args:
        capacity: Number of finished steps kept.
        rows_on: Number of parameter rows on each device.
        n_signals: Number of rows for activations and residual adds, on the first device, S.
    """

    def __init__(self, capacity: int, rows_on: Mapping[torch.device, int], n_signals: int = 0) -> None:
        self.capacity = capacity
        self._n_places = capacity + 1  # measuring the open step must not overwrite a finished one
        self._n_rows = dict(rows_on)
        self._first = next(iter(rows_on), torch.device("cpu"))
        # parameters, signals, extra row: [K + S + 1, 6]
        self._shapes = {
            device: (n_rows + (n_signals if device == self._first else 0) + 1, len(STATS))
            for device, n_rows in rows_on.items()
        }
        bytes_of_step = max((8 * n_rows * len(STATS) for n_rows, _ in self._shapes.values()), default=1)
        self._block_size = min(self._n_places, max(1, _BLOCK_BYTES // bytes_of_step))  # steps
        self._blocks: dict[torch.device, list[torch.Tensor]] = {device: [] for device in rows_on}
        # [IN_FLIGHT, K + S + 1, 6] on every device other than the host
        self._in_flight = {
            device: torch.zeros(min(self._n_places, IN_FLIGHT), *shape, dtype=torch.float64, device=device)
            for device, shape in self._shapes.items()
            if device.type != "cpu"
        }
        self._slots: dict[int, Slot] = {}  # by position, oldest first
        self._next = 0
        self._rows = self._open_rows()

    def rows(self) -> dict[torch.device, torch.Tensor]:
        """Returns the parameter rows of the open step, for each device. Values of shape [K, 6]."""
        return self._rows

    def signal_rows(self) -> torch.Tensor:
        """Returns the open step's rows for activations and residual adds, on the first device. Shape [S, 6]."""
        return self._on_device(self._first, self._next)[self._n_rows[self._first] : -1]

    def commit(
        self,
        slot: Slot,
        loss: torch.Tensor | float | None,
        scale: torch.Tensor | float,
        skipped: torch.Tensor | float,
        signal_scale: torch.Tensor | float,
        ratios: tuple[torch.Tensor | float, torch.Tensor | float] = (1.0, 1.0),
    ) -> None:
        """Finishes the open step and opens the next.

        Args:
            slot: The part that the host knows at once.
            loss: The loss, on any device.
            scale: Factor that undoes loss scaling on the parameters' gradients.
            skipped: Non-zero if the optimizer's step was skipped.
            signal_scale: Factor that undoes loss scaling on the gradients at activations and residual adds.
            ratios: As in `FinishedStep`.
        """
        position = self._next
        values = {SCALE: scale, SKIPPED: skipped, SIGNAL_SCALE: signal_scale}
        values |= zip((SMALLEST_RATIO, LARGEST_RATIO), ratios, strict=True)
        if loss is not None:
            slot.has_loss = True
            values[LOSS] = loss
        for column, value in values.items():
            self._write(position, slot, column, value)
        self._publish(position, slot)
        self._slots[position] = slot  # now that it is complete: another thread may be reading
        self._next = (position + 1) % self._n_places
        self._slots.pop(self._next, None)  # the oldest step makes room for the open one
        self._rows = self._open_rows()

    def amend(self, column: int, value: torch.Tensor | float) -> None:
        """Changes a value of the newest finished step, e.g. its loss.

        Args:
            column: Its column in the extra row.
            value: The value, on any device.
        """
        slot = self._slots[self.newest]
        slot.has_loss = slot.has_loss or column == LOSS
        self._write(self.newest, slot, column, value)
        if column not in slot.extras:
            self._publish(self.newest, slot)

    def newer_than(self, serial: int) -> list[int]:
        """Returns the positions of the finished steps with a larger serial number, oldest first."""
        return [
            position for position, slot in list(self._slots.items()) if slot.serial > serial and not slot.is_superseded
        ]

    def oldest_serial(self) -> int | None:
        """Returns the serial number of the oldest finished step, None if there is none."""
        slots = list(self._slots.values())
        return slots[0].serial if slots else None

    def newest_rows(self) -> dict[torch.device, torch.Tensor]:
        """Returns the parameter rows of the newest finished step, for each device; changed ones need `republish`."""
        return {device: self._on_device(device, self.newest)[:n_rows] for device, n_rows in self._n_rows.items()}

    def republish(self, measured: Measured) -> None:
        """Takes the changed rows of the newest finished step.

        Args:
            measured: Which parameters the rows now hold, and their sizes.
        """
        # a new slot: a thread that reads the old one meanwhile drops what it has read
        slot = replace(self._slots[self.newest], measured=measured, ready={})
        self._publish(self.newest, slot)
        self._slots[self.newest] = slot

    def supersede(self, step: int) -> None:
        """Drops the finished steps with this number or a larger one: they turned out to be part of the open step."""
        for slot in list(self._slots.values()):
            slot.is_superseded = slot.is_superseded or slot.step >= step

    def renumber(self, newest: int, first: int) -> bool:
        """Gives the newest finished step another number, and drops those with this number or a larger one.

        Args:
            newest: The number that it is expected to have.
            first: The number that it gets.

        Returns:
            Whether the newest step had the expected number.
        """
        slot = self._slots.get(self.newest)
        if slot is None or slot.is_superseded or slot.step != newest:
            return False
        self.supersede(first)
        slot.step, slot.is_superseded = first, False
        return True

    def positions(self) -> list[int]:
        """Returns the positions of the finished steps in the ring, oldest first."""
        return [position for position, slot in list(self._slots.items()) if not slot.is_superseded]

    @property
    def newest(self) -> int:
        """Position of the newest finished step."""
        return (self._next - 1) % self._n_places

    def has_arrived(self, position: int) -> bool:
        """Returns whether a finished step can be read without waiting for a device."""
        slot = self._slots.get(position)
        return slot is None or _has_arrived(slot, wait=False)

    def read(self, position: int, wait: bool) -> FinishedStep | None:
        """Copies one finished step out of the ring.

        Args:
            position: One of `positions()`.
            wait: Wait for the device.

        Returns:
            The step, or None if it has not arrived or another thread has dropped it.
        """
        slot = self._slots.get(position)
        if slot is None or not _has_arrived(slot, wait):
            return None
        copies = {device: self._on_host(device, position).numpy().copy() for device in self._n_rows}
        if self._slots.get(position) is not slot:  # its place was given to the open step meanwhile
            return None
        extra = copies[self._first][-1]  # [6]
        loss, scale, skipped, signal_scale, smallest, largest = (
            slot.extras.get(column, float(extra[column])) for column in range(len(extra))
        )
        rows = {device: copy[: self._n_rows[device]] for device, copy in copies.items()}
        signals = copies[self._first][self._n_rows[self._first] : -1]  # [S, 6]
        return FinishedStep(
            slot,
            rows,
            signals,
            loss if slot.has_loss else None,
            scale,
            signal_scale,
            skipped != 0,
            (smallest, largest),
        )

    def _open_rows(self) -> dict[torch.device, torch.Tensor]:
        return {device: self._on_device(device, self._next)[:n_rows] for device, n_rows in self._n_rows.items()}

    def _on_device(self, device: torch.device, position: int) -> torch.Tensor:
        """Returns the rows of a step on their device, [K + S + 1, 6]."""
        ring = self._in_flight.get(device)
        return self._on_host(device, position) if ring is None else ring.select(0, position % ring.shape[0])

    def _on_host(self, device: torch.device, position: int) -> torch.Tensor:
        """Returns the same on the host."""
        blocks = self._blocks[device]
        block, offset = divmod(position, self._block_size)
        while len(blocks) <= block:
            shape = (self._block_size, *self._shapes[device])
            blocks.append(torch.zeros(shape, dtype=torch.float64, device="cpu", pin_memory=device.type != "cpu"))
        return blocks[block].select(0, offset)

    def _write(self, position: int, slot: Slot, column: int, value: torch.Tensor | float) -> None:
        if isinstance(value, torch.Tensor):
            slot.extras.pop(column, None)
            row = self._on_device(self._first, position)[-1]
            row[column].copy_(value.detach().reshape(()), non_blocking=True)
        else:
            slot.extras[column] = float(value)

    def _publish(self, position: int, slot: Slot) -> None:
        for device in self._in_flight:
            self._on_host(device, position).copy_(self._on_device(device, position), non_blocking=True)
            event = torch.Event(device)
            event.record()
            slot.ready[device] = event


def _has_arrived(slot: Slot, wait: bool) -> bool:
    for event in slot.ready.values():
        if wait:
            event.synchronize()
        elif not event.query():
            return False
    return True
