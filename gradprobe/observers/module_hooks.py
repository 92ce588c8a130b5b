"""Forward hooks that are removed from their modules while nothing is observed.

torch calls a module with any hook through a slower path, about 5 µs longer whatever the hook does.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from torch._dynamo.callback import CompilationCallbackHandler


class ModuleHook:
    """A forward hook that stays out of copies of its module: `copy.deepcopy` drops it, pickle makes it do nothing.

    A pickled model loads without gradprobe. `torch.jit.script` compiles every forward hook of a module from the source
    of a function whose arguments have that module's types. A function has no say in how it is copied and pickled, so
    this hook is none, and scripting fails while it is registered: pause the probe meanwhile.
    """

    __slots__ = ("_handle", "_module")

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._module: weakref.ref[nn.Module] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        """Handles an output, the last argument.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs_and_output: Its keyword arguments and its output; only the output if another thread has just removed
                the hook.

        Returns:
            The output to use in its place, or None to keep it.
        """
        raise NotImplementedError

    def register(self, module: nn.Module) -> None:
        """Registers the hook on its module."""
        self._module = weakref.ref(module)
        self._handle = module.register_forward_hook(self, with_kwargs=True)

    def is_alone(self) -> bool:
        """Returns whether the module has this hook and no other."""
        module = None if self._module is None else self._module()
        return module is not None and self._handle is not None and list(module._forward_hooks) == [self._handle.id]

    def put_back(self) -> None:
        """Puts the hook back in front of those registered since its removal."""
        module = None if self._module is None else self._module()
        if module is not None and self._handle is not None:
            hooks: OrderedDict[int, Any] = module._forward_hooks  # type: ignore[assignment]
            module._forward_hooks_with_kwargs[self._handle.id] = True
            hooks[self._handle.id] = self
            hooks.move_to_end(self._handle.id, last=False)

    def remove(self) -> None:
        """Removes the hook from its module."""
        if self._handle is not None:
            self._handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        module = None if self._module is None else self._module()
        hooks = None if module is None else memo.get(id(module._forward_hooks))
        if module is not None and self._handle is not None and hooks is not None:
            # `hooks` gets its entry for this hook after the return; `memo` deletes it when the copy is complete
            eraser = _Eraser(self._handle.id, (hooks, copy.deepcopy(module._forward_hooks_with_kwargs, memo)))
            memo[id(eraser)] = eraser
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that takes anything and returns None. It carries the handle because loading
        # a handle reserves its number: the next hook would otherwise replace this one and be called with its arguments.
        return getattr, (nullcontext(self._handle), "__exit__")


class _Eraser:
    """Deletes an entry from dictionaries when it is itself deleted."""

    __slots__ = ("_dictionaries", "_key")

    def __init__(self, key: int, dictionaries: tuple[MutableMapping[int, Any], ...]) -> None:
        self._key, self._dictionaries = key, dictionaries

    def __del__(self) -> None:
        for dictionary in self._dictionaries:
            dictionary.pop(self._key, None)


class ModuleHooks:
    """A forward hook, with keyword arguments, on each of M modules. Every method may be called in any thread.

    A hook is removed only if its module has no other, and is put back in front of hooks registered meanwhile. The hooks
    thus run in order of registration, except that one registered meanwhile with `prepend` runs after ours.

    Dynamo compiles a module together with its hook, so once anything is compiled, all hooks are put back and stay. They
    also stay until Dynamo is imported, as torch's optimizers do: only then can it report a compilation.

    Args:
        modules: The M modules.
        hooks: One for each.
    """

    def __init__(self, modules: Sequence[nn.Module], hooks: Sequence[ModuleHook]) -> None:
        self._all = list(hooks)
        self._absent: list[ModuleHook] = []
        self._stay = False
        try:
            for module, hook in zip(modules, hooks, strict=True):
                hook.register(module)
        except BaseException:
            self.remove()
            raise
        with _lock:
            _alive.add(self)
        self._is_listening = _listen()

    def need(self, needed: bool) -> None:
        """Puts the hooks back if they are needed from now on, and removes them if not."""
        with _lock:
            self._stay = self._stay or self._may_be_compiled()
            if needed or self._stay:
                for hook in self._absent:
                    hook.put_back()
                self._absent.clear()
            elif self._is_listening and not self._absent:
                self._absent = [hook for hook in self._all if hook.is_alone()]
                for hook in self._absent:
                    hook.remove()

    def _may_be_compiled(self) -> bool:
        if self._is_listening:
            # if torch._dynamo.reset() has removed the callback, something was compiled
            return _on_compilation not in _callback_handler().start_callbacks
        self._is_listening = _listen()
        return self._is_listening and _has_compiled()

    def keep(self) -> None:
        """Puts all hooks back, for good."""
        self._stay = True
        self.need(True)

    def remove(self) -> None:
        """Removes every hook, for good."""
        with _lock:
            self._absent.clear()
            for hook in self._all:
                hook.remove()
            self._all.clear()


_alive: weakref.WeakSet[ModuleHooks] = weakref.WeakSet()
_lock = threading.RLock()  # a garbage collection inside may remove the hooks of another probe


def _listen() -> bool:
    """Lets Dynamo report compilations; returns False if it is not imported, which takes a second."""
    if "torch._dynamo" not in sys.modules:
        return False
    callbacks = _callback_handler()
    if _on_compilation not in callbacks.start_callbacks:
        callbacks.register_start_callback(_on_compilation)
    return True


def _callback_handler() -> CompilationCallbackHandler:
    from torch._dynamo.callback import callback_handler

    return callback_handler


def _has_compiled() -> bool:
    from torch._dynamo.utils import counters

    return len(counters["frames"]) > 0


def _on_compilation(*_: object) -> None:
    with _lock:
        alive = tuple(_alive)
    for hooks in alive:
        hooks.keep()
