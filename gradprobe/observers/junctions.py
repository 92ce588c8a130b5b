"""Observes residual adds: the operands, the sum, and both parts of the gradient at x.

At y = x + F(x) the gradient splits: dL/dx = dL/dy + J_F(x)^T dL/dy (He et al. 2016, "Identity Mappings in Deep Residual
Networks", arXiv 1603.05027, eq. 5). The residual add itself passes the shortcut's part to x. Hooks on the nodes at
which the graph of F reaches x see the branch's part before autograd sums the two.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.compiler import is_compiling

from gradprobe.nn.residual import ResidualAdd
from gradprobe.observers.event_rows import make_junction_hooks, next_native_step
from gradprobe.observers.junction_call import JunctionCall, fenced
from gradprobe.observers.observable import ForwardPasses, is_measurable, may_observe_in_graph
from gradprobe.observers.signal_buffer import SignalBuffer, register_signal_buffer
from gradprobe.observers.tensor_hooks import TensorHooks
from gradprobe.ops.autograd import residual_sum
from gradprobe.ops.reference import FLOAT_DTYPES
from gradprobe.ops.residual import residual_add
from gradprobe.ops.schemas import (
    RESIDUAL_ADD,
    RESIDUAL_ADD_BACKWARD,
    RESIDUAL_ADD_BACKWARD_STATS,
    RESIDUAL_ADD_STATS,
    RESIDUAL_BRANCH_STATS,
)
from gradprobe.ops.statistics import raw_rows
from gradprobe.ops.transforms import in_transform
from gradprobe.snapshot.records import JUNCTION_KINDS

N_SITES = len(JUNCTION_KINDS)
X, F, Y, INCOMING, SHORTCUT, BRANCH, DOT = range(N_SITES)


def junction_modules(model: nn.Module) -> tuple[dict[str, ResidualAdd], tuple[str, ...]]:
    """Lists the residual adds of a model.

    Args:
        model: Any module.

    Returns:
        Those that can be observed, by their first name in model order; and the names of the others, which add in place
        or are observed by another probe.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, ResidualAdd)}
    free = {name: module for name, module in found.items() if module.observer is None and not module.inplace}
    return free, tuple(name for name in found if name not in free)


class JunctionHooks:
    """Observes J residual adds, with `N_SITES` sites each, in the order of `JUNCTION_KINDS`.

    Args:
        modules: The J residual adds.
        buffer: Signal buffer to write to.
        first_site: First site of residual add 0.
    """

    def __init__(self, modules: Sequence[ResidualAdd], buffer: SignalBuffer, first_site: int) -> None:
        self.buffer = buffer
        self.first_site = first_site
        self._buffer_key = register_signal_buffer(buffer)
        self._modules = weakref.WeakSet(modules)
        self.passes = ForwardPasses()
        self.tensor_hooks = TensorHooks()
        self.native = make_junction_hooks(buffer.rows, len(modules), first_site)
        for j, module in enumerate(modules):
            module.observer = JunctionObserver(self, j)

    def start_step(self) -> None:
        """Forgets the step that has ended."""
        self.passes.clear()
        self.tensor_hooks.clear()
        self.native = next_native_step(self.native, self.buffer.rows)

    def in_graph(self, j: int, x: torch.Tensor, f: torch.Tensor, relu: bool) -> torch.Tensor:
        """Computes residual add j in a graph that is being compiled, and observes it there."""
        is_observable = x.is_floating_point() and f.is_floating_point() and x.shape == f.shape and x.device == f.device
        if not is_observable or not may_observe_in_graph():
            return residual_add(x, f, relu)
        from gradprobe.observers.compiled_ops import observe_junction  # imports Dynamo

        y: torch.Tensor = observe_junction(x, f, relu, self._buffer_key, self.first_site + N_SITES * j)
        return y

    def is_on(self, j: int) -> bool:
        """Returns whether residual add j is observed: it is switched off if measuring it has failed."""
        return not self.buffer.is_off(self.first_site + N_SITES * j)

    def observes(self, j: int, x: torch.Tensor, f: torch.Tensor) -> bool:
        """Returns whether residual add j is observed now, from Python, with these operands."""
        return (
            self.buffer.enabled
            and self.is_on(j)
            and torch.is_grad_enabled()
            and not in_transform()
            and is_measurable(x)
            and is_measurable(f)
            and x.shape == f.shape
            and x.dtype in FLOAT_DTYPES
            and f.dtype in FLOAT_DTYPES
            and not self.buffer.is_full()
        )

    def remove(self) -> None:
        """Detaches from the modules, for good."""
        for module in self._modules:
            module.observer = None
        self._modules.clear()
        self.tensor_hooks.remove()


