"""A CUDA graph in miniature, on the CPU: what is captured is done again on the same memory, and no Python runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradprobe.observers import cuda_graphs as graph_rows


class Tape(TorchDispatchMode):
    """Records the operators that run while it is on, and repeats them with the very tensors that they took and gave.

    Unlike a stream that captures, it does them at once too; `capture` puts back what that has changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unasked: list[str] = []  # operators that took statistics and asked no flag
        self._is_asking = False
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.gradprobe.count_if.default:
            self._is_asking = args[1]
        elif func.namespace == "gradprobe" and "stats" in func.name() and not self._is_asking:
            self.unasked.append(func.name())
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._calls.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Does everything again."""
        with torch.no_grad():
            for func, args, kwargs, made in self._calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
                for old, new in zip(made, again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # else it was written in place, or is a view
                        old.copy_(new)


class Capture:
    """Captures what runs inside the block, for a probe that takes the CPU for a device with graphs.

    Args:
        monkeypatch: Of the test.
        state: Tensors that capturing is not to change.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: list[torch.Tensor]) -> None:
        self.tape = Tape()
        self._monkeypatch = monkeypatch
        self._state = state

    def __enter__(self) -> Tape:
        self._before = [tensor.detach().clone() for tensor in self._state]
        self._monkeypatch.setattr(graph_rows, "is_capturing", lambda device: True)
        self.tape.__enter__()
        return self.tape

    def __exit__(self, *error: Any) -> None:
        self.tape.__exit__(*error)
        self._monkeypatch.setattr(graph_rows, "is_capturing", lambda device: False)
        with torch.no_grad():
            for tensor, value in zip(self._state, self._before, strict=True):
                tensor.copy_(value)
