"""Calls back at the first forward of a model, with the arguments of that call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradprobe.errors import ArgumentError
from gradprobe.ops.transforms import in_transform

Tell = Callable[[nn.Module, Sequence[object], Mapping[str, object]], None]

_HELD = "_gradprobe_held"  # the attribute of our forward that returns the override that it replaces


def call_at_first_forward(model: nn.Module, tell: Tell, give_up: Callable[[nn.Module, ArgumentError], None]) -> None:
    """Overrides a model's forward on the instance, until it is called for the first time.

    A forward pre-hook would be too late: a module looks its forward up before its hooks run. Calls under a compiler, a
    tracer or a transform, during the capture of a CUDA graph and before lazy parameters are initialised run as before,
    and do not count. A deep copy waits for its own first forward.

    Args:
        model: The model.
        tell: Called with the model, now without the override, and the arguments; may override forward in turn.
        give_up: Called instead of another try if `tell` raises an exception, but the model takes the arguments.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> call_at_first_forward(layer, lambda model, args, keywords: print(len(args)), lambda model, error: None)
        >>> _ = layer(torch.ones(1, 2)), layer(torch.ones(1, 2))
        1
    """
    held = vars(model).get("forward")
    is_own = isinstance(held, MethodType) and held.__self__ is model
    function: Any = type(model).forward
    if held is not None:
        function = held.__func__ if is_own else lambda self, *args, **keywords: held(*args, **keywords)

    def held_by(module: nn.Module) -> Any:
        """Returns the override that a module had before; a deep copy gets one that is bound to itself."""
        return MethodType(function, module) if is_own else held

    runs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # the forward of those that were called
    lock = threading.RLock()

    def begin(self: nn.Module, args: Sequence[object], keywords: Mapping[str, object]) -> ArgumentError | None:
        outer = vars(self).pop("forward", None)
        before = held_by(self)
        if before is not None:
            vars(self)["forward"] = before
        is_told = False
        try:
            with _others_waiting(self, lock):
                tell(self, args, keywords)
            is_told = True
        except ArgumentError as error:
            return error
        except Exception as error:  # noqa: BLE001, a module of an unusual kind must not end the training
            return ArgumentError(f"{type(error).__name__}: {error}")
        finally:
            if is_told:
                now = vars(self).get("forward")
                runs[self] = function if now is before else getattr(now, "__func__", function)
            is_wrapped = not (isinstance(outer, MethodType) and outer.__func__ is forward)
            if outer is not None and (is_wrapped or not is_told):
                vars(self)["forward"] = outer
        return None

    @functools.wraps(function if held is None else held)
    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        failure: ArgumentError | None = None
        if not in_transform() and self not in runs:
            with lock:
                if self not in runs and not _must_wait(self):
                    failure = begin(self, args, keywords)
        result = runs.get(self, function)(self, *args, **keywords)
        if failure is not None:
            runs[self] = function
            stop_waiting(self)
            give_up(self, failure)
        return result

    vars(forward)[_HELD] = held_by
    vars(model)["forward"] = MethodType(forward, model)


def is_waiting(model: nn.Module) -> bool:
    """Returns whether a model waits for its first forward.

    Example:
        >>> is_waiting(nn.Linear(2, 2))
        False
    """
    return _HELD in getattr(vars(model).get("forward"), "__dict__", {})


def stop_waiting(model: nn.Module) -> None:
    """Removes the override, if the model still has it.

    Example:
        >>> stop_waiting(nn.Linear(2, 2))
    """
    if is_waiting(model):
        held = vars(vars(model).pop("forward").__func__)[_HELD](model)
        if held is not None:
            vars(model)["forward"] = held


@contextmanager
def _others_waiting(model: nn.Module, lock: AbstractContextManager[object]) -> Iterator[None]:
    """Makes calls of a model from other threads wait for a lock, since its parameters are replaced meanwhile."""
    thread, before = threading.get_ident(), vars(model).get("_call_impl")
    call: Callable[..., Any] = model._call_impl

    def wait(*args: Any, **keywords: Any) -> Any:
        if threading.get_ident() != thread:
            with lock:
                pass
        return call(*args, **keywords)

    vars(model)["_call_impl"] = wait
    try:
        yield
    finally:
        del vars(model)["_call_impl"]
        if before is not None:
            vars(model)["_call_impl"] = before


def _must_wait(model: nn.Module) -> bool:
    """Returns whether the operations of this call only describe or record what is to run, or cannot run yet."""
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    n_modes = torch._C._len_torch_dispatch_stack()
    return is_capturing or n_modes > 0 or any(map(is_lazy, model.parameters()))
