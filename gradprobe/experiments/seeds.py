"""Which numbers are seeds: those that every generator in use takes, and the file of a sweep too."""

from __future__ import annotations

from collections.abc import Iterable

from gradprobe.errors import ArgumentError


def check_seeds(name: str, seeds: Iterable[int]) -> None:
    """Refuses what is no seed.

    Args:
        name: of the argument.
        seeds: what came.

    Raises:
        ArgumentError: one is not a whole number from 0 to 2^32 - 1.

    Example:
        >>> check_seeds("seeds", [0, 2**32 - 1])
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"{name}: needed a whole number from 0 to 2^32 - 1, got {seed!r}")
