"""Reads ``MODULE:CALLABLE``, the way users name a model on the command line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from gradprobe.errors import ArgumentError, GradprobeError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


def load_model(target: str) -> nn.Module:
    """Builds the model that a target names, with torch's seed set to 0 so that a check can be repeated.

    Args:
        target: ``MODULE:CALLABLE`` or ``FILE.py:CALLABLE``; CALLABLE is a model, or a dotted name of something that
            returns one, with literal arguments if any.

    Returns:
        The model.

    Raises:
        ArgumentError: The target is malformed, does not exist, raises an exception or is not a model.

    Example:
        >>> load_model("torch.nn:Linear(2, 3)")
        Linear(in_features=2, out_features=3, bias=True)
    """
    import torch
    from torch import nn

    place, separator, call = target.partition(":")
    if not (place and separator and call.strip()):
        raise ArgumentError(f"target: needed MODULE:CALLABLE or FILE.py:CALLABLE, got {target!r}")
    names, arguments, keywords = _parse_call(target, call)
    torch.manual_seed(0)
    found: Any = _import(target, place)
    for name in names:
        if not hasattr(found, name):
            raise ArgumentError(f"target: {place} has no {'.'.join(names)}, got {target!r}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ArgumentError(
                f"target: needed a model or a callable that returns one; {target} is of type {type(found).__name__}"
            )
        found = _run_users(target, lambda: found(*arguments, **keywords))
    if not isinstance(found, nn.Module):
        raise ArgumentError(
            f"target: needed a torch.nn.Module; {target} returned an object of type {type(found).__name__}"
        )
    return found


def _parse_call(target: str, call: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Splits ``a.b(1, c=2)`` into names, arguments and keywords without running any of it."""
    try:
        node = ast.parse(call.strip(), mode="eval").body
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            arguments = [ast.literal_eval(argument) for argument in node.args]
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
        raise ArgumentError(
            f"target: needed a name, with literal arguments if any, got {call!r} in {target!r}"
        ) from error
    return [node.id, *names], arguments, keywords


def _import(target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        # A console script does not search the working directory for modules by itself.
        sys.path.insert(0, "")
        return _run_users(target, lambda: importlib.import_module(place))
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ArgumentError(f"target: there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"target: {place} cannot be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    _run_users(target, lambda: loader.exec_module(module))
    return module


def _run_users(target: str, run: Callable[[], T]) -> T:
    """Runs the user's code and turns an exception from it into an `ArgumentError` that names the target."""
    try:
        return run()
    except GradprobeError:
        raise
    except Exception as error:
        raise ArgumentError(f"target: {target} raised {type(error).__name__}: {error}") from error
