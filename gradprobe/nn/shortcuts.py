"""Whether an addition joins a shortcut and a branch, and which is which."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

from gradprobe.nn.inline.known import is_no_stream
from gradprobe.nn.inline.values import Input, Path, Value


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source.

    Attributes:
        shortcut_first: Whether the left operand is the shortcut.
        is_projected: Whether the shortcut passes layers too, or what may be some.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".
    """

    shortcut_first: bool
    is_projected: bool
    written: str = "+"


def judge(left: Value, right: Value, module: int = 0, since: int = 0) -> Addition | str | None:
    """Tells whether `left + right` is residual.

    Args:
        left: The left operand.
        right: The right operand.
        module: Id of the module that adds.
        since: The first of the tensors that are made in it.

    Returns:
        The addition; the reason why it cannot be told; or None where it is of another kind.

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
            return None  # what they have in common is nearer than what one of them may be, as in a gated mixture
    # a projection is of what the module has, not of a condition that all modules of a net are handed
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
    """Tells whether one operand passes nothing that the other one does not pass too."""
    near, far = sorted([a, b])
    return near.layers == 0 and (near.layers, near.opaque) < (far.layers, far.opaque)


def _of_paths(a: Path, b: Path) -> Addition | str | None:
    """Judges the two ways from a tensor to both operands."""
    near, far = sorted([a, b])
    if _is_bare(a, b):
        return Addition(near is a, near.opaque > 0)
    if near.layers == far.layers:
        return None
    if 2 * near.layers > far.layers:
        return f"its operands pass {a.layers} and {b.layers} layers: neither is clearly the shortcut"
    is_projection = far.bends > near.bends  # otherwise two branches are joined, as an adapter to its layer
    return Addition(near is a, True) if is_projection else None


def _of_two_inputs(left: Value, right: Value, module: int) -> str | None:
    """Gives the reason where an untouched input is added to another one, or to what layers made of it."""
    for bare, other in ((left, right), (right, left)):
        names, others = _inputs(bare, module), _inputs(other, module)
        is_bare = not any(path.layers for path in names.values())
        if is_bare and names and others and not names.keys() & others.keys():
            a, b = next(iter(names)), next(iter(others))
            what = f"its input {a} to what it makes of {b}" if others[b].layers else f"its inputs {a} and {b}"
            return f"adds {what}: only a caller knows if one is a shortcut"
    return None


def _inputs(value: Value, module: int) -> dict[str, Path]:
    paths = {o.name: path for o, path in value.paths.items() if isinstance(o, Input) and o.module == module}
    return {
        name: path for name, path in paths.items() if not is_no_stream(name) and not re.search("pos|alibi|emb", name)
    }