class JunctionObserver:
    """Computes a `ResidualAdd` in place of `residual_add` while a probe is attached."""

    __slots__ = ("_gate", "_hooks", "_j")

    def __init__(self, hooks: JunctionHooks, j: int) -> None:
        self._hooks = weakref.ref(hooks)
        self._gate = hooks.buffer.gate
        self._j = j

    def __call__(self, x: torch.Tensor, f: torch.Tensor, relu: bool) -> torch.Tensor:
        """Computes `residual_add(x, f, relu)`, and observes it if gradients are enabled."""
        compiles = is_compiling()
        if self._gate.on_forward is not None and not compiles:
            self._gate.on_forward()
        hooks = self._hooks() if compiles or self._gate.is_open else None
        if hooks is None:
            return residual_add(x, f, relu)
        if compiles:
            return hooks.in_graph(self._j, x, f, relu)
        if hooks.native is not None:
            joined: torch.Tensor | None = hooks.native.join(self._j, x, f, relu)
            if joined is not None:  # None for operands that C++ leaves to Python
                return joined
        if not hooks.observes(self._j, x, f):
            return residual_add(x, f, relu)
        call = _EagerCall(hooks, hooks.first_site + N_SITES * self._j)
        dtype = torch.promote_types(x.dtype, f.dtype)
        y = residual_sum(call.add, call.gradient, x.to(dtype), f.to(dtype), relu)
        if not (hooks.native or hooks.passes).is_repeat(self._j):
            call.on_operands(x, f)
            call.on_result(y)
        call.hook_branch(x, y.grad_fn, [1])
        return y

    def is_waiting(self) -> bool:
        """Returns whether the next call is observed; a step that the next forward pass starts has begun by then."""
        if is_compiling():
            return True
        if self._gate.on_forward is not None:
            self._gate.on_forward()
        return self._gate.is_open

    def in_place(self, x: torch.Tensor, f: torch.Tensor, into_x: bool) -> torch.Tensor:
        """Adds one operand to the other with `Tensor.add_`, and observes it if gradients are enabled."""
        hooks = self._hooks()
        target, addend = (x, f) if into_x else (f, x)
        if is_compiling() and hooks is not None:
            return target.copy_(hooks.in_graph(self._j, x, f, relu=False))
        if hooks is None or not hooks.observes(self._j, x, f):
            return target.add_(addend)
        call = _EagerCall(hooks, hooks.first_site + N_SITES * self._j)
        is_repeat = (hooks.native or hooks.passes).is_repeat(self._j)
        call.hook_branch(x, f.grad_fn)  # before either operand is overwritten
        if not is_repeat:
            call.on_operands(x, f)
        # The sum may be a view that is modified again, and then a hook on it never fires: hook the addend, whose
        # gradient is the same.
        hooked = addend.view_as(addend) if addend.requires_grad and addend.dtype == target.dtype else target
        target.add_(addend if hooked is target else hooked)
        if not is_repeat:
            call.on_result(target)
        if hooked.requires_grad:
            hooks.tensor_hooks.add(hooked, call.on_sum)
        return target

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied or unpickled module has no observer


