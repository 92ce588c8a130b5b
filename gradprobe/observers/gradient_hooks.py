"""Hooks on a model's parameters: which gradients are ready, and when a backward pass has ended."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from gradprobe.observers.parameters import is_regular
from gradprobe.ops import libraries


class GradientHooks(Protocol):
    """Hooks on K parameters, implemented in C++ (`_hooks`) and by `PythonGradientHooks`."""

    def converted(self) -> int:
        """Counts the parameters that a backward pass found on another dtype or device since the last call."""

    def remove(self) -> None:
        """Removes every hook, for good."""

    def set_enabled(self, enabled: bool) -> None:
        """Turns the hooks on or off; they stay installed."""

    def reset(self) -> None:
        """Forgets which hooks fired, but not that one fired in this step."""

    def start_step(self) -> None:
        """Begins a step: forgets every hook that fired."""

    def has_fired(self) -> bool:
        """Returns whether a gradient became ready in this step, even while the hooks were off."""

    def n_fired(self) -> int:
        """Counts the gradients that became ready since the last reset."""

    def mark_unmodified(self) -> None:
        """Marks the current gradients as unmodified, e.g. after `GradScaler.unscale_`."""

    def fired(self) -> list[bool]:
        """Returns for each parameter whether its gradient became ready since the last reset. Length K."""

    def modified(self) -> bool:
        """Returns whether a gradient was changed or replaced since its hook saw it."""

    def measure(self, rows: torch.Tensor | None) -> tuple[bool, bool, int]:
        """Computes the statistics of all gradients in one call, if all are regular, and reports on the hooks.

        Args:
            rows: Rows to write, float64 [K, 6]; None writes nothing.

        Returns:
            Whether the rows were written, `modified()` and `n_fired()`.
        """

    def gradients(self) -> tuple[list[torch.Tensor | None], bool]:
        """Returns the K gradients, and whether all are present, dense and of their parameter's dtype and device."""


def install(
    parameters: Sequence[torch.Tensor],
    on_backward_end: Callable[[], None] | None = None,
    on_gradient: Callable[[int], None] | None = None,
) -> GradientHooks:
    """Installs hooks, in C++ if those are built and no callback per gradient is needed.

    Args:
        parameters: K leaf tensors that require a gradient.
        on_backward_end: Called once at the end of each backward pass in which a hook fired.
        on_gradient: Called with k as soon as gradient k is ready, before another hook of the parameter can free it.

    Returns:
        The installed hooks.
    """
    module, _ = libraries.native_hooks()
    if module is None or on_gradient is not None:
        return PythonGradientHooks(parameters, on_backward_end, on_gradient)
    hooks: GradientHooks = module.GradientHooks(list(parameters), on_backward_end)
    return hooks


class PythonGradientHooks:
    """Python implementation of the hooks, with `register_post_accumulate_grad_hook`.

    Args:
        parameters: K leaf tensors that require a gradient.
        on_backward_end: Called once at the end of each backward pass in which a hook fired.
        on_gradient: Called with k as soon as gradient k is ready.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        on_backward_end: Callable[[], None] | None,
        on_gradient: Callable[[int], None] | None = None,
    ) -> None:
        self._parameters = tuple(parameters)
        self._on_backward_end = on_backward_end
        self._on_gradient = on_gradient
        self._enabled = True
        self._has_fired = False
        self._queued_task = -1
        self._seen: list[tuple[int, int] | None] = [None] * len(self._parameters)  # id and version of each gradient
        self._handles: list[RemovableHandle] = []
        for k, parameter in enumerate(self._parameters):
            handle = parameter.register_post_accumulate_grad_hook(partial(self._on_ready, k))
            _run_first(parameter._post_accumulate_grad_hooks, handle.id)
            self._handles.append(handle)

    def converted(self) -> int:
        """Returns 0: these hooks stay on the parameter and do not notice a move."""
        return 0

    def remove(self) -> None:
        """Removes every hook, for good."""
        self._enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_enabled(self, enabled: bool) -> None:
        """Turns the hooks on or off; they stay installed."""
        self._enabled = enabled

    def reset(self) -> None:
        """Forgets which hooks fired, but not that one fired in this step."""
        self._seen = [None] * len(self._parameters)

    def start_step(self) -> None:
        """Begins a step: forgets every hook that fired."""
        self.reset()
        self._has_fired = False

    def has_fired(self) -> bool:
        """Returns whether a gradient became ready in this step, even while the hooks were off."""
        return self._has_fired

    def n_fired(self) -> int:
        """Counts the gradients that became ready since the last reset."""
        return sum(self.fired())

    def mark_unmodified(self) -> None:
        """Marks the current gradients as unmodified, e.g. after `GradScaler.unscale_`."""
        for k, parameter in enumerate(self._parameters):
            if self._seen[k] is not None and parameter.grad is not None:
                self._seen[k] = (id(parameter.grad), parameter.grad._version)

    def fired(self) -> list[bool]:
        """Returns for each parameter whether its gradient became ready since the last reset."""
        return [seen is not None for seen in self._seen]

    def modified(self) -> bool:
        """Returns whether a gradient was changed or replaced since its hook saw it."""
        return any(
            seen is not None and (parameter.grad is None or seen != (id(parameter.grad), parameter.grad._version))
            for parameter, seen in zip(self._parameters, self._seen, strict=True)
        )

    def measure(self, rows: torch.Tensor | None) -> tuple[bool, bool, int]:
        """Writes no rows: from Python one call would save nothing."""
        return False, self.modified(), self.n_fired()

    def gradients(self) -> tuple[list[torch.Tensor | None], bool]:
        """Returns the K gradients, and whether all are regular."""
        gradients = [parameter.grad for parameter in self._parameters]
        regular = all(
            gradient is not None and is_regular(gradient, parameter)
            for gradient, parameter in zip(gradients, self._parameters, strict=True)
        )
        return gradients, regular

    def _on_ready(self, k: int, parameter: torch.Tensor) -> None:
        self._has_fired = True
        if not self._enabled or parameter.grad is None:
            return
        self._seen[k] = (id(parameter.grad), parameter.grad._version)
        if self._on_gradient is not None:
            self._on_gradient(k)
        if self._on_backward_end is None:
            return
        task = torch._C._current_graph_task_id()
        if task != self._queued_task:
            self._queued_task = task
            Variable._execution_engine.queue_callback(self._notify)

    def _notify(self) -> None:
        self._queued_task = -1
        if self._enabled and self._on_backward_end is not None:
            self._on_backward_end()


def _run_first(hooks: MutableMapping[int, Any], key: int) -> None:
    # a user's hook may step and free the gradient; torch runs hooks in order of insertion
    ours = hooks.pop(key)
    others = dict(hooks)
    hooks.clear()
    hooks[key] = ours
    hooks.update(others)
