"""Keeps a model's state, its arguments and the random numbers as they are while a forward is traced."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_CODE = (type, ModuleType, FunctionType, MethodType, partial)
_WITHOUT_STATE = ("torch", "gradprobe", "threading", "queue", "multiprocessing", "concurrent", "asyncio", "logging")


def as_input(leaf: object) -> object:
    """Copies an argument: a forward may write to tensors, and append to the cache of keys and values.

    Example:
        >>> as_input(torch.ones(2)).requires_grad
        True
    """
    if isinstance(leaf, Tensor):
        own = leaf.clone() if leaf.is_inference() else leaf
        return own.detach().requires_grad_(own.is_floating_point()).clone()  # a leaf cannot be written to
    if isinstance(leaf, nn.Module):
        return leaf
    with _CopyingAsInput():
        return copy.deepcopy(leaf)


class _CopyingAsInput(TorchFunctionMode):
    """Makes a deep copy of an object, such as a graph or a batch, hold inputs in place of its tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replaces the deep copy of a tensor by `as_input`, and runs every other operation as it is."""
        is_copy = func is Tensor.__deepcopy__ and not isinstance(args[0], nn.Parameter)
        return as_input(args[0]) if is_copy else func(*args, **(kwargs or {}))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores on exit the state that a forward may change.

    This is the global random state, the attributes of the modules, and the content of those attributes: tensors,
    arrays, containers, random generators, other modules, and objects with their own attributes, but not objects inside
    objects.
    Registered parameters and buffers are not copied: the forward must run on others.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.seen = []
        >>> with unchanged(layer):
        ...     layer.seen.append(1)
        >>> layer.seen
        []
    """
    seen = {id(one) for group in (model.parameters(), model.buffers()) for one in group}
    restoring = ExitStack()  # runs every restorer, even if one fails
    for restore in _restorers(model, seen, is_in_object=False):
        restoring.callback(restore)
    of_python = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    is_cuda_used = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if is_cuda_used else ()):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        restoring.close()


def mute_hooks(model: nn.Module) -> None:
    """Replaces the forward hooks of a model by ones that do nothing in this thread; `unchanged` restores them.

    Those of torch itself stay, since a normalised weight is computed by one.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_forward_hook(lambda *_: print("called"))
        >>> with unchanged(layer):
        ...     mute_hooks(layer)
        ...     _ = layer(torch.ones(2))
    """
    thread = threading.get_ident()

    def muted(hook: Callable[..., Any]) -> Callable[..., Any]:
        if _is_torchs(hook):
            return hook
        return lambda *args, **keywords: None if threading.get_ident() == thread else hook(*args, **keywords)

    for module in model.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[kind] = OrderedDict((number, muted(hook)) for number, hook in vars(module)[kind].items())


def _is_torchs(hook: object) -> bool:
    names = [getattr(hook, "__module__", None) or "", *(kind.__module__ for kind in type(hook).__mro__)]
    return any(name.split(".")[0] == "torch" for name in names)


def _restorers(value: Any, seen: set[int], is_in_object: bool) -> Iterator[Callable[[], object]]:
    """Yields functions that give a value the content that it has now."""
    if isinstance(value, (*_SCALARS, *_CODE)) or id(value) in seen:
        return
    seen.add(id(value))
    numpy = sys.modules.get("numpy")
    held: list[Any] = []
    if isinstance(value, Tensor):
        if not value.is_inference():
            yield partial(_restore_tensor, value, value._version, value.requires_grad, value.detach().clone())
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        if not isinstance(value, random.SystemRandom):
            yield partial(value.setstate, value.getstate())
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        yield partial(value.set_state, value.get_state())
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif numpy is not None and isinstance(value, numpy.ndarray):
        yield partial(_restore_array, value, value.copy())
    elif isinstance(value, dict):
        held += value.values()
        yield partial(_restore_table, value, dict(value))
    elif isinstance(value, (list, deque)):
        held += value
        yield partial(_restore_sequence, value, [*value])
    elif isinstance(value, set):
        yield partial(_restore_set, value, {*value})
    elif isinstance(value, tuple):
        held += value
    elif isinstance(value, nn.Module) or _is_plain_object(value, is_in_object):
        held += vars(value).values()
        is_in_object = not isinstance(value, nn.Module)
        yield partial(_restore_table, vars(value), dict(vars(value)))
    for one in held:
        yield from _restorers(one, seen, is_in_object)


def _is_plain_object(value: object, is_in_object: bool) -> bool:
    """Returns whether a value's attributes are a part of the model: trainers and the like hold everything else."""
    if is_in_object or type(value).__module__.split(".")[0] in _WITHOUT_STATE:
        return False
    try:
        return isinstance(vars(value), dict)
    except TypeError:
        return False


def _restore_tensor(tensor: Tensor, version: int, requires_grad: bool, content: Tensor) -> None:
    if tensor.requires_grad and not requires_grad:
        tensor.detach_()
    if tensor._version != version:
        tensor.detach().copy_(content)
    elif tensor.layout is torch.strided and not tensor.is_nested and 0 not in tensor.stride():
        tensor.data.copy_(content)  # batch normalisation writes without counting a version


def _restore_array(array: Any, content: Any) -> None:
    if array.flags.writeable:
        array[...] = content


def _restore_table(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    if [*map(id, table)] != [*map(id, entries)]:
        table.clear()
        table.update(entries)
    for key, value in entries.items():
        if table[key] is not value:
            table[key] = value


def _restore_sequence(several: Any, items: list[Any]) -> None:
    if len(several) != len(items) or any(a is not b for a, b in zip(several, items, strict=True)):
        several.clear()
        several.extend(items)


def _restore_set(several: set[Any], items: set[Any]) -> None:
    if several != items:
        several.clear()
        several.update(items)
