"""GradientHooks on the outputs of modules, and on the gradients that come back to them.

The gradient is met by a hook on the output tensor itself, as it was when the module returned it: what is done to it in
place later (ReLU, `+=`) changes neither the number nor the training. Backward hooks on modules would not bear that.
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
from torch.utils.hooks import RemovableHandle

from gradprobe.errors import ArgumentError
from gradprobe.observers.compiled_ops import observe_output, register_step_buffer
from gradprobe.observers.module_hooks import ModuleHooks
from gradprobe.observers.observable import (
    ForwardPasses,
    in_transform,
    is_measurable,
    native_hooks_of,
    next_native_step,
    remove_all,
    tensors_in,
)
from gradprobe.observers.step_buffer import Gate, StepBuffer

Selection = bool | Sequence[str] | Callable[[str, nn.Module], bool]

_WITHOUT_OUTPUT = (
    nn.Identity,
    nn.ParameterList,
    nn.ParameterDict,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)


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


class ActivationHooks:
    """Hooks on M modules: number m writes its output to site 2m and the gradient of that to site 2m + 1.

    A module that is called several times in a step, or returns several tensors, writes several times. One that returns
    its input gets the gradient of that, which is the sum over all that take it. To an output that is a view and is
    written to in place later, torch sends no gradient. Forward passes without gradients, as in evaluation, are not
    observed; what a checkpoint computes again is observed once.

    Args:
        modules: The M modules.
        buffer: Takes the statistics of each tensor as it passes by.
    """

    def __init__(self, modules: Sequence[nn.Module], buffer: StepBuffer) -> None:
        self.buffer = buffer
        self._buffer_key = register_step_buffer(buffer)
        self._passes = ForwardPasses()
        self._leaf_hooks: list[RemovableHandle] = []  # these outlive the graph
        self.unmeasured: set[int] = set()  # modules with an output that no kernel takes
        self._native = native_hooks_of("OutputHooks", buffer, len(modules), partial(_on_gradient, weakref.ref(self)))
        self._hooks = ModuleHooks(modules, [_ForwardHook(self, m) for m in range(len(modules))])

    def follow_gate(self) -> None:
        """Takes the hooks off the modules while the buffer's gate is closed."""
        self._hooks.need(self.buffer.gate.is_open)

    def start_step(self) -> None:
        """Begins a step."""
        self._passes.clear()
        remove_all(self._leaf_hooks)
        self._native = next_native_step(self._native, self.buffer)

    def remove(self) -> None:
        """Removes every hook, for good."""
        self._hooks.remove()
        remove_all(self._leaf_hooks)

    def in_graph(self, m: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Observes what module m made of its inputs in a graph that is being compiled; returns what takes its place."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return None
        return observe_output(output, inputs, self._buffer_key, 2 * m)

    def on_output(self, m: int, output: Any) -> None:
        """Observes what module m returned."""
        if self._native is not None and self._native.observe(m, output):
            return
        if not self.buffer.enabled or not torch.is_grad_enabled() or in_transform() or self.buffer.is_full():
            return
        is_repeat = (self._native or self._passes).is_repeat(m)
        for tensor in tensors_in(output):
            if not is_measurable(tensor):
                self.unmeasured.add(m)
                continue
            if not is_repeat:
                self.buffer.write(2 * m, tensor)
            if tensor.requires_grad:
                hook = _GradientHook(weakref.ref(self), 2 * m + 1)
                if hook in (tensor._backward_hooks or {}).values():  # returned before: its input, say
                    continue
                handle = tensor.register_hook(hook)
                if tensor.is_leaf:
                    self._leaf_hooks.append(handle)

    def on_gradient(self, site: int, gradient: torch.Tensor) -> None:
        """Observes a gradient."""
        if self.buffer.enabled and is_measurable(gradient):
            self.buffer.write(site, gradient)


class _ForwardHook:
    """A module's hook that does not keep the hooks alive, and does nothing in a copy or a pickle of the module."""

    __slots__ = ("_gate", "_hooks", "_m")

    def __init__(self, hooks: ActivationHooks | None, m: int) -> None:
        self._hooks = None if hooks is None else weakref.ref(hooks)
        self._gate = Gate(is_open=False) if hooks is None else hooks.buffer.gate
        self._m = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        compiles = is_compiling()
        if not compiles and not self._gate.is_open:
            return None
        hooks = None if self._hooks is None else self._hooks()
        if hooks is None:
            return None
        if compiles:
            return hooks.in_graph(self._m, (*args, *kwargs.values()), output)
        hooks.on_output(self._m, output)
        return None

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[None, int]]:
        return _ForwardHook, (None, self._m)


def _on_gradient(hooks: weakref.ref[ActivationHooks], site: int, gradient: torch.Tensor) -> None:
    alive = hooks()
    if alive is not None:
        alive.on_gradient(site, gradient)


@dataclasses.dataclass(frozen=True, slots=True)
class _GradientHook:
    """A tensor's hook; the graph may outlive the hooks."""

    hooks: weakref.ref[ActivationHooks]
    site: int

    def __call__(self, gradient: torch.Tensor) -> None:
        _on_gradient(self.hooks, self.site, gradient)
