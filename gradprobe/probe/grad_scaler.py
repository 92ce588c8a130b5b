"""Watches a gradient scaler: whether gradients are scaled at the moment, and whether it skipped a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import OptState


class ScalerWatch:
    """Wraps `unscale_` and `step` of one scaler until `remove`.

    Args:
        scaler: The scaler in use.
        optimizer: The optimizer whose steps are watched; None for all.
        on_unscaled: Called after the scaler has unscaled gradients.
        on_stepping: Called before each `scaler.step`.
        on_stepped: Called after each `scaler.step` with a device tensor that is non-zero if the step was skipped.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        optimizer: torch.optim.Optimizer | None,
        on_unscaled: Callable[[], None],
        on_stepping: Callable[[], None],
        on_stepped: Callable[[torch.Tensor], None],
    ) -> None:
        self._scaler = scaler
        self._watched = None if optimizer is None else id(optimizer)
        self._before_update: torch.Tensor | None = None
        unscale, step = scaler.unscale_, scaler.step

        def unscale_and_tell(optimizer: torch.optim.Optimizer) -> None:
            unscale(optimizer)
            if self._concerns(optimizer):
                on_unscaled()

        def step_and_tell(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
            if self._concerns(optimizer):
                self._before_update = self._inverse()
                on_stepping()
            result = step(optimizer, *args, **kwargs)
            if self._concerns(optimizer):
                found = list(scaler._found_inf_per_device(optimizer).values())
                on_stepped(sum((flag.to(found[0].device) for flag in found[1:]), start=found[0]))
            return result

        scaler.unscale_ = unscale_and_tell  # type: ignore[method-assign]
        scaler.step = step_and_tell  # type: ignore[method-assign]

    def inverse_scale(self) -> torch.Tensor | None:
        """Returns the factor that unscales the gradients in their present state.

        Returns:
            A 0-d tensor on the device, or None if the gradients are not scaled.
        """
        states = self._scaler._per_optimizer_states
        stages = [state["stage"] for key, state in states.items() if self._watched in (None, key)]
        if any(stage is not OptState.READY for stage in stages):
            return None
        return self._inverse()

    def take_inverse_of_backward(self) -> torch.Tensor | None:
        """Returns the factor that unscales what the backward pass of this step computed. Call it once per step.

        Returns:
            A 0-d tensor on the device, or None if the loss was not scaled.
        """
        before_update, self._before_update = self._before_update, None
        return self._inverse() if before_update is None else before_update

    def forget_backward(self) -> None:
        """Notes that the step that the scaler is about to make is already closed."""
        self._before_update = None

    def remove(self) -> None:
        """Restores the methods of the scaler."""
        del self._scaler.unscale_
        del self._scaler.step

    def _inverse(self) -> torch.Tensor | None:
        scale = self._scaler._scale if self._scaler.is_enabled() else None
        return None if scale is None else scale.double().reciprocal()

    def _concerns(self, optimizer: torch.optim.Optimizer) -> bool:
        return self._scaler.is_enabled() and self._watched in (None, id(optimizer))
