"""GradientHooks inside a compiled graph: an operator with an effect, in an identity with a derivative.

Hooks on tensors would break the graph. The operator stays in it, in its place among the others, forward and backward;
whether the step is observed is asked when it runs, so that switching compiles nothing again.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.autograd.graph import Node

from gradprobe.observers.autograd_edges import edges_into
from gradprobe.observers.step_buffer import StepBuffer
from gradprobe.ops.residual import RESIDUAL_BRANCH_STATS, residual_add
from gradprobe.snapshot.records import JUNCTION_KINDS

_step_buffers: weakref.WeakValueDictionary[int, StepBuffer] = weakref.WeakValueDictionary()
_keys = itertools.count()


def register_step_buffer(buffer: StepBuffer) -> int:
    """Makes a buffer known to graphs.

    Args:
        buffer: Takes the statistics while it lives and is enabled.

    Returns:
        Its number, which graphs hold.
    """
    key = next(_keys)
    _step_buffers[key] = buffer
    return key


def observe_output(output: Any, inputs: tuple[Any, ...], buffer: int, site: int) -> Any:
    """Observes what a module returned, as a part of the graph.

    Args:
        output: A tensor, or tuples, lists and dictionaries of them; anything else is left alone.
        inputs: What the module took. The gradient of an output that is one of them or a view of one, or of a parameter,
            is not observed: that would need a new tensor, which no longer shares their memory.
        buffer: Number of the buffer.
        site: Site of the output; that of the gradient comes next.

    Returns:
        What takes the output's place: the same values, in a new tensor where a gradient may come back to it.
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


# Dynamo looks no further: which nodes hand on the branch's part is found in autograd's own graph.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def observe_junction(x: Tensor, f: Tensor, relu: bool, buffer: int, first: int) -> Tensor:
    """Joins shortcut and branch and observes it, as a part of the graph.

    Of the branch is observed what this graph holds: where it begins behind x, the branch's part is not.

    Args:
        x: What passes by the shortcut.
        f: What comes out of the branch; shape and device of x.
        relu: Whether to take the positive part.
        buffer: Number of the buffer.
        first: Site of x; those of the other `JUNCTION_KINDS` come next.

    Returns:
        `x + f`, or `torch.relu(x + f)`.
    """
    dtype = torch.promote_types(x.dtype, f.dtype)
    passage = _GraphJunctionCall(buffer, first)
    y: Tensor = _ObservedJunction.apply(x.to(dtype), f.to(dtype), relu, passage)  # type: ignore[no-untyped-call]
    passage.hook_branch(edges_into(x, y.grad_fn, [1]))
    return y


def _shares_memory(output: Tensor, inputs: Any) -> bool:
    """Tells whether an output is, or views, what the module took or a leaf such as a parameter of its own."""
    base = output._base
    if output.is_leaf or (base is not None and base.is_leaf):
        return True
    if isinstance(inputs, Tensor):
        return output is inputs or (base is not None and (base is inputs or base is inputs._base))
    return isinstance(inputs, (tuple, list)) and any(_shares_memory(output, taken) for taken in inputs)


def _observe(x: Tensor, buffer: int, site: int) -> None:
    known = _step_buffers.get(buffer)
    if known is not None and known.enabled:
        known.write_anew(site, x)


def _fake_observe(x: Tensor, buffer: int, site: int) -> None:
    return None


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: int, site: int) -> Tensor:
        ctx.buffer, ctx.site = buffer, site
        _OBSERVE(x, buffer, site)
        return x.clone()  # what is returned may be written to in place, and no view of an argument may

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _OBSERVE(gradient, ctx.buffer, ctx.site + 1)
        return gradient, None, None


class _GraphJunctionCall:
    """One call of a junction in a graph: brings the two parts of the gradient at x together."""

    def __init__(self, buffer: int, first: int) -> None:
        self.buffer, self.first = buffer, first
        self._shortcut: Tensor | None = None
        self._n_arrivals = 0
        self._arrived: list[Tensor | None] = []

    def hook_branch(self, edges: Sequence[tuple[Node, int]]) -> None:
        """Hooks the nodes by which the branch's part of the gradient comes to x."""
        self._n_arrivals = len(edges)
        for node, output in edges:
            node.register_hook(partial(self._on_arrival, output))

    def on_shortcut(self, gradient: Tensor) -> None:
        """Takes the shortcut's part, at the beginning of each backward."""
        self._shortcut = gradient if self._n_arrivals > 0 else None
        self._arrived = []

    def _on_arrival(self, output: int, grad_inputs: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        if self._shortcut is None:
            return
        self._arrived.append(grad_inputs[output])
        if len(self._arrived) < self._n_arrivals:
            return
        parts = [part for part in self._arrived if part is not None]
        shortcut, self._shortcut, self._arrived = self._shortcut, None, []
        if parts:
            _OBSERVE_BRANCH(sum(parts[1:], parts[0]), shortcut, self.buffer, self.first)


class _ObservedJunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, relu: bool, passage: _GraphJunctionCall) -> Tensor:
        y = residual_add(x, f, relu)
        for site, tensor in enumerate((x, f, y), passage.first):
            _OBSERVE(tensor, passage.buffer, site)
        ctx.passage, ctx.relu = passage, relu
        if relu:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        gradient = torch.ops.gradprobe.residual_add_backward(incoming, *ctx.saved_tensors) if ctx.relu else incoming
        for site, tensor in enumerate((incoming, gradient), ctx.passage.first + 3):
            _OBSERVE(tensor, ctx.passage.buffer, site)
        ctx.passage.on_shortcut(gradient)
        return gradient, gradient, None, None


def _observe_branch(branch: Tensor, shortcut: Tensor, buffer: int, first: int) -> None:
    known = _step_buffers.get(buffer)
    if known is not None and known.enabled:
        with known.graphs.counting():
            rows = RESIDUAL_BRANCH_STATS(branch, shortcut.to(branch.dtype))
        known.put_apart(first + JUNCTION_KINDS.index("branch_grad"), rows[:1], branch.numel())
        known.put_apart(first + JUNCTION_KINDS.index("shortcut_dot_branch"), rows[1:], branch.numel())


def _fake_observe_branch(branch: Tensor, shortcut: Tensor, buffer: int, first: int) -> None:
    return None


_library = torch.library.Library("gradprobe", "FRAGMENT")


def _define(schema: str, kernel: Callable[..., None], fake: Callable[..., None]) -> Any:
    """Defines an operator whose only effect is on a buffer, in its place among the others of a graph."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"gradprobe::{name}", fake, lib=_library)
    operator = getattr(torch.ops.gradprobe, name).default
    _register_effectful_op(operator, _EffectType.ORDERED)
    return operator


_OBSERVE = _define("observe(Tensor x, int buffer, int site) -> ()", _observe, _fake_observe)
_OBSERVE_BRANCH = _define(
    "observe_branch(Tensor branch, Tensor shortcut, int buffer, int first) -> ()", _observe_branch, _fake_observe_branch
)
