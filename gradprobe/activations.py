"""Taps on the outputs of modules, and on the gradients that come back to them.

The gradient is met by a hook on the output tensor itself, as it was when the module returned it: what is done to it in
place later (ReLU, `+=`) changes neither the number nor the training. Backward hooks on modules would not bear that.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from gradprobe.arguments import Selection
from gradprobe.board import Board, Gate
from gradprobe.compiled import observe_output, register_board
from gradprobe.errors import ArgumentError
from gradprobe.module_hooks import ModuleHooks
from gradprobe.ops.native import native_hooks
from gradprobe.row_log import PythonRows

_LAYOUTS = (
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)
_WITHOUT_OUTPUT = (
    nn.Identity,
    nn.ParameterList,
    nn.ParameterDict,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)
_DEEPEST = 16  # containers in containers; one that holds itself has no end


def select_modules(model: nn.Module, selection: Selection, elsewhere: Collection[str] = ()) -> dict[str, nn.Module]:
    """Chooses the modules whose outputs are observed.

    Args:
        model: Any module.
        selection: True for every module without children, but for `Identity`, lists and dictionaries of parameters, and
            the output layer of torch's attention, which are not called as modules; a list of patterns of names, in
            which `*` stands for any characters; or a function of name and module.
        elsewhere: Names that True leaves out, because they are observed in another way.

    Returns:
        The modules by their first name, in model order.

    Raises:
        ArgumentError: The selection is of another kind, or chooses nothing; a pattern that fits no module is named.

    Example:
        >>> list(select_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), True))
        ['0', '1']
    """
    named = {name: module for name, module in model.named_modules() if name}
    if not named:
        named = {type(model).__name__: model}
    if selection is True:
        return {
            name: module
            for name, module in named.items()
            if not any(module.children()) and name not in elsewhere and not isinstance(module, _WITHOUT_OUTPUT)
        }
    if callable(selection):
        chosen = {name: module for name, module in named.items() if selection(name, module)}
        if not chosen:
            raise ArgumentError(f"activations: the function chose none of {len(named)} modules")
        return chosen
    is_list = isinstance(selection, Sequence) and not isinstance(selection, str)
    if not is_list or not selection or not all(isinstance(pattern, str) for pattern in selection):
        raise ArgumentError(
            f"activations: need True, False, a list of patterns or a function of name and module; got {selection!r}"
        )
    for pattern in selection:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ArgumentError(
                f"activations: no module's name fits {pattern!r}; there are {', '.join(list(named)[:5])}, …"
            )
    return {name: module for name, module in named.items() if any(fnmatchcase(name, pattern) for pattern in selection)}


class ActivationTaps:
    """Hooks on M modules: number m writes its output to site 2m and the gradient of that to site 2m + 1.

    A module that is called several times in a step, or returns several tensors, writes several times. One that returns
    its input gets the gradient of that, which is the sum over all that take it. To an output that is a view and is
    written to in place later, torch sends no gradient. Forward passes without gradients, as in evaluation, are not
    observed; what a checkpoint computes again is observed once.

    Args:
        modules: The M modules.
        board: Takes the statistics of each tensor as it passes by.
    """

    def __init__(self, modules: Sequence[nn.Module], board: Board) -> None:
        self.board = board
        self._board_key = register_board(board)
        self._passes = ForwardPasses()
        self._leaf_hooks: list[RemovableHandle] = []  # these outlive the graph
        self.unmeasured: set[int] = set()  # modules with an output that no kernel takes
        self._native = native_taps("OutputTaps", board, len(modules), partial(_on_gradient, weakref.ref(self)))
        self._hooks = ModuleHooks(modules, [_ForwardHook(self, m) for m in range(len(modules))])

    def follow_gate(self) -> None:
        """Takes the hooks off the modules while the board's gate is closed."""
        self._hooks.need(self.board.gate.is_open)

    def start_step(self) -> None:
        """Begins a step."""
        self._passes.clear()
        remove_all(self._leaf_hooks)
        self._native = next_native_step(self._native, self.board)

    def remove(self) -> None:
        """Removes every hook, for good."""
        self._hooks.remove()
        remove_all(self._leaf_hooks)

    def in_graph(self, m: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Observes what module m made of its inputs in a graph that is being compiled; returns what takes its place."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return None
        return observe_output(output, inputs, self._board_key, 2 * m)

    def on_output(self, m: int, output: Any) -> None:
        """Observes what module m returned."""
        if self._native is not None and self._native.observe(m, output):
            return
        if not self.board.enabled or not torch.is_grad_enabled() or in_transform() or self.board.is_full():
            return
        is_repeat = (self._native or self._passes).is_repeat(m)
        for tensor in tensors_in(output):
            if not is_measurable(tensor):
                self.unmeasured.add(m)
                continue
            if not is_repeat:
                self.board.write(2 * m, tensor)
            if tensor.requires_grad:
                hook = _GradientHook(weakref.ref(self), 2 * m + 1)
                if hook in (tensor._backward_hooks or {}).values():  # returned before: its input, say
                    continue
                handle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
                if tensor.is_leaf:
                    self._leaf_hooks.append(handle)

    def on_gradient(self, site: int, gradient: torch.Tensor) -> None:
        """Observes a gradient."""
        if self.board.enabled and is_measurable(gradient):
            self.board.write(site, gradient)


class _ForwardHook:
    """A module's hook that does not keep the taps alive, and does nothing in a copy or a pickle of the module."""

    __slots__ = ("_gate", "_m", "_taps")

    def __init__(self, taps: ActivationTaps | None, m: int) -> None:
        self._taps = None if taps is None else weakref.ref(taps)
        self._gate = Gate(is_open=False) if taps is None else taps.board.gate
        self._m = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        compiles = is_compiling()
        if not compiles and not self._gate.is_open:
            return None
        taps = None if self._taps is None else self._taps()
        if taps is None:
            return None
        if compiles:
            return taps.in_graph(self._m, (*args, *kwargs.values()), output)
        taps.on_output(self._m, output)
        return None

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[None, int]]:
        return _ForwardHook, (None, self._m)


def _on_gradient(taps: weakref.ref[ActivationTaps], site: int, gradient: torch.Tensor) -> None:
    alive = taps()
    if alive is not None:
        alive.on_gradient(site, gradient)


@dataclasses.dataclass(frozen=True, slots=True)
class _GradientHook:
    """A tensor's hook; the graph may outlive the taps."""

    taps: weakref.ref[ActivationTaps]
    site: int

    def __call__(self, gradient: torch.Tensor) -> None:
        _on_gradient(self.taps, self.site, gradient)


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


def native_taps(kind: str, board: Board, *arguments: Any) -> Any | None:
    """Makes the C++ taps that observe plain tensors in plain autograd, and leave all else to Python.

    Args:
        kind: Name of their class.
        board: Takes the statistics.
        arguments: Of the class, behind the rows.

    Returns:
        The taps, None where the board's rows are not in C++.
    """
    module, _ = native_hooks()
    if module is None or isinstance(board.rows, PythonRows):
        return None
    return getattr(module, kind)(board.rows, *arguments)


def next_native_step(native: Any | None, board: Board) -> Any | None:
    """Begins a step of the C++ taps; gives None in their place where the board's rows have gone to another device."""
    if native is None or isinstance(board.rows, PythonRows):
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
