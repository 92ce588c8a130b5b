"""Counts the values of gradients and activations by magnitude, on one step in many."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import _disable_current_modes

from gradprobe import ops
from gradprobe.ops import reference
from gradprobe.ops.row_math import merge_magnitudes
from gradprobe.ops.rows import N_MAGNITUDES
from gradprobe.ops.schemas import MAGNITUDES_INTO
from gradprobe.snapshot.records import FloatArray


class StepMagnitudes:
    """The magnitudes of one step's tensors: rows on their devices, then on the host. Keeps no tensor.

    Attributes:
        names: Names of the K sites.

    Args:
        names: The same.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}  # by the positions of P sites, [P, 285]
        self._ready: list[torch.Event] = []
        self._lock = threading.Lock()  # a backward pass runs one thread per device

    def put(self, positions: Sequence[int], rows: torch.Tensor) -> None:
        """Takes the rows of sites, in place of earlier ones of the same.

        Args:
            positions: Positions of P sites.
            rows: Their rows of magnitudes, on any device. [P, 285]
        """
        self._rows[tuple(positions)] = rows

    def add(self, position: int, rows: torch.Tensor) -> None:
        """Takes the row of one more tensor of a site.

        Args:
            position: Position of the site.
            rows: Its row of magnitudes, on any device. [1, 285]
        """
        with self._lock:
            known = self._rows.get((position,))
            if known is not None:
                rows = merge_magnitudes(known[0], rows[0].to(known.device)).unsqueeze(0)
            self._rows[position,] = rows

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

    def read(self) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """Returns the rows [K, 285], and which sites have one [K], after `publish`. Waits for the copies."""
        for event in self._ready:
            event.synchronize()
        rows, present = np.zeros((len(self.names), N_MAGNITUDES)), np.zeros(len(self.names), dtype=np.bool_)
        for positions, part in self._rows.items():
            rows[list(positions)], present[list(positions)] = part.numpy(), True
        return rows, present


class MagnitudeObserver:
    """Counts the values of gradients or activations by magnitude.

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
        """Returns whether the values of a step are counted."""
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

    def count_event(self, site: int, values: torch.Tensor, into: StepMagnitudes) -> None:
        """Counts the values of one of the tensors observed at a site, without waiting for a device.

        Args:
            site: Position of the site.
            values: Dense and real; any strides and device.
            into: Gets the row.
        """
        # a mode that records the operators of a forward pass, as of a selective checkpoint, must not see these
        with _disable_current_modes(), torch.no_grad():
            row = torch.empty(1, N_MAGNITUDES, dtype=torch.float64, device=values.device)
            self._kernel([values], row)
            into.add(site, row)
