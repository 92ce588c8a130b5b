"""Counts the values of gradients by magnitude, on one step in many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gradprobe import ops
from gradprobe.ops import reference
from gradprobe.ops.rows import N_MAGNITUDES
from gradprobe.ops.schemas import MAGNITUDES_INTO
from gradprobe.snapshot.magnitudes import GradientMagnitudes


class StepMagnitudes:
    """The magnitudes of one step's gradients: rows on their devices, then on the host. Keeps no gradient.

    Args:
        names: First names of the K parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}  # by the positions of their parameters, [P, 284]
        self._ready: list[torch.Event] = []

    def put(self, positions: Sequence[int], rows: torch.Tensor) -> None:
        """Takes the rows of parameters, in place of earlier ones of the same.

        Args:
            positions: Positions of P parameters.
            rows: Their rows of magnitudes, on any device. [P, 284]
        """
        self._rows[tuple(positions)] = rows

    def publish(self) -> None:
        """Starts the copies of all rows to the host."""
        by_device: dict[torch.device, list[tuple[int, ...]]] = {}
        for positions, rows in self._rows.items():
            by_device.setdefault(rows.device, []).append(positions)
        for device, keys in by_device.items():
            if device.type == "cpu":
                continue
            together = torch.cat([self._rows.pop(key) for key in keys])
            copy = torch.empty(together.shape, dtype=together.dtype, device="cpu", pin_memory=True)
            copy.copy_(together, non_blocking=True)
            self._rows[tuple(k for key in keys for k in key)] = copy
            event = torch.Event(device)
            event.record()
            self._ready.append(event)

    def read(self, scale: float) -> GradientMagnitudes:
        """Returns the magnitudes as host data, once `publish` has been called. Waits for the copies.

        Args:
            scale: Factor that undoes loss scaling.
        """
        for event in self._ready:
            event.synchronize()
        rows, present = np.zeros((len(self._names), N_MAGNITUDES)), np.zeros(len(self._names), dtype=np.bool_)
        for positions, part in self._rows.items():
            rows[list(positions)], present[list(positions)] = part.numpy(), True
        return GradientMagnitudes(self._names, rows, present, scale)


class MagnitudeObserver:
    """Counts the values of gradients by magnitude.

    Args:
        every: Every how many steps.
        backend: Name of the back end, or "auto". Only "reference" matters: the dispatcher knows one kernel per device.
    """

    def __init__(self, every: int, backend: str) -> None:
        self._every = every
        self._kernel = reference.magnitudes_into if backend == "reference" else MAGNITUDES_INTO
        self._is_off = False

    def stop(self) -> None:
        """Stops counting, for good."""
        self._is_off = True

    def is_due(self, step: int) -> bool:
        """Returns whether the gradients of a step are counted."""
        return step % self._every == 0 and not self._is_off

    def count(self, gradients: Mapping[int, torch.Tensor], into: StepMagnitudes) -> None:
        """Counts the values of gradients, without waiting for a device.

        Args:
            gradients: Any gradients, by the positions of their parameters.
            into: Gets the rows.
        """
        by_device: dict[torch.device, dict[int, torch.Tensor]] = {}
        for k, gradient in gradients.items():
            is_plain = type(gradient) is torch.Tensor and gradient.layout is torch.strided and not gradient.is_complex()
            values = gradient if is_plain else ops.dense_values(gradient)
            by_device.setdefault(values.device, {})[k] = values
        with torch.no_grad():
            for device, members in by_device.items():
                rows = torch.empty(len(members), N_MAGNITUDES, dtype=torch.float64, device=device)
                self._kernel(list(members.values()), rows)
                into.put(tuple(members), rows)
