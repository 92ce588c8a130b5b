"""Which tensors and which moments may be observed, and what the observers of activations and residual adds share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from gradprobe.observers.event_rows import PythonEventRows
from gradprobe.observers.step_buffer import StepBuffer
from gradprobe.ops import libraries

_LAYOUTS = (
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)
_DEEPEST = 16  # containers in containers; one that holds itself has no end


class ForwardPasses:
    """Tells what a checkpoint computes again from what runs for the first time.

    In a backward, a call that went with gradients before is a repetition. A reentrant checkpoint runs first without
    gradients, which is not observed.
    """

    def __init__(self) -> None:
        self._n_first: Counter[int] = Counter()
        self._n_in_backward: Counter[int] = Counter()

    def is_repeat(self, key: int) -> bool:
        """Notes a call with gradients, and tells whether it is a repetition."""
        if torch._C._current_graph_task_id() == -1:
            self._n_first[key] += 1
            return False
        self._n_in_backward[key] += 1
        return self._n_in_backward[key] <= self._n_first[key]

    def clear(self) -> None:
        """Begins a step."""
        self._n_first.clear()
        self._n_in_backward.clear()


def native_hooks_of(kind: str, buffer: StepBuffer, *arguments: Any) -> Any | None:
    """Makes the C++ hooks that observe plain tensors in plain autograd, and leave all else to Python.

    Args:
        kind: Name of their class.
        buffer: Takes the statistics.
        arguments: Of the class, behind the rows.

    Returns:
        The hooks, None where the board's rows are not in C++.
    """
    module, _ = libraries.native_hooks()
    if module is None or isinstance(buffer.rows, PythonEventRows):
        return None
    return getattr(module, kind)(buffer.rows, *arguments)


def next_native_step(native: Any | None, buffer: StepBuffer) -> Any | None:
    """Begins a step of the C++ hooks; gives None in their place where the board's rows have gone to another device."""
    if native is None or isinstance(buffer.rows, PythonEventRows):
        return None
    native.start_step()
    return native


def remove_all(handles: list[RemovableHandle]) -> None:
    """Removes hooks, and empties the list."""
    for handle in handles:
        handle.remove()
    handles.clear()


def in_transform() -> bool:
    """Tells whether a compiler, a tracer or a transform of `torch.func` runs the model now: no place for hooks."""
    return (
        is_compiling()
        or torch._C._is_tracing()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def is_measurable(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor has numbers that the kernels take: floating point, on a real device, no subclass."""
    return (
        (tensor.is_floating_point() or tensor.is_complex())
        and tensor.itemsize > 1
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout in _LAYOUTS
        and not tensor.is_nested
        and not is_legacy_batchedtensor(tensor)  # of torch.autograd.grad(is_grads_batched=True)
        and tensor.device.type != "meta"
    )


def tensors_in(output: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yields the tensors of floating point in what a module returned: tensors, sequences, mappings, dataclasses."""
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
