"""The operators: six statistics of each tensor in one pass, multi-tensor scaling, residual adds.

Public names are loaded on first use: `gradprobe.ops.rows`, the layout of a row, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradprobe.ops.dispatch import Backend, backends, resolve
    from gradprobe.ops.reference import FLOAT_DTYPES
    from gradprobe.ops.row_math import merge_rows, norms, true_rows
    from gradprobe.ops.rows import STATS
    from gradprobe.ops.statistics import counting_if, dense_values, grad_stats, grad_stats_into, refusal, scale_

_HOMES = {
    "reference": ("FLOAT_DTYPES",),
    "dispatch": ("Backend", "backends", "resolve"),
    "row_math": ("merge_rows", "norms", "true_rows"),
    "rows": ("STATS",),
    "statistics": ("counting_if", "dense_values", "grad_stats", "grad_stats_into", "refusal", "scale_"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "FLOAT_DTYPES",
    "STATS",
    "Backend",
    "backends",
    "counting_if",
    "dense_values",
    "grad_stats",
    "grad_stats_into",
    "merge_rows",
    "norms",
    "refusal",
    "resolve",
    "scale_",
    "true_rows",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gradprobe.ops' has no attribute {name!r}")
    value: object = getattr(import_module(f"gradprobe.ops.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
