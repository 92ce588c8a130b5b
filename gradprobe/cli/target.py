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

_loaded: dict[Path, ModuleType] = {}  # files that were run: the model and its batch may be in one


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
    from torch import nn

    needed = "a model or a callable that returns one"
    found = _load("target", target, needed, lambda value: isinstance(value, nn.Module))
    if not isinstance(found, nn.Module):
        raise ArgumentError(
            f"target: needed a torch.nn.Module; {target} returned an object of type {type(found).__name__}"
        )
    return found


def load_batch(target: str) -> tuple[Any, Callable[[Any], Any] | None]:
    """Calls the function that a target names, with torch's seed set to 0, to get a batch and maybe a loss.

    Args:
        target: ``MODULE:CALLABLE`` or ``FILE.py:CALLABLE``, as for `load_model`. CALLABLE returns the inputs of the
            model, or a pair of them and the loss, a function of the model's output.

    Returns:
        The inputs, and the loss or None.

    Raises:
        ArgumentError: The target is malformed, does not exist, is not callable, raises an exception or returns None.

    Example:
        >>> load_batch("torch:ones(2, 3)")[0].shape
        torch.Size([2, 3])
    """
    from torch import nn

    found = _load("--batch", target, "a callable that returns a batch", lambda value: False)
    if found is None:
        raise ArgumentError(f"--batch: needed a batch; {target} returned None")
    if isinstance(found, tuple) and len(found) == 2 and callable(found[1]):
        is_batch = hasattr(found[1], "to") and not isinstance(found[1], nn.Module)  # a batch of graphs is callable
        if not is_batch:
            return found[0], found[1]
    return found, None


def _load(argument: str, target: str, needed: str, is_result: Callable[[Any], bool]) -> Any:
    """Finds what a target names and calls it, unless it is a result already."""
    import torch

    place, separator, call = target.partition(":")
    if not (place and separator and call.strip()):
        raise ArgumentError(f"{argument}: needed MODULE:CALLABLE or FILE.py:CALLABLE, got {target!r}")
    names, arguments, keywords = _parse_call(argument, target, call)
    torch.manual_seed(0)
    found: Any = _import(argument, target, place)
    for name in names:
        if not hasattr(found, name):
            raise ArgumentError(f"{argument}: {place} has no {'.'.join(names)}, got {target!r}")
        found = getattr(found, name)
    if is_result(found):
        return found
    if not callable(found):
        raise ArgumentError(f"{argument}: needed {needed}; {target} is of type {type(found).__name__}")
    return _run_users(argument, target, lambda: found(*arguments, **keywords))


def _parse_call(argument: str, target: str, call: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Splits ``a.b(1, c=2)`` into names, arguments and keywords without running any of it."""
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
        raise ArgumentError(
            f"{argument}: needed a name, with literal arguments if any, got {call!r} in {target!r}"
        ) from error
    return [node.id, *names], arguments, keywords


def _import(argument: str, target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        # A console script does not search the working directory for modules by itself.
        sys.path.insert(0, "")
        return _run_users(argument, target, lambda: importlib.import_module(place))
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
    _run_users(argument, target, lambda: loader.exec_module(module))
    _loaded[path] = module
    return module


def _run_users(argument: str, target: str, run: Callable[[], T]) -> T:
    """Runs the user's code and turns an exception from it into an `ArgumentError` that names argument and target."""
    try:
        return run()
    except GradprobeError:
        raise
    except Exception as error:
        raise ArgumentError(f"{argument}: {target} raised {type(error).__name__}: {error}") from error
