"""Prints results, as tables or as JSON, and loads the optional drawing modules."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from rich.console import Console, ConsoleRenderable, RenderableType

from gradprobe.errors import GradprobeError, WorkerTraceback, printable

# Columns of the output if it does not go to a terminal.
PLAIN_WIDTH = 120


class Result(ConsoleRenderable, Protocol):
    """A result that prints as a table and converts to plain data."""

    def as_dict(self) -> Mapping[str, object]:
        """Returns the result as plain data."""


def show(result: Result, as_json: bool) -> None:
    """Prints a result as JSON or as a table."""
    if as_json:
        print_json(result.as_dict())
    else:
        print_table(result)


def print_table(renderable: RenderableType) -> None:
    """Prints anything that rich can render."""
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(renderable)


def print_error(error: GradprobeError) -> None:
    """Prints an error in one line on stderr.

    The traceback of a training that failed in another process precedes it: the fault may be in the user's code.
    """
    if isinstance(error.__cause__, WorkerTraceback):
        print(*map(printable, str(error.__cause__).splitlines()), sep="\n", file=sys.stderr)
    print(f"gradprobe: {printable(' '.join(str(error).split()))}", file=sys.stderr)


def print_json(value: object) -> None:
    """Prints plain data as strict JSON."""
    from gradprobe.snapshot.export import strict

    print(json.dumps(strict(value), indent=2, allow_nan=False))


def drawing_module(option: str, module: str) -> ModuleType:
    """Imports a module that draws; raises a GradprobeError that names the option if a library is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise GradprobeError(f"{option}: {error.name} is not installed; pip install 'gradprobe[report]'") from error
