"""Values of a method as far as they are known without running it, and how operations combine them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from gradprobe.nn.inline.known import ACTIVATIONS
from gradprobe.nn.shortcuts import Path, Value

NO_LAYER = Path()


NOTHING = Value()
NEW = itertools.count()  # numbers for tensors of unknown origin


def joined(values: Iterable[Value]) -> Value:
    """Returns the union of values: a value that may be any of them, or contains them.

    Args:
        values: Any number of values.

    Returns:
        Their union.

    Example:
        >>> sorted(joined([Value({"x": Path(2)}), Value({"x": Path(), "y": Path()})]).paths)
        ['x', 'y']
    """
    several = [*{id(value): value for value in values if value is not NOTHING}.values()]
    if len(several) < 2:
        return several[0] if several else NOTHING
    paths: dict[Hashable, Path] = {}
    for value in several:
        for origin, path in value.paths.items():
            paths[origin] = min(path, paths.get(origin, path))
    return Value(
        paths,
        tuple({id(module): module for value in several for module in value.modules}.values()),
        next((value.method for value in several if value.method), None),
        next((value.held for value in several if value.held is not None), None),
        frozenset().union(*(value.sums for value in several)),
        all(value.is_sequence for value in several),
        all(value.is_outputs for value in several),
    )


def made_from(values: Iterable[Value], path: Path = NO_LAYER) -> Value:
    """Returns the result of an operation; a new tensor for each call if the operation has layers.

    Args:
        values: The operands.
        path: The operation.

    Returns:
        The result.

    Example:
        >>> made = made_from([Value({"x": Path(1)})], Path(layers=2))
        >>> [path.layers for path in made.paths.values()]
        [3, 0]
    """
    operands = joined(Value(value.paths, sums=value.sums) for value in values if value.paths)
    if path == NO_LAYER:
        return operands
    paths = {origin: before.then(path) for origin, before in operands.paths.items()}
    if path.layers or path.opaque:
        paths[next(NEW)] = Path()
    return Value(paths, sums=frozenset() if path.layers else operands.sums)


def described(held: object) -> Value:
    """Returns the value for an object that exists before the model runs.

    Args:
        held: Any object.

    Returns:
        Its value, with the modules in it if it is a list, tuple or dict.

    Example:
        >>> described([nn.ReLU(), None]).modules
        (ReLU(),)
    """
    if isinstance(held, torch.Tensor):
        return Value({("tensor", id(held)): Path()})
    if isinstance(held, nn.Module):
        return Value(modules=(held,))
    if isinstance(held, functools.partial):
        inner = described(held.func)
        return inner if inner.modules else Value(held=held)
    if isinstance(held, MethodType) and isinstance(held.__self__, nn.Module):
        is_own = getattr(type(held.__self__), held.__name__, None) is held.__func__
        return Value(modules=(held.__self__,), method=held.__name__) if is_own else Value(held=held)
    if isinstance(held, (list, tuple, dict)):
        items = held.values() if isinstance(held, dict) else held
        return Value(modules=tuple(item for item in items if isinstance(item, nn.Module)))
    return Value(held=held)


def attribute(module: nn.Module, name: str) -> object:
    """Reads an attribute of a module without running any of its code.

    Args:
        module: Any module.
        name: Name of a child, parameter, buffer, method or other attribute of the module or its class.

    Returns:
        The attribute; functions, properties and other descriptors as stored in the class.

    Raises:
        AttributeError: There is no such attribute.

    Example:
        >>> attribute(nn.Linear(2, 3), "out_features")
        3
    """
    state = vars(module)
    for held in (state, state["_parameters"], state["_buffers"], state["_modules"]):
        if name in held:
            return held[name]
    for owner in type(module).__mro__:
        if name in vars(owner):
            return vars(owner)[name]
    raise AttributeError(name)


def path_through(modules: Iterable[nn.Module]) -> Path:
    """Returns the path through modules, treating everything in them as one chain.

    Args:
        modules: Any modules.

    Returns:
        The number of modules with parameters of their own, and of activations.

    Example:
        >>> path_through([nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.BatchNorm2d(4)])
        Path(layers=2, opaque=0, bends=1, gates=0)
    """
    every = [inner for module in modules for inner in module.modules()]
    layers = sum(any(parameter is not None for parameter in inner._parameters.values()) for inner in every)
    return Path(layers, bends=sum(map(_bends, map(type, every))))


@functools.cache
def _bends(kind: Any) -> bool:
    """Returns whether a module class is an activation or calls one in its forward."""
    if kind.__module__.rpartition(".")[2] in ("activation", "activations", "rnn"):
        return True
    code = getattr(kind.forward, "__code__", None)
    return code is not None and any(name in ACTIVATIONS or "attention" in name for name in code.co_names)


def is_chain(module: nn.Module) -> bool:
    """Returns whether a module only runs its children one after another, by the forward of `Sequential`.

    Example:
        >>> is_chain(nn.Sequential())
        True
    """
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_torchs_layer(module: nn.Module) -> bool:
    """Returns whether a module is a torch module without children: a layer, an activation and the like.

    Example:
        >>> is_torchs_layer(nn.Linear(2, 2)), is_torchs_layer(nn.TransformerEncoderLayer(2, 1))
        (True, False)
    """
    return type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())


def is_container(module: nn.Module) -> bool:
    """Returns whether a module is a sequence, list or dictionary of modules, whose children callers iterate over.

    Example:
        >>> is_container(nn.Sequential())
        True
    """
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def is_lookup(module: nn.Module) -> bool:
    """Returns whether a module is an embedding, through which no gradient reaches its argument.

    Example:
        >>> is_lookup(nn.Embedding(2, 2))
        True
    """
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))
