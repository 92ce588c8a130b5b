"""Finds an optimizer of ``torch.optim`` by name, and makes it as a recipe says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradprobe.errors import ArgumentError, not_among
from gradprobe.experiments.sgd import Sgd
from gradprobe.experiments.target import parse_call, run_user_code

_PAPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@cache
def _classes() -> dict[str, type[Optimizer]]:
    found = {
        name.lower(): one
        for name, one in vars(torch.optim).items()
        if inspect.isclass(one) and issubclass(one, Optimizer) and one is not Optimizer
    }
    # The sweep calls step without a closure, and its gradients are dense.
    return {name: one for name, one in sorted(found.items()) if name not in ("lbfgs", "sparseadam")}


def parse(optimizer: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """Reads a name with options, as in ``adamw(betas=(0.9, 0.95))``.

    Args:
        optimizer: Name of a class of ``torch.optim``, in any case, with literal keyword arguments if any.

    Returns:
        The class and the options.

    Raises:
        ArgumentError: There is no such optimizer, or it has no such option, or an option that the recipe records is no
            number.

    Example:
        >>> parse("SGD(nesterov=True)")
        (<class 'torch.optim.sgd.SGD'>, {'nesterov': True})
    """
    names, arguments, options = parse_call("optimizer", optimizer, optimizer)
    known = _classes()
    if len(names) != 1 or names[0].lower() not in known:
        raise not_among("optimizer", optimizer, known)
    cls = known[names[0].lower()]
    allowed = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr")]
    if "lr" in options:
        raise ArgumentError(f"optimizer: needed the learning rate in --lr, got {optimizer!r}")
    if arguments or not set(options) <= set(allowed):
        raise ArgumentError(f"optimizer: needed keyword arguments among {', '.join(allowed)}, got {optimizer!r}")
    for name in _PAPER:
        value = options.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentError(f"optimizer: needed a number for {name}, got {value!r} in {optimizer!r}")
    return cls, options


@dataclass(frozen=True)
class Defaults:
    """Settings that an optimizer has unless others are asked for; 0 for one that it does not have."""

    learning_rate: float
    momentum: float
    weight_decay: float


def defaults(optimizer: str) -> Defaults:
    """Returns the settings of the paper for SGD, those of torch for any other optimizer; options come first.

    Source:
        He et al. 2015, section 4.2.

    Example:
        >>> defaults("sgd"), defaults("adamw(weight_decay=0.1)")
        (Defaults(learning_rate=0.1, momentum=0.9, weight_decay=0.0001),
         Defaults(learning_rate=0.001, momentum=0.0, weight_decay=0.1))
    """
    cls, options = parse(optimizer)
    torchs = {name: one.default for name, one in inspect.signature(cls).parameters.items()}
    settings = {**torchs, **(_PAPER if cls is torch.optim.SGD else {}), **options}
    return Defaults(*(float(settings.get(name, 0.0)) for name in _PAPER))


def make(
    optimizer: str, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Makes an optimizer; on a GPU one whose steps can be captured as a CUDA graph, if there is such.

    Args:
        optimizer: Name and options, for `parse`.
        parameters: What it updates.
        learning_rate: Its initial learning rate.
        momentum: Its momentum, if it has one.
        weight_decay: Its weight decay, if it has one.

    Returns:
        The optimizer.

    Raises:
        ArgumentError: It rejects an option or the parameters.
    """
    cls, options = parse(optimizer)
    known = inspect.signature(cls).parameters
    parameters = list(parameters)
    settings: dict[str, Any] = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    if all(parameter.is_cuda for parameter in parameters):
        settings["capturable"] = True
    settings = {name: value for name, value in settings.items() if name in known}
    build: Callable[..., Optimizer] = cls
    if cls is torch.optim.SGD:
        build = Sgd  # the same numbers without the import of Dynamo
        if all(parameter.is_cpu for parameter in parameters) and not options.keys() & {"foreach", "differentiable"}:
            settings["fused"] = True  # one call for all parameters: a third faster
    made = run_user_code("optimizer", optimizer, lambda: build(parameters, **{**settings, **options}))
    if "capturable" in settings:
        made._warned_capturable_if_run_uncaptured = True  # the first steps never run in a graph
    return made


def check_learning_rate(rate: float) -> None:
    """Raises an `ArgumentError` if a learning rate is not a positive number."""
    if not math.isfinite(rate) or rate <= 0:
        raise ArgumentError(f"lr: needed a number above 0, got {rate!r}")
