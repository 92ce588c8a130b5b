"""Whether an addition joins a shortcut and a branch, and which is which."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradprobe.inline.source import Span
from gradprobe.inline.values import Input, Value

Place = tuple[str, Span]  # method, where in its source


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source.

    Attributes:
        shortcut_first: Whether the left operand is the shortcut.
        is_projected: Whether the shortcut passes layers too.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".
    """

    shortcut_first: bool
    is_projected: bool
    written: str = "+"


def judge(left: Value, right: Value, module: int = 0) -> Addition | str | None:
    """Tells whether `left + right` is residual.

    Args:
        left: The left operand.
        right: The right operand.
        module: Id of the module that adds.

    Returns:
        The addition; the reason why it cannot be told; or None where it is of another kind.

    Example:
        >>> judge(Value({"x": 0}), Value({"x": 3}))
        Addition(shortcut_first=True, is_projected=False, written='+')
        >>> judge(Value({"x": 0}), Value({"position": 0})) is None
        True
    """
    pairs = [
        (left.layers_from[origin], right.layers_from[origin]) for origin in left.layers_from & right.layers_from.keys()
    ]
    if not pairs:
        return _of_two_inputs(left, right, module)
    left_is_bare, right_is_bare = (any(a == 0 < b for a, b in pairs), any(b == 0 < a for a, b in pairs))
    if left_is_bare != right_is_bare:
        return Addition(left_is_bare, False)
    if left_is_bare:
        return "either operand may be the shortcut"
    nearest = min(pairs, key=sum)
    few, many = sorted(nearest)
    if few == many:
        return None
    if 2 * few > many:
        return f"its operands pass {nearest[0]} and {nearest[1]} layers: neither is clearly the shortcut"
    return Addition(nearest[0] < nearest[1], True)


def _of_two_inputs(left: Value, right: Value, module: int) -> str | None:
    """Gives the reason where an untouched input is added to what layers made of another."""
    for bare, other in ((left, right), (right, left)):
        names = [name for name in _inputs(bare, module) if not re.search("mask|bias|pos|alibi", name)]
        others = [name for name, layers in _inputs(other, module).items() if layers]
        if names and others and not any(bare.layers_from.values()):
            return (
                f"adds its input {names[0]} to what it makes of {others[0]}: only a caller knows if one is a shortcut"
            )
    return None


def _inputs(value: Value, module: int) -> dict[str, int]:
    return {o.name: n for o, n in value.layers_from.items() if isinstance(o, Input) and o.module == module}
