"""Which tensors may be observed, and when."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gradprobe.observers.shards import local_of, partial_dims
from gradprobe.ops.statistics import PLAIN, refusal

_DEEPEST = 16  # nested containers; one may contain itself


class ForwardPasses:
    """Tells a checkpoint's recomputation from a first forward pass.

    A call inside a backward pass is a repetition if the same key was called with gradients enabled before that pass.
    The first pass of a reentrant checkpoint has gradients disabled and is not observed, so its recomputation counts as
    the first call.
    """

    def __init__(self) -> None:
        self._n_first: Counter[int] = Counter()
        self._n_in_backward: Counter[int] = Counter()

    def is_repeat(self, key: int) -> bool:
        """Notes a call with gradients enabled, and returns whether it repeats an earlier one."""
        if torch._C._current_graph_task_id() == -1:
            self._n_first[key] += 1
            return False
        self._n_in_backward[key] += 1
        return self._n_in_backward[key] <= self._n_first[key]

    def clear(self) -> None:
        """Forgets all calls; called when a step begins."""
        self._n_first.clear()
        self._n_in_backward.clear()


def may_observe_in_graph() -> bool:
    """Returns whether the graph being compiled may observe: not in inference, export or a `torch.func` transform."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return not torch._C._are_functorch_transforms_active()


def is_measurable(tensor: torch.Tensor) -> bool:
    """Returns whether the operators accept a tensor, and would not run code of its class inside a hook."""
    return type(tensor) in PLAIN and refusal(tensor) is None


def measurable_part(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns the part of a tensor on this rank, mostly the tensor itself; None if the operators do not accept it."""
    part = tensor if type(tensor) in PLAIN else local_of(tensor)
    if not is_measurable(part) or (part is not tensor and partial_dims(tensor)):  # a summand says nothing of the sum
        return None
    return part


def tensors_in(output: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yields the floating-point and complex tensors in a module's output.

    Args:
        output: A tensor, or nested sequences, mappings and dataclass instances of them; anything else yields nothing.
        depth: Number of containers around `output`.
    """
    if depth > _DEEPEST:
        return
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value, depth + 1)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value, depth + 1)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name, None), depth + 1)
