"""Hooks on a model's parameters: which gradients are ready, and when a backward pass has ended."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from gradprobe.observers.parameters import Layout, ModelParameters, is_regular
from gradprobe.observers.shards import local_of
from gradprobe.ops import libraries

_REPLACED = 1 << 30


class GradientHooks(Protocol):
    """Hooks on K parameters, implemented in C++ (`_hooks`) and by `PythonGradientHooks`. They keep none alive."""

    def remove(self) -> None:
        """Removes every hook, for good; from any thread, and from inside a hook."""

    def start_step(self) -> None:
        """Begins a step: forgets which hooks have run."""

    def has_fired(self) -> bool:
        """Returns whether a gradient became ready in this step."""

    def n_fired(self) -> int:
        """Counts the gradients that became ready in this step."""

    def fired(self) -> list[bool]:
        """Returns for each parameter whether its gradient became ready in this step. Length K."""

    def mark(self) -> None:
        """Notes the gradients as they are now."""

    def n_writes(self) -> int:
        """Returns how often a gradient was written to since its hook or `mark` saw it, at most over all gradients.

        A gradient that is another tensor now counts as a very large number of writes.
        """

    def is_current(self) -> bool:
        """Returns whether no hook has run since the gradients were marked, as in a backward pass that throws."""

    def accumulates(self) -> bool:
        """Returns whether a backward pass of this step added to the gradients that `mark` saw."""

    def is_outdated(self) -> bool:
        """Returns whether a parameter has lost its hook, or a frozen one got a gradient."""

    def take_error(self) -> str:
        """Returns what went wrong inside a hook, once; empty if nothing did."""

    def measure(self, rows: torch.Tensor | None) -> tuple[bool, int, int]:
        """Computes the statistics of all gradients in one call, if all are regular, and marks them.

        Args:
            rows: Rows to write, float64 [K, 6]; None writes nothing.

        Returns:
            Whether the rows were written, what `n_writes()` was before, and `n_fired()`.
        """

    def gradients(self) -> tuple[list[torch.Tensor | None], bool]:
        """Returns the K gradients, and whether all are present, dense and of their parameter's layout.

        Of a sharded one it is the part on this rank.
        """

    def parameters(self) -> list[torch.Tensor | None]:
        """Returns the K parameters, None for one that is gone."""


def install(
    found: ModelParameters,
    on_backward_end: Callable[[], None] | None = None,
    on_gradient: Callable[[int, torch.Tensor], None] | None = None,
) -> GradientHooks:
    """Installs hooks, in C++ if those are built.

    Args:
        found: The K parameters, and the frozen ones.
        on_backward_end: Called once at the end of each backward pass in which a hook fired, when gradients are final.
        on_gradient: Called with k and gradient k as soon as it is ready, before another hook can free it.

    Returns:
        The installed hooks.
    """
    module, _ = libraries.native_hooks()
    if module is None or found.are_sharded:  # FSDP calls only hooks that Python sees
        return PythonGradientHooks(found, on_backward_end, on_gradient)
    hooks: GradientHooks = module.GradientHooks(
        list(found.parameters), list(found.frozen), on_backward_end, on_gradient
    )
    return hooks


class PythonGradientHooks:
    """Python implementation of the hooks, with `register_post_accumulate_grad_hook`.

    Args:
        found: The K parameters, and the frozen ones.
        on_backward_end: As for `install`.
        on_gradient: As for `install`.
    """

    def __init__(
        self,
        found: ModelParameters,
        on_backward_end: Callable[[], None] | None,
        on_gradient: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self._places = found.places
        self._frozen_places = list(found.frozen_places)
        self._impls = [parameter._cdata for parameter in found.parameters]  # address of the tensor inside
        self._layouts = [Layout.of(parameter) for parameter in found.parameters]
        self._on_backward_end = on_backward_end
        self._on_gradient = on_gradient
        self._has_fired = self._accumulates = self._is_current = False
        self._task = -1  # whose end is awaited
        self._seen: list[tuple[int, int] | None] = [None] * len(self._places)  # id and version of each gradient
        self._known = [False] * len(self._places)
        self._fired = [False] * len(self._places)
        self._handles: list[RemovableHandle] = []
        for k, parameter in enumerate(found.parameters):
            if not parameter.requires_grad:  # for a while; torch takes no hook now
                self._frozen_places.append(found.places[k])
                continue
            handle = parameter.register_post_accumulate_grad_hook(partial(self._on_ready, k))
            _run_first(parameter._post_accumulate_grad_hooks, handle.id)
            self._handles.append(handle)
        for tensor in found.triggers:
            self._handles.append(tensor.register_post_accumulate_grad_hook(self._on_trigger))

    def remove(self) -> None:
        """Removes every hook, for good."""
        self._on_backward_end = self._on_gradient = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self.parameters():
            if parameter is not None and parameter._post_accumulate_grad_hooks == {}:
                # after `swap_tensors` it belongs to another tensor, and a hook added to it would never run
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]

    def start_step(self) -> None:
        """Begins a step: forgets which hooks have run."""
        self._fired = [False] * len(self._places)
        self._known = [False] * len(self._places)  # what was done to gradients since is no change of this step's
        self._has_fired = self._accumulates = False

    def has_fired(self) -> bool:
        """Returns whether a gradient became ready in this step."""
        return self._has_fired

    def n_fired(self) -> int:
        """Counts the gradients that became ready in this step."""
        return sum(self._fired)

    def fired(self) -> list[bool]:
        """Returns for each parameter whether its gradient became ready in this step."""
        return list(self._fired)

    def mark(self) -> None:
        """Notes the gradients as they are now."""
        self._seen = [_identity(gradient) for gradient in self._whole_gradients()]
        self._known = [True] * len(self._places)
        self._is_current = True

    def n_writes(self) -> int:
        """Returns how often a gradient was written to since its hook or `mark` saw it."""
        return max(
            (
                _n_writes(seen, _identity(gradient))
                for gradient, seen, is_known in zip(self._whole_gradients(), self._seen, self._known, strict=True)
                if is_known
            ),
            default=0,
        )

    def is_current(self) -> bool:
        """Returns whether no hook has run since the gradients were marked."""
        return self._is_current

    def accumulates(self) -> bool:
        """Returns whether a backward pass of this step added to the gradients that `mark` saw."""
        return self._accumulates

    def is_outdated(self) -> bool:
        """Returns whether a parameter is gone or another tensor was swapped into it, or a frozen one is trained now."""
        impls = [None if parameter is None else parameter._cdata for parameter in self.parameters()]
        return impls != self._impls or any(
            (parameter := place.parameter()) is not None and parameter.requires_grad for place in self._frozen_places
        )

    def take_error(self) -> str:
        """Returns nothing: an error in Python reaches the caller."""
        return ""

    def measure(self, rows: torch.Tensor | None) -> tuple[bool, int, int]:
        """Writes no rows: from Python one call would save nothing."""
        n_writes = self.n_writes()
        self.mark()
        return False, n_writes, self.n_fired()

    def gradients(self) -> tuple[list[torch.Tensor | None], bool]:
        """Returns the K gradients, and whether all are regular."""
        gradients = [_local_gradient(parameter) for parameter in self.parameters()]
        regular = all(
            gradient is not None and is_regular(gradient, layout)
            for gradient, layout in zip(gradients, self._layouts, strict=True)
        )
        return gradients, regular

    def parameters(self) -> list[torch.Tensor | None]:
        """Returns the K parameters."""
        return [place.parameter() for place in self._places]

    def _whole_gradients(self) -> list[torch.Tensor | None]:
        return [None if parameter is None else parameter.grad for parameter in self.parameters()]

    def _on_trigger(self, _: torch.Tensor) -> None:
        """Notes a backward pass of a flat parameter, whose parts have gradients only when it ends."""
        self._has_fired, self._is_current = True, False
        self._fired = [True] * len(self._fired)
        self._await_end()

    def _on_ready(self, k: int, parameter: torch.Tensor) -> None:
        self._has_fired, self._is_current = True, False
        gradient = parameter.grad
        if gradient is not None:
            now, seen = _identity(gradient), self._seen[k]
            if seen is not None and now == (seen[0], seen[1] + 1):
                self._accumulates = True
            self._seen[k], self._known[k], self._fired[k] = now, True, True
            if self._on_gradient is not None:
                self._on_gradient(k, local_of(gradient))
        self._await_end()

    def _await_end(self) -> None:
        task = torch._C._current_graph_task_id()
        if self._on_backward_end is not None and task != self._task:
            self._task = task
            # Once more from inside the callback: behind those of others, in which gradients become final.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._notify))

    def _notify(self) -> None:
        if self._on_backward_end is not None:
            self._on_backward_end()


def _identity(gradient: torch.Tensor | None) -> tuple[int, int] | None:
    if gradient is None:
        return None
    if gradient.is_inference():
        return id(gradient), 0
    local = local_of(gradient)
    return id(gradient), gradient._version + (0 if local is gradient else local._version)


def _local_gradient(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None or parameter.grad is None else local_of(parameter.grad)


def _n_writes(before: tuple[int, int] | None, now: tuple[int, int] | None) -> int:
    if before is None or now is None or before[0] != now[0]:
        return 0 if before is now else _REPLACED
    return now[1] - before[1]


def _run_first(hooks: MutableMapping[int, Any], key: int) -> None:
    # a user's hook may step and free the gradient; torch runs hooks in order of insertion
    ours = hooks.pop(key)
    others = dict(hooks)
    hooks.clear()
    hooks[key] = ours
    hooks.update(others)
