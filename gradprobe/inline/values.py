"""What is known of a value without running anything: the tensors it was made from, the modules it may be."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn


class Input(NamedTuple):
    """An argument of a module's forward, as a tensor that others are made from."""

    module: int
    name: str


@dataclass(frozen=True)
class Value:
    """A value in a method.

    Attributes:
        layers_from: Tensors that it was made from, itself included, and the least number of layers in between.
        modules: Modules that it may be.
        method: Method of the module itself that it is.
        is_parameter: Whether it is a parameter.
        sums: Additions that it is the result of, through no layer.
    """

    layers_from: Mapping[Hashable, int] = field(default_factory=dict)
    modules: tuple[nn.Module, ...] = ()
    method: str | None = None
    is_parameter: bool = False
    sums: frozenset[Hashable] = frozenset()


NOTHING = Value()
NEW = itertools.count()  # tensors that nothing else is known of


def joined(values: Iterable[Value]) -> Value:
    """Describes what may be any of several values, or holds them.

    Args:
        values: Any number.

    Returns:
        Their union.

    Example:
        >>> joined([Value({"x": 2}), Value({"x": 0, "y": 1})]).layers_from
        {'x': 0, 'y': 1}
    """
    several = [value for value in values if value is not NOTHING]
    if len(several) == 1:
        return several[0]
    layers_from: dict[Hashable, int] = {}
    for value in several:
        for origin, layers in value.layers_from.items():
            layers_from[origin] = min(layers, layers_from.get(origin, layers))
    return Value(
        layers_from,
        tuple({id(module): module for value in several for module in value.modules}.values()),
        next((value.method for value in several if value.method), None),
        any(value.is_parameter for value in several),
        frozenset().union(*(value.sums for value in several)),
    )


def made_from(values: Iterable[Value], layers: int = 0) -> Value:
    """Describes the result of an operation, each time that it is done as another one.

    Args:
        values: Its operands.
        layers: Number of layers that it passes; an operand that is a parameter counts as one.

    Returns:
        The result.

    Example:
        >>> made = made_from([Value({"x": 1})], layers=2)
        >>> made.layers_from["x"], sorted(made.layers_from.values())
        (3, [0, 3])
    """
    several = list(values)
    operands = joined(replace(value, modules=(), method=None) for value in several)
    layers += any(value.is_parameter for value in several)
    if not layers:
        return operands if operands.layers_from else NOTHING
    return Value({**{origin: passed + layers for origin, passed in operands.layers_from.items()}, next(NEW): 0})


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


def n_layers(module: nn.Module) -> int:
    """Counts the modules with parameters of their own in a module.

    Args:
        module: Any module.

    Returns:
        Their number.

    Example:
        >>> n_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)))
        2
    """
    return sum(any(p is not None for p in inner._parameters.values()) for inner in module.modules())


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