class _EagerCall(JunctionCall):
    """A call outside a compiled graph.

    Attributes:
        y_row: The sum's raw row [1, 6], once the operator has computed it.
    """

    __slots__ = ("_hooks", "y_row")

    def __init__(self, hooks: JunctionHooks, first: int) -> None:
        super().__init__(first)
        self._hooks = weakref.ref(hooks)
        self.y_row: torch.Tensor | None = None

    def fail(self, error: Exception) -> None:
        hooks = self._hooks()
        if hooks is not None:
            hooks.buffer.fail(self.first, error)

    def add(self, x: torch.Tensor, f: torch.Tensor, relu: bool) -> torch.Tensor:
        try:
            with self.counting():
                y, self.y_row = RESIDUAL_ADD_STATS(x, f, relu)
        except Exception as error:  # noqa: BLE001
            self.fail(error)
            y = RESIDUAL_ADD(x, f, relu)
        return y

    def gradient(self, incoming: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            self.on_sum(incoming)
            return incoming
        hooks = self._hooks()
        if is_measurable(incoming) and hooks is not None and not hooks.buffer.is_off(self.first):
            try:
                with self.counting():
                    gradient, rows = RESIDUAL_ADD_BACKWARD_STATS(incoming, y)
            except Exception as error:  # noqa: BLE001
                self.fail(error)
            else:
                self.on_incoming(incoming, rows, _kept(gradient))
                return gradient
        return RESIDUAL_ADD_BACKWARD(incoming, y)

    def counting(self) -> AbstractContextManager[None]:
        """Returns the context for operators that compute statistics; see `GraphRows.counting`."""
        hooks = self._hooks()
        return nullcontext() if hooks is None else hooks.buffer.graphs.counting()

    @fenced
    def on_operands(self, x: torch.Tensor, f: torch.Tensor) -> None:
        """Records the operands."""
        hooks = self._hooks()
        if hooks is not None:
            hooks.buffer.write(self.first + X, x)
            hooks.buffer.write(self.first + F, f)

    @fenced
    def on_result(self, y: torch.Tensor) -> None:
        """Records the sum, by the row that the operator has computed if it has."""
        hooks = self._hooks()
        if hooks is None:
            return
        if self.y_row is None:
            hooks.buffer.write(self.first + Y, y)
        else:
            hooks.buffer.put(self.first + Y, self.y_row, y)

    @fenced
    def on_incoming(self, incoming: torch.Tensor, rows: torch.Tensor, shortcut: torch.Tensor) -> None:
        """Records the gradient at y and the gradient at both operands, given their raw rows [2, 6]."""
        hooks = self._hooks()
        if hooks is not None and hooks.buffer.enabled:
            hooks.buffer.put(self.first + INCOMING, rows[:1], incoming)
            hooks.buffer.put(self.first + SHORTCUT, rows[1:], shortcut)
            self.keep_shortcut(shortcut)

    @fenced
    def on_sum(self, incoming: torch.Tensor) -> None:
        """Records the gradient at a sum without ReLU, which both operands receive unchanged."""
        if is_measurable(incoming):
            with self.counting():
                rows = raw_rows([incoming.detach()]).expand(2, -1)
            self.on_incoming(incoming, rows, _kept(incoming))

    def on_branch(self, parts: Sequence[torch.Tensor], shortcut: torch.Tensor) -> None:
        hooks = self._hooks()
        if hooks is None or not hooks.buffer.enabled or not all(is_measurable(part) for part in parts):
            return
        with torch.no_grad(), self.counting():
            branch = parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])
            if branch.shape == shortcut.shape and branch.layout is shortcut.layout is torch.strided:
                rows = RESIDUAL_BRANCH_STATS(branch, shortcut.to(branch.dtype))
                hooks.buffer.put_untracked(self.first + BRANCH, rows[:1], branch.numel())
                hooks.buffer.put_untracked(self.first + DOT, rows[1:], branch.numel())


def _kept(gradient: torch.Tensor) -> torch.Tensor:
    # Detach only if create_graph: an unchanged object lets the next hook reuse its statistics.
    return gradient.detach() if gradient.requires_grad else gradient
