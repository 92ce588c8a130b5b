"""Builds the model, or makes the batch, that ``MODULE:CALLABLE`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradprobe.errors import ArgumentError
from gradprobe.experiments.target import find, run_user_code

if TYPE_CHECKING:
    from torch import nn


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

    torch.manual_seed(0)
    found = find(argument, target)
    if is_result(found.value):
        return found.value
    if not callable(found.value):
        raise ArgumentError(f"{argument}: needed {needed}; {target} is of type {type(found.value).__name__}")
    return run_user_code(argument, target, lambda: found.value(*found.arguments, **found.keywords))
