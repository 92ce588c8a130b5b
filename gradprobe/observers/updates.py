"""Takes the parameters before and after the optimizer's step: how far did each move?"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from gradprobe.observers.gradients import GradientReducer
from gradprobe.observers.parameters import is_regular
from gradprobe.observers.ring_buffer import RingBuffer, Slot
from gradprobe.ops.rows import SUM
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.updates import Updates

_UNSCALED = Provenance("unscaled", "local", "pre-clip")


class UpdateObserver:
    """A ring of the changes that the optimizer's steps made to K parameters.

    A copy of the parameters lives from just before the step to just after it; of those in half precision in float32, so
    that the differences are not rounded as the parameters are.

    Args:
        parameters: The K parameters, in model order.
        names: Their names. Length K.
        backend: Name of the backend, or "auto".
        capacity: Number of steps kept.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], names: tuple[str, ...], backend: str, capacity: int) -> None:
        self._parameters = tuple(parameters)
        self._names = names
        self._backend = backend
        self._capacity = capacity
        self._step = 0  # that the copy belongs to
        self.restart()

    def restart(self) -> None:
        """Forgets all steps; the parameters may have moved to another device."""
        self._placement = self._current_placement()
        # without memory of their own
        models = [
            torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device=device).expand(parameter.shape)
            for parameter, (device, dtype) in zip(self._parameters, self._placement, strict=True)
        ]
        self._models = tuple(models)
        self._reducer = GradientReducer(models, self._backend)
        self._measured = self._reducer.all_present
        self._ring = RingBuffer(self._capacity, {device: 2 * n for device, n in self._reducer.rows_on.items()})
        self._position_of: dict[int, int] = {}
        self._steps: deque[int] = deque()  # the keys of `_position_of`, oldest first
        self._before: list[torch.Tensor | None] = []

    def begin(self, optimizer: torch.optim.Optimizer, step: int | None) -> None:
        """Copies the parameters that the optimizer is about to step, and takes their statistics.

        Args:
            optimizer: The optimizer.
            step: Number of the step, None where it is not observed.
        """
        self._before = []  # of a step that has raised
        if step is None or self._current_placement() != self._placement:
            return  # the owner sees a move as it measures the gradients, and restarts this
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before = [
            torch.empty_like(parameter, dtype=model.dtype, requires_grad=False) if id(parameter) in stepped else None
            for parameter, model in zip(self._parameters, self._models, strict=True)
        ]
        copies, parameters = self._pairs()
        torch._foreach_copy_(copies, parameters)
        self._step = step
        self._measured = self._measure(self._half(0))

    def end(self) -> None:
        """Takes the statistics of how the parameters differ from the copy, and lets go of it."""
        if not self._before:
            return
        if self._current_placement() == self._placement:
            torch._foreach_sub_(*self._pairs())
            rows = self._half(1)
            self._measure(rows)
            for part in rows.values():
                part[:, SUM].neg_()  # of what was minus what is
            self._keep()
        self._before = []

    def read(self, step: int, wait: bool) -> Updates | None:
        """Gives the changes of a step.

        Args:
            step: Number of the step.
            wait: Wait for the device.

        Returns:
            The changes, or None where the step was not measured, is kept no longer or has not arrived.
        """
        position = self._position_of.get(step)
        finished = None if position is None else self._ring.read(position, wait)
        if finished is None:
            return None
        n_rows = self._reducer.rows_on
        weights = {device: rows[: n_rows[device]] for device, rows in finished.rows.items()}
        updates = {device: rows[n_rows[device] :] for device, rows in finished.rows.items()}
        in_order = self._reducer.in_site_order
        return Updates(self._names, in_order(weights), in_order(updates), finished.slot.measured)

    def release(self) -> None:
        """Lets go of the parameters and of what was measured."""
        self._parameters = ()
        self.restart()

    def _half(self, half: int) -> dict[torch.device, torch.Tensor]:
        """The open step's rows of the parameters or of the updates, for each device. Values of shape [K, 6]."""
        return {device: rows.view(2, -1, rows.shape[1])[half] for device, rows in self._ring.rows().items()}

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The copies, and the parameters as they are."""
        kept = [(copy, k) for k, copy in enumerate(self._before) if copy is not None]
        return [copy for copy, _ in kept], [self._parameters[k].detach() for _, k in kept]

    def _current_placement(self) -> list[tuple[torch.device, torch.dtype]]:
        return [(parameter.device, parameter.dtype) for parameter in self._parameters]

    def _measure(self, rows: dict[torch.device, torch.Tensor]) -> Measured:
        regular = all(
            copy is not None and is_regular(copy, model) for copy, model in zip(self._before, self._models, strict=True)
        )
        return self._reducer.measure(self._before, regular, rows)

    def _keep(self) -> None:
        if len(self._steps) == self._capacity:
            del self._position_of[self._steps.popleft()]
        self._ring.commit(Slot(self._step, _UNSCALED, self._measured), None, 1.0, 0.0, 1.0)
        self._position_of[self._step] = self._ring.newest
        self._steps.append(self._step)
