"""A miniature CUDA graph on the CPU: a replay repeats the captured operators on the same memory, without Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records the operators that run while it is on, and repeats them on the same input and output tensors.

    Unlike a capturing stream, it also runs them at once; `Capture` restores the state that this changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unconditional: list[str] = []  # operators that computed statistics without checking a flag
        self._is_conditional = False
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.gradprobe.count_if.default:
            self._is_conditional = args[1]
        elif func.namespace == "gradprobe" and "stats" in func.name() and not self._is_conditional:
            self.unconditional.append(func.name())
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._calls.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Runs the recorded operators again."""
        with torch.no_grad():
            for func, args, kwargs, made in self._calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
                for old, new in zip(made, again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # otherwise written in place, or a view
                        old.copy_(new)


class Capture:
    """Captures the operators that run inside the block, for a probe that treats the CPU as a device with graphs.

    Args:
        monkeypatch: That of the test.
        state: Tensors that must not change during the capture.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: list[torch.Tensor]) -> None:
        self.tape = Tape()
        self._monkeypatch = monkeypatch
        self._state = state

    def __enter__(self) -> Tape:
        self._before = [tensor.detach().clone() for tensor in self._state]
        self._monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        self.tape.__enter__()
        return self.tape

    def __exit__(self, *error: Any) -> None:
        self.tape.__exit__(*error)
        self._monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with torch.no_grad():
            for tensor, value in zip(self._state, self._before, strict=True):
                tensor.copy_(value)
