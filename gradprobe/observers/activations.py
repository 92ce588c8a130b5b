"""Observes the outputs of modules and the gradients of these outputs.

A hook on the output tensor, registered as the module returns it, receives the gradient. Later in-place operations on
the output (ReLU, `+=`) therefore change neither the statistics nor the training; module backward hooks fail on them.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from gradprobe.errors import ArgumentError
from gradprobe.observers.event_rows import make_output_hooks, next_native_step
from gradprobe.observers.module_hooks import ModuleHook, ModuleHooks
from gradprobe.observers.observable import ForwardPasses, may_observe_in_graph, measurable_part, tensors_in
from gradprobe.observers.signal_buffer import SignalBuffer, register_signal_buffer
from gradprobe.observers.tensor_hooks import TensorHooks
from gradprobe.ops.transforms import in_transform
from gradprobe.text.words import listed

Selection = bool | Sequence[str] | Callable[[str, nn.Module], bool]

_WITHOUT_OUTPUT = (
    nn.Identity,
    nn.ParameterList,
    nn.ParameterDict,
    nn.ModuleList,
    nn.ModuleDict,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)


def select_modules(model: nn.Module, selection: Selection, elsewhere: Collection[str] = ()) -> dict[str, nn.Module]:
    """Chooses the modules whose outputs are observed.

    Args:
        model: Any module.
        selection: True for every module without children, except `Identity` and modules that are never called (lists
            and dictionaries of parameters, the output layer of torch's attention); a list of name patterns, in which
            `*` matches any characters; or a function of name and module.
        elsewhere: Names that True excludes because they are observed as residual adds.

    Returns:
        The modules by their first name, in model order.

    Raises:
        ArgumentError: The selection has another type or selects nothing; the message names a pattern without a match.

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
            raise ArgumentError(f"activations: needed at least one module; the function selected none of {len(named)}")
        return chosen
    is_list = isinstance(selection, Sequence) and not isinstance(selection, str)
    if not is_list or not selection or not all(isinstance(pattern, str) for pattern in selection):
        raise ArgumentError(
            f"activations: needed True, False, a list of patterns or a function of name and module, got {selection!r}"
        )
    for pattern in selection:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ArgumentError(f"activations: no module name matches {pattern!r}; the model has {listed(list(named))}")
    return {name: module for name, module in named.items() if any(fnmatchcase(name, pattern) for pattern in selection)}


class ActivationHooks:
    """Hooks on M modules: module m writes its output to site 2m and the gradient of the output to site 2m + 1.

    A module that is called several times in a step, or returns several tensors, writes several events. If a module
    returns its input, the gradient is that of the input, summed over all its uses. torch computes no gradient for an
    output that is a view and is modified in place later. Forward passes with gradients disabled, as in evaluation, are
    not observed; a checkpoint's recomputation is not observed again.

    Args:
        modules: The M modules.
        buffer: Signal buffer to write to.
    """

    def __init__(self, modules: Sequence[nn.Module], buffer: SignalBuffer) -> None:
        self.buffer = buffer
        self._buffer_key = register_signal_buffer(buffer)
        self._passes = ForwardPasses()
        self._tensor_hooks = TensorHooks()
        self.unmeasured: set[int] = set()  # modules with an output that no kernel accepts
        on_gradient = partial(_on_gradient, weakref.ref(self))
        self._native = make_output_hooks(buffer.rows, len(modules), on_gradient)
        self._hooks = ModuleHooks(modules, [_ForwardHook(self, m) for m in range(len(modules))])

    def follow_gate(self) -> None:
        """Removes the hooks from the modules while the buffer's gate is closed, and puts them back when it opens."""
        self._hooks.need(self.buffer.gate.is_open)

    def start_step(self) -> None:
        """Forgets the step that has ended."""
        self._passes.clear()
        self._tensor_hooks.clear()
        self._native = next_native_step(self._native, self.buffer.rows)

    def remove(self) -> None:
        """Removes every hook, for good."""
        self._hooks.remove()
        self._tensor_hooks.remove()

    def in_graph(self, m: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Observes the output of module m in a graph that is being compiled.

        Returns:
            The output to use in its place, or None to keep it.
        """
        if not may_observe_in_graph():
            return None
        from gradprobe.observers.compiled_ops import observe_output  # imports Dynamo

        return observe_output(output, inputs, self._buffer_key, 2 * m)

    def on_output(self, m: int, output: Any) -> None:
        """Observes the output of module m. Never raises an error of measuring, unless the buffer is strict."""
        if self._native is not None and self.buffer.on_event is None and self._native.observe(m, output):
            return
        try:
            self._observe(m, output)
        except Exception as error:  # noqa: BLE001
            self.buffer.fail(2 * m, error)
            self.buffer.fail(2 * m + 1, error)

    def on_gradient(self, site: int, gradient: torch.Tensor) -> None:
        """Observes a gradient. Never raises an error of measuring, unless the buffer is strict."""
        try:
            part = measurable_part(gradient) if self.buffer.enabled else None
            if part is not None:
                self.buffer.write(site, part)
        except Exception as error:  # noqa: BLE001
            self.buffer.fail(site, error)

    def _observe(self, m: int, output: Any) -> None:
        if not self.buffer.enabled or not torch.is_grad_enabled() or in_transform() or self.buffer.is_full():
            return
        is_repeat = (self._native or self._passes).is_repeat(m)
        for tensor in tensors_in(output):
            part = measurable_part(tensor)
            if part is None:
                self.unmeasured.add(m)
                continue
            if not is_repeat and not self.buffer.is_off(2 * m):
                try:
                    self.buffer.write(2 * m, part)
                except Exception as error:  # noqa: BLE001
                    self.buffer.fail(2 * m, error)
            if tensor.requires_grad and not self.buffer.is_off(2 * m + 1):
                hook = _GradientHook(weakref.ref(self), 2 * m + 1)
                if hook in (tensor._backward_hooks or {}).values():  # returned before, e.g. the module's input
                    continue
                self._tensor_hooks.add(tensor, hook)


class _ForwardHook(ModuleHook):
    """The forward hook of one module. Does not keep `ActivationHooks` alive."""

    __slots__ = ("_gate", "_hooks", "_m")

    def __init__(self, hooks: ActivationHooks, m: int) -> None:
        super().__init__()
        self._hooks = weakref.ref(hooks)
        self._gate = hooks.buffer.gate
        self._m = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        compiles = is_compiling()
        if self._gate.on_forward is not None and not compiles:
            self._gate.on_forward()
        if not compiles and not self._gate.is_open:
            return None
        hooks = self._hooks()
        if hooks is None:
            return None
        *kwargs, output = kwargs_and_output
        if compiles:
            return hooks.in_graph(self._m, (*args, *(value for one in kwargs for value in one.values())), output)
        hooks.on_output(self._m, output)
        return None


def _on_gradient(hooks: weakref.ref[ActivationHooks], site: int, gradient: torch.Tensor) -> None:
    alive = hooks()
    if alive is not None:
        alive.on_gradient(site, gradient)


@dataclasses.dataclass(frozen=True, slots=True)
class _GradientHook:
    """The hook of one output tensor. Does not keep `ActivationHooks` alive, which the graph may outlive."""

    __torch_unserializable__ = True  # torch.save of a leaf does not warn about this hook

    hooks: weakref.ref[ActivationHooks]
    site: int

    def __call__(self, gradient: torch.Tensor) -> None:
        _on_gradient(self.hooks, self.site, gradient)
