"""Hooks on tensors that call back with the tensor's gradient during one step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle


class TensorHooks:
    """The hooks of one step. Those on intermediate tensors go with the graph; those on leaves outlive it."""

    def __init__(self) -> None:
        self._on_leaves: list[RemovableHandle] = []
        self._lock = threading.Lock()  # a probe may be detached while another thread is in a forward pass
        self._is_removed = False

    def add(self, tensor: torch.Tensor, on_gradient: Callable[[torch.Tensor], None]) -> None:
        """Calls back with the gradient of a tensor that requires one."""
        if not tensor.is_leaf:
            tensor.register_hook(on_gradient)
            return
        with self._lock:
            if not self._is_removed:
                self._on_leaves.append(tensor.register_hook(on_gradient))

    def clear(self) -> None:
        """Removes the hooks that are left."""
        with self._lock:
            for handle in self._on_leaves:
                handle.remove()
            self._on_leaves.clear()

    def remove(self) -> None:
        """Removes the hooks that are left, for good."""
        self._is_removed = True
        self.clear()
