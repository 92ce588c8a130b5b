"""Decides when a step ends: the optimizer steps, the gradient scaler skips its step, or the user closes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from gradprobe.observers.gradient_hooks import GradientHooks, PythonGradientHooks
from gradprobe.probe.grad_scaler import ScalerWatch

Close = Callable[[torch.Tensor | float | None, torch.Tensor | float], bool]
Around = Callable[[torch.optim.Optimizer, bool, bool], None]


class StepBoundaries:
    """Watches an optimizer and a gradient scaler, and reports the end of each step.

    Args:
        optimizer: Closes a step each time it steps, or None. Its hooks keep the owner of `close` alive.
        grad_scaler: The gradient scaler in use, or None.
        hooks: The hooks on the parameters, which know whether a backward pass has run.
        close: Called at the end of each step with the loss, if the user gave one, and with a number that is non-zero if
            the scaler skipped the optimizer's step. Returns whether the step was closed.
        around: Called just before and just after each step of the optimizer, with the optimizer, whether this is the
            call after the step, and whether the step of the probe is still open.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        grad_scaler: torch.amp.GradScaler | None,
        hooks: GradientHooks,
        close: Close,
        around: Around | None = None,
    ) -> None:
        self._hooks: GradientHooks = hooks
        self._close: Close = close
        self._around = around
        self._closed_by: Literal["nobody", "optimizer", "user"] = "nobody"
        self._optimizer_stepped = False
        self._step_depth = 0
        self._skipped: torch.Tensor | float = 0.0  # from a scaler whose optimizer the probe does not know
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = []
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(partial(self._on_optimizer_step, after=False)),
                optimizer.register_step_post_hook(partial(self._on_optimizer_step, after=True)),
            ]
        self._scaler: ScalerWatch | None = None
        if grad_scaler is not None:
            self._scaler = ScalerWatch(
                grad_scaler, optimizer, hooks.mark_unmodified, self._on_scaler_stepping, self._on_scaler_stepped
            )

    def closed_by_optimizer(self) -> bool:
        """Returns True once if the optimizer has already closed the step that the user is now closing."""
        if self._closed_by != "optimizer" or self._hooks.has_fired():
            return False
        self._closed_by = "nobody"
        return True

    def close_by_user(self, loss: torch.Tensor | float | None) -> None:
        """Closes the step. The optimizer's next step then belongs to it.

        Args:
            loss: The loss of the step.
        """
        if self._close(loss, self._take_skipped()):
            self._closed_by = "user"

    def inverse_scale(self) -> torch.Tensor | None:
        """Returns the factor that unscales the gradients in their present state.

        Returns:
            A 0-d tensor on the device, or None if the gradients are not scaled.
        """
        inverse = self._scaler.inverse_scale() if self._scaler is not None else None
        optimizer = self._optimizer() if self._optimizer is not None else None
        fused_scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself
        if inverse is None and isinstance(fused_scale, torch.Tensor):
            return fused_scale.double().reciprocal()
        return inverse

    def take_inverse_of_backward(self) -> torch.Tensor | None:
        """Returns the factor that unscales what the backward pass of this step computed. Call it once per step.

        Returns:
            A 0-d tensor on the device, or None if the loss was not scaled.
        """
        return None if self._scaler is None else self._scaler.take_inverse_of_backward()

    def remove(self) -> None:
        """Removes the hooks from the optimizer and restores the scaler."""
        for handle in self._handles:
            handle.remove()
        if self._scaler is not None:
            self._scaler.remove()
        self._hooks = PythonGradientHooks((), None)
        self._close = _nobody_closes  # otherwise the owner and this object keep each other alive
        self._around = None

    def _take_skipped(self) -> torch.Tensor | float:
        skipped, self._skipped = self._skipped, 0.0
        return skipped

    def _on_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, after: bool
    ) -> None:
        if not self._is_outermost(after):
            return
        # With a closure, backward runs inside the step: gradients exist only afterwards.
        has_closure = any(callable(value) for value in (*args, *kwargs.values()))
        if has_closure == after:
            self._optimizer_stepped = True
            self._close_by_optimizer(getattr(optimizer, "found_inf", None))
        if self._around is not None:
            self._around(optimizer, after, has_closure and not after)

    def _is_outermost(self, after: bool) -> bool:
        # If a subclass's step calls its parent's, torch runs the hooks again for the inner call.
        if after:
            self._step_depth = max(0, self._step_depth - 1)
            return self._step_depth == 0
        if self._hooks.has_fired():  # a backward pass since: an earlier step raised and never reached its post hook
            self._step_depth = 0
        self._step_depth += 1
        return self._step_depth == 1

    def _on_scaler_stepping(self) -> None:
        self._optimizer_stepped = False
        if self._scaler is not None and self._closed_by == "user" and not self._hooks.has_fired():
            self._scaler.forget_backward()

    def _on_scaler_stepped(self, found_inf: torch.Tensor) -> None:
        if self._optimizer is None:
            self._skipped = found_inf
        elif not self._optimizer_stepped:  # the scaler skipped it
            self._close_by_optimizer(found_inf)

    def _close_by_optimizer(self, found_inf: torch.Tensor | None) -> None:
        if self._closed_by == "user" and not self._hooks.has_fired():
            self._closed_by = "nobody"  # the user has just closed it
            return
        skipped = self._take_skipped()
        if self._close(None, skipped if found_inf is None else found_inf):
            self._closed_by = "optimizer"


def _nobody_closes(loss: torch.Tensor | float | None, skipped: torch.Tensor | float) -> bool:
    return False
