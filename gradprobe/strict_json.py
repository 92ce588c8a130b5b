"""JSON has no NaN and no infinity; everything that this package writes as JSON names them instead."""

from __future__ import annotations

import math


def strict(value: object) -> object:
    """Replaces the floats that JSON cannot hold by their names, which `float()` reads back.

    Args:
        value: Anything made of dicts, lists, tuples and plain values.

    Returns:
        The same, as dicts with text keys and lists, with "nan", "inf" and "-inf" for such floats.

    Example:
        >>> strict({"norms": (1.0, math.inf)})
        {'norms': [1.0, 'inf']}
    """
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
