"""What is known of a value without running anything: the tensors it was made from, the modules it may be."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from gradprobe.nn.inline.known import ACTIVATIONS
from gradprobe.nn.rewrite import Place


class Input(NamedTuple):
    """An argument of a module's forward, as a tensor that others are made from."""

    module: int
    name: str


class Path(NamedTuple):
    """The shortest way by which one tensor was made from another.

    Attributes:
        layers: Number of layers on it: modules with parameters of their own, and functions like `linear` or `matmul`.
        opaque: Number of calls of what cannot be looked into, and may have layers.
        bends: Number of activations on it.
        gates: Number of products with other tensors on it.
    """

    layers: int = 0
    opaque: int = 0
    bends: int = 0
    gates: int = 0

    def then(self, path: Path) -> Path:
        """Goes on by another way.

        Args:
            path: The other.

        Returns:
            Both.

        Example:
            >>> Path(layers=1).then(Path(layers=2, bends=1))
            Path(layers=3, opaque=0, bends=1, gates=0)
        """
        return Path(*map(operator.add, self, path))


NO_LAYER = Path()


@dataclass(frozen=True)
class Value:
    """A value in a method.

    Attributes:
        paths: Tensors that it was made from, itself included, and how.
        modules: Modules that it may be, or hold.
        method: Method of those modules that it is.
        held: Another object that it is: a function, a class, a package.
        sums: Additions that it is the result of, through no layer.
        is_sequence: Whether it is a tuple or a list.
        is_outputs: Whether it is used as what holds several outputs is.
    """

    paths: Mapping[Hashable, Path] = field(default_factory=dict)
    modules: tuple[nn.Module, ...] = ()
    method: str | None = None
    held: object = None
    sums: frozenset[Place] = frozenset()
    is_sequence: bool = False
    is_outputs: bool = False


NOTHING = Value()
NEW = itertools.count()  # tensors that nothing else is known of


def joined(values: Iterable[Value]) -> Value:
    """Describes what may be any of several values, or holds them.

    Args:
        values: Any number.

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
    """Describes the result of an operation, each time that it is done as another one.

    Args:
        values: Its operands.
        path: What it passes.

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
    """Describes an object that is there before the model runs.

    Args:
        held: Anything.

    Returns:
        What it is, or the modules in it.

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
    """Reads an attribute of a module without running any code of it.

    Args:
        module: Any module.
        name: Of a child, a parameter, a buffer, a method, or whatever else the module or its class holds.

    Returns:
        What is there; functions, properties and the like as the class holds them.

    Raises:
        AttributeError: There is nothing.

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
    """Counts what a tensor passes in modules, everything in them taken as one chain.

    Args:
        modules: Any modules.

    Returns:
        The number of modules with parameters of their own, and of those that bend.

    Example:
        >>> path_through([nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.BatchNorm2d(4)])
        Path(layers=2, opaque=0, bends=1, gates=0)
    """
    every = [inner for module in modules for inner in module.modules()]
    layers = sum(any(parameter is not None for parameter in inner._parameters.values()) for inner in every)
    return Path(layers, bends=sum(map(_bends, map(type, every))))


@functools.cache
def _bends(kind: Any) -> bool:
    """Tells whether a class is an activation, or names one in its forward."""
    if kind.__module__.rpartition(".")[2] in ("activation", "activations", "rnn"):
        return True
    code = getattr(kind.forward, "__code__", None)
    return code is not None and any(name in ACTIVATIONS or "attention" in name for name in code.co_names)


def is_chain(module: nn.Module) -> bool:
    """Tells whether a module does nothing but run its children one after another.

    Args:
        module: Any module.

    Returns:
        True for `Sequential` and for what inherits its forward.

    Example:
        >>> is_chain(nn.Sequential())
        True
    """
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_torchs_layer(module: nn.Module) -> bool:
    """Tells whether a module is one of torch's that holds no others.

    Args:
        module: Any module.

    Returns:
        True for layers, activations and the like.

    Example:
        >>> is_torchs_layer(nn.Linear(2, 2)), is_torchs_layer(nn.TransformerEncoderLayer(2, 1))
        (True, False)
    """
    return type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())


def is_container(module: nn.Module) -> bool:
    """Tells whether a module's children are found by going through them, so that one more would be met too.

    Args:
        module: Any module.

    Returns:
        True for sequences, lists and dictionaries of modules.

    Example:
        >>> is_container(nn.Sequential())
        True
    """
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def is_lookup(module: nn.Module) -> bool:
    """Tells whether a module looks rows up, so that no gradient reaches its argument.

    Args:
        module: Any module.

    Returns:
        True for embeddings.

    Example:
        >>> is_lookup(nn.Embedding(2, 2))
        True
    """
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def is_tensor(value: object) -> bool:
    """Tells whether a value is a tensor.

    Args:
        value: Anything.

    Returns:
        True for tensors and parameters.

    Example:
        >>> is_tensor(3)
        False
    """
    return isinstance(value, torch.Tensor)
