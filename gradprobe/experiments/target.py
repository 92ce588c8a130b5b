"""Finds what ``MODULE:CALLABLE`` names, the way users name their code on the command line, and runs it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from gradprobe.errors import ArgumentError, GradprobeError
from gradprobe.text.words import split_target

T = TypeVar("T")

_loaded: dict[Path, ModuleType] = {}  # files that were run: several targets may be in one


@dataclass(frozen=True)
class Found:
    """What a target names, with the literal arguments that the target gives."""

    value: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


def find(argument: str, target: str) -> Found:
    """Imports the module of a target and looks its name up.

    Args:
        argument: Name of the argument that holds the target, for messages.
        target: ``MODULE:NAME`` or ``FILE.py:NAME``; NAME may be dotted and have literal arguments, as in ``a.b(1)``.

    Returns:
        The object; it is not called.

    Raises:
        ArgumentError: The target is malformed or does not exist, or its module raises an exception.

    Example:
        >>> found = find("model", "torch.nn:Linear(2, 3)")
        >>> found.value.__name__, found.arguments
        ('Linear', (2, 3))
    """
    place, call = split_target(target)
    if not (place and call.strip()):
        raise ArgumentError(f"{argument}: needed MODULE:CALLABLE or FILE.py:CALLABLE, got {target!r}")
    names, arguments, keywords = parse_call(argument, call, target)
    value: Any = _import(argument, target, place)
    for name in names:
        if not hasattr(value, name):
            raise ArgumentError(f"{argument}: {place} has no {'.'.join(names)}, got {target!r}")
        value = getattr(value, name)
    return Found(value, tuple(arguments), keywords)


def parse_call(argument: str, call: str, whole: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Splits ``a.b(1, c=2)`` into names, arguments and keywords without running any of it.

    Args:
        argument: Name of the argument that holds the call, for messages.
        call: The call; its arguments must be literals.
        whole: The argument's value, of which the call is a part.

    Returns:
        Names, arguments and keywords.

    Raises:
        ArgumentError: It is no such call.
    """
    try:
        node = ast.parse(call.strip(), mode="eval").body
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            arguments = [ast.literal_eval(one) for one in node.args]
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
            if len(keywords) < len(node.keywords):
                raise ValueError("** is not a literal")
            node = node.func
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError("not a name")
    except (SyntaxError, ValueError) as error:
        inside = "" if call == whole else f" in {whole!r}"
        raise ArgumentError(
            f"{argument}: needed a name, with literal arguments if any, got {call!r}{inside}"
        ) from error
    return [node.id, *names], arguments, keywords


def run_user_code(argument: str, target: str, run: Callable[[], T]) -> T:
    """Runs the user's code and turns an exception from it into an `ArgumentError` that names argument and target."""
    try:
        return run()
    except GradprobeError:
        raise
    except Exception as error:
        raise ArgumentError(f"{argument}: {target} raised {type(error).__name__}: {error}") from error


def _import(argument: str, target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        # A console script does not search the working directory for modules by itself.
        if "" not in sys.path:
            sys.path.insert(0, "")
        return run_user_code(argument, target, lambda: importlib.import_module(place))
    path = Path(place).expanduser().resolve()
    if path in _loaded:
        return _loaded[path]
    if not path.is_file():
        raise ArgumentError(f"{argument}: there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{argument}: {place} cannot be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    run_user_code(argument, target, lambda: loader.exec_module(module))
    _loaded[path] = module
    return module
