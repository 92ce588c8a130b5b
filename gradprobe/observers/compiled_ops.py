"""Observes activations and residual adds inside a compiled graph, with operators instead of hooks.

Tensor hooks would break the graph. These operators have a side effect and keep their order in it, in forward and
backward. They check at run time whether the step is observed, so that switching does not recompile.

This module is imported while a graph is compiled: it imports Dynamo, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from gradprobe.observers.junction_call import JunctionCall
from gradprobe.observers.signal_buffer import registered_buffer
from gradprobe.ops.autograd import residual_sum
from gradprobe.ops.schemas import RESIDUAL_ADD, RESIDUAL_ADD_BACKWARD, RESIDUAL_BRANCH_STATS
from gradprobe.snapshot.records import JUNCTION_KINDS


def observe_output(output: Any, inputs: tuple[Any, ...], buffer: int, site: int) -> Any:
    """Observes a module's output inside the graph.

    Args:
        output: A tensor, or tuples, lists and dictionaries of tensors; anything else is not observed.
        inputs: The module's inputs. If an output is an input, a leaf such as a parameter, or a view of one, its
            gradient is not observed: that would need a new tensor, which no longer shares their memory.
        buffer: Key of the signal buffer.
        site: Site of the output; that of the gradient is the next.

    Returns:
        The output to use instead: the same values, in a new tensor if a gradient can be observed.
    """
    if isinstance(output, Tensor):
        if not (output.is_floating_point() or output.is_complex()):
            return output
        if output.requires_grad and not _shares_memory(output, inputs):
            return _Observed.apply(output, buffer, site)  # type: ignore[no-untyped-call]
        _OBSERVE(output, buffer, site)
        return output
    if type(output) is dict:
        return {key: observe_output(value, inputs, buffer, site) for key, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)([observe_output(value, inputs, buffer, site) for value in output])
    return output


# Dynamo must not trace into this: the nodes that pass on the branch's part are found in autograd's graph.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def observe_junction(x: Tensor, f: Tensor, relu: bool, buffer: int, first: int) -> Tensor:
    """Computes a residual add inside the graph, and observes it.

    The branch's part of the gradient is observed only if the branch from x to f lies in this graph.

    Args:
        x: The shortcut.
        f: Output of the branch; shape and device of x.
        relu: Whether to take the positive part.
        buffer: Key of the signal buffer.
        first: Site of x; those of the other `JUNCTION_KINDS` follow.

    Returns:
        `x + f`, or `torch.relu(x + f)`.
    """
    dtype = torch.promote_types(x.dtype, f.dtype)
    call = _GraphCall(buffer, first)
    y = residual_sum(call.add, call.gradient, x.to(dtype), f.to(dtype), relu)
    call.hook_branch(x, y.grad_fn, [1])
    return y


def _shares_memory(output: Tensor, inputs: Any) -> bool:
    """Returns whether an output is an input of the module or a leaf, such as a parameter, or a view of one."""
    base = output._base
    if output.is_leaf or (base is not None and base.is_leaf):
        return True
    if isinstance(inputs, Tensor):
        return output is inputs or (base is not None and (base is inputs or base is inputs._base))
    return isinstance(inputs, (tuple, list)) and any(_shares_memory(output, taken) for taken in inputs)


def _observe(x: Tensor, buffer: int, site: int) -> None:
    known = registered_buffer(buffer)
    if known is not None and known.enabled and not known.is_off(site):
        try:
            known.write_uncached(site, x)
        except Exception as error:  # noqa: BLE001
            known.fail(site, error)


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: int, site: int) -> Tensor:
        ctx.buffer, ctx.site = buffer, site
        _OBSERVE(x, buffer, site)
        return x.clone()  # the caller may write to the output in place, which a view of an input does not allow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _OBSERVE(gradient, ctx.buffer, ctx.site + 1)
        return gradient, None, None


class _GraphCall(JunctionCall):
    """A call in a graph that is being compiled."""

    __slots__ = ("_buffer",)

    def __init__(self, buffer: int, first: int) -> None:
        super().__init__(first)
        self._buffer = buffer

    def fail(self, error: Exception) -> None:
        buffer = registered_buffer(self._buffer)
        if buffer is not None:
            buffer.fail(self.first, error)

    def add(self, x: Tensor, f: Tensor, relu: bool) -> Tensor:
        y = RESIDUAL_ADD(x, f, relu)
        for site, tensor in enumerate((x, f, y), self.first):
            _OBSERVE(tensor, self._buffer, site)
        return y

    def gradient(self, incoming: Tensor, y: Tensor | None = None) -> Tensor:
        gradient = incoming if y is None else RESIDUAL_ADD_BACKWARD(incoming, y)
        for site, tensor in enumerate((incoming, gradient), self.first + 3):
            _OBSERVE(tensor, self._buffer, site)
        self.keep_shortcut(gradient)
        return gradient

    def on_branch(self, parts: Sequence[Tensor], shortcut: Tensor) -> None:
        _OBSERVE_BRANCH(sum(parts[1:], parts[0]), shortcut, self._buffer, self.first)


def _observe_branch(branch: Tensor, shortcut: Tensor, buffer: int, first: int) -> None:
    known = registered_buffer(buffer)
    if known is None or not known.enabled or known.is_off(first):
        return
    try:
        with known.graphs.counting():
            rows = RESIDUAL_BRANCH_STATS(branch, shortcut.to(branch.dtype))
        known.put_untracked(first + JUNCTION_KINDS.index("branch_grad"), rows[:1], branch.numel())
        known.put_untracked(first + JUNCTION_KINDS.index("shortcut_dot_branch"), rows[1:], branch.numel())
    except Exception as error:  # noqa: BLE001
        known.fail(first, error)


_library = torch.library.Library("gradprobe", "FRAGMENT")


def _define(schema: str, kernel: Callable[..., None]) -> Any:
    """Defines an operator that only writes to a signal buffer, and keeps its order among a graph's other operators."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"gradprobe::{name}", lambda *_: None, lib=_library)
    operator = getattr(torch.ops.gradprobe, name).default
    _register_effectful_op(operator, _EffectType.ORDERED)
    return operator


_OBSERVE = _define("observe(Tensor x, int buffer, int site) -> ()", _observe)
_OBSERVE_BRANCH = _define(
    "observe_branch(Tensor branch, Tensor shortcut, int buffer, int first) -> ()", _observe_branch
)
