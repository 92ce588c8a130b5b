# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"
"""Taps inside a compiled graph: an operator with an effect, in an identity with a derivative.

Hooks on tensors would break the graph. The operator stays in it, in its place among the others, forward and backward;
whether the step is observed is asked when it runs, so that switching compiles nothing again.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from gradprobe.board import Board
from gradprobe.ops.residual import residual_add

_boards: weakref.WeakValueDictionary[int, Board] = weakref.WeakValueDictionary()
_keys = itertools.count()


def register_board(board: Board) -> int:
    """Makes a board known to graphs.

    Args:
        board: Takes the statistics while it lives and is enabled.

    Returns:
        Its number, which graphs hold.
    """
    key = next(_keys)
    _boards[key] = board
    return key


def observe_output(output: Any, inputs: tuple[Any, ...], board: int, site: int) -> Any:
    """Observes what a module returned, as a part of the graph.

    Args:
        output: A tensor, or tuples, lists and dictionaries of them; anything else is left alone.
        inputs: What the module took. The gradient of an output that is one of them or a view of one, or of a parameter,
            is not observed: that would need a new tensor, which no longer shares their memory.
        board: Number of the board.
        site: Site of the output; that of the gradient comes next.

    Returns:
        What takes the output's place: the same values, in a new tensor where a gradient may come back to it.
    """
    if isinstance(output, Tensor):
        if not (output.is_floating_point() or output.is_complex()):
            return output
        if output.requires_grad and not _shares_memory(output, inputs):
            return _Observed.apply(output, board, site)
        _OBSERVE(output, board, site)
        return output
    if type(output) is dict:
        return {key: observe_output(value, inputs, board, site) for key, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)([observe_output(value, inputs, board, site) for value in output])
    return output


def observe_junction(x: Tensor, f: Tensor, relu: bool, board: int, first: int) -> Tensor:
    """Joins shortcut and branch and observes it, as a part of the graph.

    The gradient at x holds the branch's part only once everything that takes x has sent its own, which no operator of
    this graph waits for: the branch's part is not observed.

    Args:
        x: What passes by the shortcut.
        f: What comes out of the branch; shape, device and dtype of x.
        relu: Whether to take the positive part.
        board: Number of the board.
        first: Site of x; those of the other `JUNCTION_KINDS` come next.

    Returns:
        `x + f`, or `torch.relu(x + f)`.
    """
    if x.requires_grad or f.requires_grad:
        result: Tensor = _ObservedJunction.apply(x, f, relu, board, first)
        return result
    y = residual_add(x, f, relu)
    for site, tensor in enumerate((x, f, y), first):
        _OBSERVE(tensor, board, site)
    return y


def _shares_memory(output: Tensor, inputs: Any) -> bool:
    """Tells whether an output is, or views, what the module took or a leaf such as a parameter of its own."""
    base = output._base
    if output.is_leaf or (base is not None and base.is_leaf):
        return True
    if isinstance(inputs, Tensor):
        return output is inputs or (base is not None and (base is inputs or base is inputs._base))
    return isinstance(inputs, (tuple, list)) and any(_shares_memory(output, taken) for taken in inputs)


def _observe(x: Tensor, board: int, site: int) -> None:
    known = _boards.get(board)
    if known is not None and known.enabled:
        known.write_anew(site, x)


def _fake_observe(x: Tensor, board: int, site: int) -> None:
    return None


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, board: int, site: int) -> Tensor:
        ctx.board, ctx.site = board, site
        _OBSERVE(x, board, site)
        return x.clone()  # what is returned may be written to in place, and no view of an argument may

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _OBSERVE(gradient, ctx.board, ctx.site + 1)
        return gradient, None, None


class _ObservedJunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, relu: bool, board: int, first: int) -> Tensor:
        y = residual_add(x, f, relu)
        for site, tensor in enumerate((x, f, y), first):
            _OBSERVE(tensor, board, site)
        ctx.board, ctx.incoming_site, ctx.relu = board, first + 3, relu
        if relu:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        gradient = torch.ops.gradprobe.residual_add_backward(incoming, *ctx.saved_tensors) if ctx.relu else incoming
        for site, tensor in enumerate((incoming, gradient), ctx.incoming_site):
            _OBSERVE(tensor, ctx.board, site)
        return gradient, gradient, None, None, None


_library = torch.library.Library("gradprobe", "FRAGMENT")
_library.define("observe(Tensor x, int board, int site) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("observe", _observe, "CompositeExplicitAutograd")
_library.impl("observe", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("gradprobe::observe", _fake_observe, lib=_library)
_OBSERVE = torch.ops.gradprobe.observe.default
_register_effectful_op(_OBSERVE, _EffectType.ORDERED)
