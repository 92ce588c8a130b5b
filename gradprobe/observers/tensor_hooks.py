"""Hooks on tensors that call back with the tensor's gradient during one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle


class TensorHooks:
    """The hooks of one step. Those on intermediate tensors go with the graph; those on leaves outlive it."""

    def __init__(self) -> None:
        self._on_leaves: list[RemovableHandle] = []

    def add(self, tensor: torch.Tensor, on_gradient: Callable[[torch.Tensor], None]) -> None:
        """Calls back with the gradient of a tensor that requires one."""
        handle = tensor.register_hook(on_gradient)
        if tensor.is_leaf:
            self._on_leaves.append(handle)

    def clear(self) -> None:
        """Removes the hooks that are left."""
        for handle in self._on_leaves:
            handle.remove()
        self._on_leaves.clear()
