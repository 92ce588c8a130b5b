"""Decides whether an addition joins a shortcut and a branch, and which operand is the shortcut."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


class Path(NamedTuple):
    """The operations on the shortest way from one tensor to another.

    Attributes:
        layers: Number of layers: operations that apply parameters, or mix elements as a matrix product does.
        bends: Number of activations.
        gates: Number of products with other tensors.
    """

    layers: int = 0
    bends: int = 0
    gates: int = 0

    def then(self, path: Path) -> Path:
        """Appends another path.

        Example:
            >>> Path(layers=1).then(Path(layers=2, bends=1))
            Path(layers=3, bends=1, gates=0)
        """
        return Path(*map(operator.add, self, path))


# The tensors that one was made from, itself included, and the path from each. A number stands for a tensor that is not
# of the module that adds.
Origins: TypeAlias = Mapping[Hashable, Path]


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source.

    Attributes:
        shortcut_first: Whether the left operand is the shortcut.
        is_projected: Whether the shortcut contains layers too.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".
        branch: Name of the last child module in the branch, "" if there is none.
    """

    shortcut_first: bool
    is_projected: bool
    written: str = "+"
    branch: str = ""


def judge(left: Origins, right: Origins) -> Addition | str | None:
    """Decides whether `left + right` is residual.

    Args:
        left: Origins of the left operand.
        right: Origins of the right operand.

    Returns:
        The addition; a reason if it cannot be decided; None if the addition is not residual.

    Example:
        >>> judge({"x": Path()}, {"x": Path(layers=3)})
        Addition(shortcut_first=True, is_projected=False, written='+', branch='')
        >>> judge({"x": Path()}, {"position": Path()}) is None
        True
    """
    common = {origin: (path, right[origin]) for origin, path in left.items() if origin in right}
    bare = [pair for pair in common.values() if _is_bare(*pair)]
    pure = [pair for pair in bare if min(pair).gates == 0]
    if bare and not pure:
        nearest = min(map(_reach, bare))
        if any(a.layers == b.layers and _reach((a, b)) < nearest for a, b in common.values()):
            return None  # both operands are nearer to another common tensor, the gate of a gated mixture
    # only the module's own tensors count for a projection, not a condition that every module of the network gets
    own = [pair for origin, pair in common.items() if not isinstance(origin, int)]
    pairs = pure or bare or own
    least = min(map(_reach, pairs), default=0)
    if least == 0 and not bare:
        return None
    verdicts = {_of_paths(*pair) for pair in pairs if _reach(pair) == least}
    return verdicts.pop() if len(verdicts) == 1 else "either operand may be the shortcut"


def _reach(pair: tuple[Path, Path]) -> int:
    return pair[0].layers + pair[1].layers


def _is_bare(a: Path, b: Path) -> bool:
    """Returns whether one of two paths has no layer and the other has one."""
    near, far = sorted([a, b])
    return near.layers == 0 < far.layers


def _of_paths(a: Path, b: Path) -> Addition | str | None:
    """Decides from the paths of one tensor to both operands."""
    near, far = sorted([a, b])
    if near.layers == far.layers:
        return None
    if near.layers == 0:
        return Addition(near is a, False)
    if 2 * near.layers > far.layers:
        return f"its operands come through {a.layers} and {b.layers} layers: neither is clearly the shortcut"
    is_projection = far.bends > near.bends  # otherwise it joins two branches, such as a layer and its adapter
    return Addition(near is a, True) if is_projection else None
