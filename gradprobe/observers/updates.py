"""Measures the parameters before and after the optimizer's step: how far did each move?"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradprobe.observers.fence import Fence
from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.parameters import Layout, is_regular, stepped_by
from gradprobe.observers.ring_buffer import RingBuffer, Slot
from gradprobe.observers.shards import local_of
from gradprobe.ops.reference import FLOAT8_DTYPES
from gradprobe.ops.rows import SUM
from gradprobe.snapshot.records import Measured, Provenance
from gradprobe.snapshot.updates import Updates

if TYPE_CHECKING:
    from gradprobe.observers.sharding import WholeGradients

_UNSCALED = Provenance("unscaled", "local", "raw")


class UpdateObserver:
    """Keeps the updates that the optimizers made to K parameters in the last steps.

    If several optimizers step in one step of the training, the step has the updates of all; of a parameter that two of
    them step, it has the last.

    The parameters are copied before the optimizer's step and the copy is dropped after it. Parameters of half precision
    or float8 are copied to float32, so that the differences are not rounded to their dtype.

    Args:
        backend: Name of the back end, or "auto".
        capacity: Number of steps kept.
        fence: Takes the errors of single parameters.
    """

    def __init__(self, backend: str, capacity: int, fence: Fence) -> None:
        self._backend = backend
        self._capacity = capacity
        self._fence = fence
        self._step = 0  # the step of the copy
        self._is_off = self._must_join = self._are_regular = False
        self._whole: WholeGradients | None = None
        self._pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # position, copy and parameter, during the step
        self.restart((), ())

    def restart(self, names: tuple[str, ...], layouts: Sequence[Layout], whole: WholeGradients | None = None) -> None:
        """Forgets all steps.

        Args:
            names: Names of the K parameters, in model order.
            layouts: Their layouts.
            whole: Reduces the rows of this rank to rows of whole parameters, None if there is nothing to reduce.
        """
        self._names = names
        self._layouts = tuple(layouts)
        copies = [layout._replace(dtype=_dtype_of_copy(layout.dtype)) for layout in layouts]
        self._meter = GradientMeter(copies, names, self._backend, self._fence)
        self._measured = self._newest = self._meter.all_present  # of the open and of the newest finished step
        rows_on = {device: 2 * n for device, n in self._meter.rows_on.items()}
        self._whole = None if whole is None else whole.twice(self._meter)
        if self._whole is not None:
            self._names = self._whole.names
            rows_on = {self._whole.device: self._whole.n_rows}
        self._ring = RingBuffer(self._capacity, rows_on)
        self._position_of: dict[int, int] = {}
        self._steps: deque[int] = deque()  # the keys of `_position_of`, oldest first
        self._pairs = []

    def stop(self) -> None:
        """Stops measuring, for good; the other ranks still find this one at the steps that they measure."""
        self._is_off, self._pairs = True, []

    def begin(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.Tensor | None],
        step: int,
        is_due: bool,
        must_join: bool,
    ) -> None:
        """Copies and measures the parameters that the optimizer is about to step.

        Args:
            optimizer: The optimizer.
            parameters: The K parameters, None for one that is gone.
            step: Number of the step.
            is_due: The step is observed.
            must_join: The other ranks reduce the updates of this step.
        """
        self._pairs = []  # an earlier step may have raised
        self._step, self._must_join = step, must_join and self._whole is not None
        if not is_due or self._is_off:
            return
        stepped = stepped_by(optimizer, parameters)
        self._pairs = [
            (k, torch.empty_like(local, dtype=self._meter.layouts[k].dtype, requires_grad=False), local.detach())
            for k, (parameter, is_stepped) in enumerate(zip(parameters, stepped, strict=True))
            # after a move, the probe calls `restart` when it measures the gradients
            if is_stepped and parameter is not None and self._layouts[k].fits(local := local_of(parameter))
        ]
        if not self._pairs:
            return
        self._are_regular = len(self._pairs) == len(self._layouts) and all(
            is_regular(copy, self._meter.layouts[k]) for k, copy, _ in self._pairs
        )
        torch._foreach_copy_([copy for _, copy, _ in self._pairs], [parameter for _, _, parameter in self._pairs])
        self._measured = self._measure(self._half(self._rows(), 0))

    def end(self) -> None:
        """Measures the difference of the parameters from the copy, and drops the copy."""
        is_measured = False
        try:
            if self._pairs and all(copy.shape == parameter.shape for _, copy, parameter in self._pairs):
                is_measured = self._measure_differences()
        finally:
            self._pairs = []
            if self._must_join:
                self._reduce(is_measured)
        if is_measured and self._whole is None:
            if self._steps and self._steps[-1] == self._step:
                self._merge()
            else:
                self._commit()

    def _measure_differences(self) -> bool:
        after = [one.float() if one.dtype in FLOAT8_DTYPES else one for _, _, one in self._pairs]
        torch._foreach_sub_([copy for _, copy, _ in self._pairs], after)
        rows = self._half(self._rows(), 1)
        self._measure(rows)
        for part in rows.values():
            part[:, SUM].neg_()  # the difference is old minus new
        return True

    def _reduce(self, is_measured: bool) -> None:
        """Reduces the updates of this optimizer over the ranks, and adds them to the step."""
        whole = self._whole
        assert whole is not None
        self._must_join = False
        measured = self._measured
        twice = Measured(np.tile(measured.present, 2), np.tile(measured.numels, 2))
        whole.start(self._step, whole.local_rows if is_measured else None, twice)
        if self._steps and self._steps[-1] == self._step:
            whole.finish(self._ring.newest_rows()[whole.device], adds=True)
            self._ring.republish(self._newest)
        else:
            whole.finish(self._ring.rows()[whole.device])
            self._commit()

    def has_arrived(self, step: int) -> bool:
        """Returns whether the updates of a step, if there are any, can be read without waiting for a device."""
        position = self._position_of.get(step)
        return position is None or self._ring.has_arrived(position)

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
        if self._whole is not None:
            reduced, k = self._whole.unpack(finished.rows[self._whole.device]), len(self._names)
            measured = Measured(reduced.measured.present[:k], reduced.measured.numels[:k])
            return Updates(self._names, reduced.rows[:k], reduced.rows[k:], measured)
        n_rows = self._meter.rows_on
        weights = {device: rows[: n_rows[device]] for device, rows in finished.rows.items()}
        updates = {device: rows[n_rows[device] :] for device, rows in finished.rows.items()}
        in_order = self._meter.in_model_order
        return Updates(self._names, in_order(weights), in_order(updates), finished.slot.measured)

    def _commit(self) -> None:
        if len(self._steps) == self._capacity:
            self._position_of.pop(self._steps.popleft(), None)
        self._ring.commit(Slot(self._step, _UNSCALED, self._measured), None, 1.0, 0.0, 1.0)
        self._position_of[self._step] = self._ring.newest
        self._steps.append(self._step)
        self._newest = self._measured

    def _merge(self) -> None:
        """Adds the updates of another optimizer in the newest finished step to that step."""
        earlier, added = self._newest, self._measured
        positions = np.flatnonzero(added.present).tolist()
        if not positions:
            return
        open_rows, newest_rows = self._ring.rows(), self._ring.newest_rows()
        for half in (0, 1):
            torch._foreach_copy_(
                self._meter.rows_of(positions, self._half(newest_rows, half)),
                self._meter.rows_of(positions, self._half(open_rows, half)),
            )
        numels = np.where(added.present, added.numels, earlier.numels)
        self._newest = Measured(earlier.present | added.present, numels)
        self._ring.republish(self._newest)

    def _rows(self) -> dict[torch.device, torch.Tensor]:
        """Returns the rows of this rank's part of the open step. Values of shape [2 K, 6]."""
        return self._ring.rows() if self._whole is None else self._whole.local_rows

    def _half(self, rows: dict[torch.device, torch.Tensor], half: int) -> dict[torch.device, torch.Tensor]:
        """Returns those of a step's rows that hold the parameters (0) or the updates (1). Values of shape [K, 6]."""
        return {device: part.view(2, -1, part.shape[1])[half] for device, part in rows.items()}

    def _measure(self, rows: dict[torch.device, torch.Tensor]) -> Measured:
        copies: list[torch.Tensor | None] = [None] * len(self._layouts)
        for k, copy, _ in self._pairs:
            copies[k] = copy
        return self._meter.measure(copies, self._are_regular, rows)


def _dtype_of_copy(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in FLOAT8_DTYPES else torch.promote_types(dtype, torch.float32)
