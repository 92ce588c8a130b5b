"""Measures the parameters before and after the optimizer's step: how far did each move?"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.parameters import is_regular
from gradprobe.observers.ring_buffer import RingBuffer, Slot
from gradprobe.ops.rows import SUM
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.updates import Updates

_UNSCALED = Provenance("unscaled", "local", "pre-clip")


class UpdateObserver:
    """Keeps the updates that the optimizer made to K parameters in the last steps.

    The parameters are copied before the optimizer's step and the copy is dropped after it. Half-precision parameters
    are copied to float32, so that the differences are not rounded to half precision.

    Args:
        parameters: The K parameters, in model order.
        names: Their names. Length K.
        backend: Name of the back end, or "auto".
        capacity: Number of steps kept.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], names: tuple[str, ...], backend: str, capacity: int) -> None:
        self._parameters = tuple(parameters)
        self._names = names
        self._backend = backend
        self._capacity = capacity
        self._step = 0  # the step of the copy
        self.restart()

    def restart(self) -> None:
        """Forgets all steps; the parameters may have moved to another device."""
        self._placement = self._current_placement()
        # dtype, device and shape of each copy; expanded, so that they need no memory
        templates = [
            torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device=device).expand(parameter.shape)
            for parameter, (device, dtype) in zip(self._parameters, self._placement, strict=True)
        ]
        self._templates = tuple(templates)
        self._meter = GradientMeter(templates, self._backend)
        self._measured = self._meter.all_present
        self._ring = RingBuffer(self._capacity, {device: 2 * n for device, n in self._meter.rows_on.items()})
        self._position_of: dict[int, int] = {}
        self._steps: deque[int] = deque()  # the keys of `_position_of`, oldest first
        self._before: list[torch.Tensor | None] = []

    def begin(self, optimizer: torch.optim.Optimizer, step: int | None) -> None:
        """Copies and measures the parameters that the optimizer is about to step.

        Args:
            optimizer: The optimizer.
            step: Number of the step, None if it is not observed.
        """
        self._before = []  # an earlier step may have raised
        if step is None or self._current_placement() != self._placement:
            return  # after a move, the probe calls `restart` when it measures the gradients
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before = [
            torch.empty_like(parameter, dtype=template.dtype, requires_grad=False) if id(parameter) in stepped else None
            for parameter, template in zip(self._parameters, self._templates, strict=True)
        ]
        copies, parameters = self._pairs()
        torch._foreach_copy_(copies, parameters)
        self._step = step
        self._measured = self._measure(self._half(0))

    def end(self) -> None:
        """Measures the difference of the parameters from the copy, and drops the copy."""
        if not self._before:
            return
        if self._current_placement() == self._placement:
            torch._foreach_sub_(*self._pairs())
            rows = self._half(1)
            self._measure(rows)
            for part in rows.values():
                part[:, SUM].neg_()  # the difference is old minus new
            if len(self._steps) == self._capacity:
                del self._position_of[self._steps.popleft()]
            self._ring.commit(Slot(self._step, _UNSCALED, self._measured), None, 1.0, 0.0, 1.0)
            self._position_of[self._step] = self._ring.newest
            self._steps.append(self._step)
        self._before = []

    def read(self, step: int, wait: bool) -> Updates | None:
        """Returns the updates of a step.

        Args:
            step: Number of the step.
            wait: Wait for the device.

        Returns:
            The updates, or None if the step was not measured, is no longer kept or has not arrived.
        """
        position = self._position_of.get(step)
        finished = None if position is None else self._ring.read(position, wait)
        if finished is None:
            return None
        n_rows = self._meter.rows_on
        weights = {device: rows[: n_rows[device]] for device, rows in finished.rows.items()}
        updates = {device: rows[n_rows[device] :] for device, rows in finished.rows.items()}
        in_order = self._meter.in_model_order
        return Updates(self._names, in_order(weights), in_order(updates), finished.slot.measured)

    def release(self) -> None:
        """Drops the references to the parameters, and all steps."""
        self._parameters = ()
        self.restart()

    def _half(self, half: int) -> dict[torch.device, torch.Tensor]:
        """Returns the open step's rows of the parameters (0) or updates (1). Values of shape [K, 6]."""
        return {device: rows.view(2, -1, rows.shape[1])[half] for device, rows in self._ring.rows().items()}

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns the copies, and the current parameters that they were made of."""
        kept = [(copy, k) for k, copy in enumerate(self._before) if copy is not None]
        return [copy for copy, _ in kept], [self._parameters[k].detach() for _, k in kept]

    def _current_placement(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(parameter.device, parameter.dtype) for parameter in self._parameters]

    def _measure(self, rows: dict[torch.device, torch.Tensor]) -> Measured:
        regular = all(
            copy is not None and is_regular(copy, template)
            for copy, template in zip(self._before, self._templates, strict=True)
        )
        return self._meter.measure(self._before, regular, rows)
