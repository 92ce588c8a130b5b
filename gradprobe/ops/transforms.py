"""Tells whether a compiler, a tracer or a transform runs a model."""

from __future__ import annotations

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def in_transform() -> bool:
    """Returns whether a compiler, a tracer or a `torch.func` transform runs the model: hooks then do nothing."""
    return (
        is_compiling()
        or torch._C._is_tracing()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
