"""Decides whether an addition joins a shortcut and a branch, and which operand is the shortcut."""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from gradprobe.nn.inline.known import is_no_stream
from gradprobe.nn.rewrite import Place


class Input(NamedTuple):
    """A tensor argument of a module's forward.

    Attributes:
        module: Id of the module.
        name: Name of the argument.
    """

    module: int
    name: str


class Path(NamedTuple):
    """The operations on the shortest way from one tensor to another.

    Attributes:
        layers: Number of layers: modules with parameters of their own, and functions such as `linear` or `matmul`.
        opaque: Number of calls whose code cannot be analysed and may contain layers.
        bends: Number of activations.
        gates: Number of products with other tensors.
    """

    layers: int = 0
    opaque: int = 0
    bends: int = 0
    gates: int = 0

    def then(self, path: Path) -> Path:
        """Appends another path.

        Example:
            >>> Path(layers=1).then(Path(layers=2, bends=1))
            Path(layers=3, opaque=0, bends=1, gates=0)
        """
        return Path(*map(operator.add, self, path))


@dataclass(frozen=True)
class Value:
    """A value in a method: the tensors it was made from, and the modules or other object it may be.

    Attributes:
        paths: Tensors that it was made from, including itself, and the path from each.
        modules: Modules that it may be or contain.
        method: The method of those modules that it is, if so.
        held: Any other object that it is: a function, a class, a package.
        sums: Additions whose result it is, with no layer in between.
        is_sequence: Whether it is a tuple or a list.
        is_outputs: Whether it is an object of several outputs: the code reads an attribute that tensors lack.
    """

    paths: Mapping[Hashable, Path] = field(default_factory=dict)
    modules: tuple[nn.Module, ...] = ()
    method: str | None = None
    held: object = None
    sums: frozenset[Place] = frozenset()
    is_sequence: bool = False
    is_outputs: bool = False


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source.

    Attributes:
        shortcut_first: Whether the left operand is the shortcut.
        is_projected: Whether the shortcut contains layers too, or calls that may.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".
    """

    shortcut_first: bool
    is_projected: bool
    written: str = "+"


def judge(left: Value, right: Value, module: int = 0, since: int = 0) -> Addition | str | None:
    """Decides whether `left + right` is residual.

    Args:
        left: The left operand.
        right: The right operand.
        module: Id of the module that adds.
        since: Number of the first tensor created in that module.

    Returns:
        The addition; a reason if it cannot be decided; None if the addition is not residual.

    Example:
        >>> judge(Value({"x": Path()}), Value({"x": Path(layers=3)}))
        Addition(shortcut_first=True, is_projected=False, written='+')
        >>> judge(Value({"x": Path()}), Value({"position": Path()})) is None
        True
    """
    common = {origin: (path, right.paths[origin]) for origin, path in left.paths.items() if origin in right.paths}
    bare = [pair for pair in common.values() if _is_bare(*pair)]
    pure = [pair for pair in bare if min(pair).opaque == 0 == min(pair).gates]
    if bare and not pure:
        nearest = min(map(_reach, bare))
        if any(a.layers == b.layers and _reach((a, b)) < nearest for a, b in common.values()):
            return None  # both operands are nearer to another common tensor, the gate of a gated mixture
    # only the module's own tensors count for a projection, not a condition that every module of the network gets
    own = [pair for origin, pair in common.items() if _is_own(origin, module, since)]
    pairs = pure or bare or own
    least = min(map(_reach, pairs), default=0)
    if least == 0 and not bare:
        return _of_two_inputs(left, right, module)
    verdicts = {_of_paths(*pair) for pair in pairs if _reach(pair) == least}
    return verdicts.pop() if len(verdicts) == 1 else "either operand may be the shortcut"


def _is_own(origin: Hashable, module: int, since: int) -> bool:
    return origin.module == module if isinstance(origin, Input) else not isinstance(origin, int) or origin >= since


def _reach(pair: tuple[Path, Path]) -> int:
    return pair[0].layers + pair[1].layers


def _is_bare(a: Path, b: Path) -> bool:
    """Returns whether one of two paths has no layer and fewer operations than the other."""
    near, far = sorted([a, b])
    return near.layers == 0 and (near.layers, near.opaque) < (far.layers, far.opaque)


def _of_paths(a: Path, b: Path) -> Addition | str | None:
    """Decides from the paths of one tensor to both operands."""
    near, far = sorted([a, b])
    if _is_bare(a, b):
        return Addition(near is a, near.opaque > 0)
    if near.layers == far.layers:
        return None
    if 2 * near.layers > far.layers:
        return f"its operands come through {a.layers} and {b.layers} layers: neither is clearly the shortcut"
    is_projection = far.bends > near.bends  # otherwise it joins two branches, such as a layer and its adapter
    return Addition(near is a, True) if is_projection else None


def _of_two_inputs(left: Value, right: Value, module: int) -> str | None:
    """Returns the reason if an unchanged input is added to another input or to a tensor made from one."""
    for bare, other in ((left, right), (right, left)):
        names, others = _inputs(bare, module), _inputs(other, module)
        is_bare = not any(path.layers for path in names.values())
        if is_bare and names and others and not names.keys() & others.keys():
            a, b = next(iter(names)), next(iter(others))
            what = f"its input {a} to a tensor made from {b}" if others[b].layers else f"its inputs {a} and {b}"
            return f"adds {what}: only the caller knows whether one is the shortcut"
    return None


def _inputs(value: Value, module: int) -> dict[str, Path]:
    paths = {o.name: path for o, path in value.paths.items() if isinstance(o, Input) and o.module == module}
    return {
        name: path for name, path in paths.items() if not is_no_stream(name) and not re.search("pos|alibi|emb", name)
    }
