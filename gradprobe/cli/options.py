"""Parts of the command line that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from gradprobe.errors import ArgumentError

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def listed(option: str, text: str, read: Callable[[str], T]) -> list[T]:
    """Parses ``a,b,c``.

    Args:
        option: Name of the option, for messages.
        text: Its value.
        read: Reads one element: int or str.

    Returns:
        The elements.

    Raises:
        ArgumentError: There is none, or one cannot be read.

    Example:
        >>> listed("--depths", "20, 56", int)
        [20, 56]
    """
    kind = "whole numbers" if read is int else "names"
    try:
        values = [read(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ArgumentError(f"{option}: needed comma-separated {kind}, got {text!r}") from error
    if not values:
        raise ArgumentError(f"{option}: needed comma-separated {kind}, got {text!r}")
    return values
