"""Measures the gradients of one step: one fused pass per device and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradprobe import ops
from gradprobe.observers.parameters import is_regular
from gradprobe.snapshot.records import FloatArray, Measured


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a device and a dtype. Their rows are contiguous.

    Attributes:
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        positions: Positions of the parameters in model order.
        first_row: Row of the first parameter, among the rows of the device.
    """

    device: torch.device
    dtype: torch.dtype
    positions: tuple[int, ...]
    first_row: int


class GradientMeter:
    """Groups K parameters by device and dtype and measures their gradients.

    Args:
        parameters: The K observed parameters, in model order.
        backend: Name of the back end, or "auto".

    Raises:
        ArgumentError: The back end is unknown.
        BackendError: The back end cannot run on one of the devices.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], backend: str) -> None:
        self._parameters = tuple(parameters)
        self._backend_name = backend
        self.regroup()

    def regroup(self) -> None:
        """Groups the parameters by their current device and dtype; the model may have moved."""
        self._placement = self._current_placement()
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for k, place in enumerate(self._placement):
            members.setdefault(place, []).append(k)
        self._backends = {device: ops.resolve(self._backend_name, device) for device, _ in members}
        self.rows_on: dict[torch.device, int] = {}
        groups = []
        self._row_of = np.zeros(len(self._parameters), dtype=np.int64)  # [K], among the rows of its device
        for (device, dtype), positions in members.items():
            first = self.rows_on.get(device, 0)
            groups.append(Group(device, dtype, tuple(positions), first))
            self._row_of[positions] = np.arange(first, first + len(positions))
            self.rows_on[device] = first + len(positions)
        self.groups = tuple(groups)
        parameter_numels = [parameter.numel() for parameter in self._parameters]
        self.all_present = Measured(np.ones(len(parameter_numels), dtype=np.bool_), np.asarray(parameter_numels))

    def moved(self) -> bool:
        """Returns whether a parameter has changed device or dtype since the last grouping."""
        return self._current_placement() != self._placement

    def native_rows(self, rows: dict[torch.device, torch.Tensor]) -> torch.Tensor | None:
        """Returns the rows that a single call of the native kernel can write.

        Args:
            rows: As for `measure`.

        Returns:
            The rows in model order [K, 6], or None if there are several groups or the back end is not native.
        """
        if len(self.groups) != 1:
            return None
        device = self.groups[0].device
        return rows[device] if self._backends[device].name == "native" else None

    def measure(
        self, gradients: list[torch.Tensor | None], regular: bool, rows: dict[torch.device, torch.Tensor]
    ) -> Measured:
        """Computes the raw statistics of the gradients.

        Args:
            gradients: The K gradients, None for a parameter without one.
            regular: All are present, dense and of their parameter's dtype and device.
            rows: For each device, float64 rows to write, on that device. [rows_on[device], 6]

        Returns:
            Which parameters had a gradient, and their sizes.
        """
        with torch.no_grad():
            if regular:
                for group in self.groups:
                    whole = len(group.positions) == len(gradients)
                    members = gradients if whole else [gradients[k] for k in group.positions]
                    out = rows[group.device][group.first_row : group.first_row + len(group.positions)]
                    self._backends[group.device].grad_stats_into(members, out)  # type: ignore[arg-type]
                return self.all_present
            return self._measure_irregular(gradients, rows)

    def total_norm(self, rows: dict[torch.device, torch.Tensor]) -> torch.Tensor:
        """Computes the Euclidean norm of all gradients together, on the device of the first parameter.

        Args:
            rows: Rows that `measure` has written.

        Returns:
            The norm, float64, 0-d.
        """
        parts = [ops.norms(part) for part in rows.values()]  # of [K] each
        norms = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
        largest = norms.max()
        unit = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
        total: torch.Tensor = unit * torch.linalg.vector_norm(norms / unit)
        return total

    @property
    def norm_dtype(self) -> torch.dtype:
        """Dtype of a total norm: the widest of the gradients' dtypes, at least float32."""
        wide = any(group.dtype in (torch.float64, torch.complex128) for group in self.groups)
        return torch.float64 if wide else torch.float32

    def scale_(self, gradients: list[torch.Tensor | None], regular: bool, coefficient: torch.Tensor) -> None:
        """Multiplies the gradients in place.

        Args:
            gradients: The K gradients, None for a parameter without one.
            regular: All are present, dense and of their parameter's dtype and device.
            coefficient: Factor, 0-d, on any device.
        """
        with torch.no_grad():
            for group in self.groups:
                factor = coefficient.to(group.device, non_blocking=True)
                members = []
                for k in group.positions:
                    gradient = gradients[k]
                    if gradient is None:
                        continue
                    if regular or is_regular(gradient, self._parameters[k]):
                        members.append(gradient)
                    else:
                        gradient.mul_(factor.to(gradient.device, gradient.dtype))
                if members:
                    self._backends[group.device].scale_(members, factor)

    def in_model_order(self, rows: dict[torch.device, FloatArray]) -> FloatArray:
        """Puts the rows of all devices into model order.

        Args:
            rows: For each device, the rows of its parameters. Values of shape [K, 6].

        Returns:
            The rows of the K parameters. [K, 6]
        """
        if len(rows) == 1:
            (only,) = rows.values()
            return only[self._row_of]
        return np.stack([rows[device][row] for (device, _), row in zip(self._placement, self._row_of, strict=True)])

    def release(self) -> None:
        """Drops the references to the parameters; only `in_model_order` works afterwards."""
        self._parameters = ()

    def measure_one(self, k: int, gradient: torch.Tensor, rows: dict[torch.device, torch.Tensor]) -> int:
        """Computes the raw statistics of one gradient.

        Args:
            k: Position of its parameter.
            gradient: Any gradient of parameter k.
            rows: As for `measure`.

        Returns:
            The number of elements measured.
        """
        device = self._parameters[k].device
        row = int(self._row_of[k])
        out = rows[device][row : row + 1]  # [1, 6]
        with torch.no_grad():
            values = gradient
            if not is_regular(gradient, self._parameters[k]):
                values = ops.dense_values(gradient)
            if values.device == device:
                self._backends[device].grad_stats_into([values], out)
            else:  # an offloaded gradient is measured on its own device; only six numbers are copied
                remote_row = torch.empty(1, len(ops.STATS), dtype=torch.float64, device=values.device)  # [1, 6]
                ops.resolve(self._backend_name, values.device).grad_stats_into([values], remote_row)
                out.copy_(remote_row, non_blocking=True)
        return values.numel()

    def _measure_irregular(
        self, gradients: list[torch.Tensor | None], rows: dict[torch.device, torch.Tensor]
    ) -> Measured:
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        numels = np.zeros(len(gradients), dtype=np.int64)
        for group in self.groups:
            out = rows[group.device][group.first_row : group.first_row + len(group.positions)]
            nothing = torch.empty(0, dtype=group.dtype, device=group.device)
            there = {k: gradient for k in group.positions if (gradient := gradients[k]) is not None}
            regular = {k: gradient for k, gradient in there.items() if is_regular(gradient, self._parameters[k])}
            if not group.dtype.is_complex:
                self._backends[group.device].grad_stats_into([regular.get(k, nothing) for k in group.positions], out)
            for k, gradient in there.items():
                numels[k] = gradient.numel() if k in regular else self.measure_one(k, gradient, rows)
        return Measured(present, numels)

    def _current_placement(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(parameter.device, parameter.dtype) for parameter in self._parameters]
