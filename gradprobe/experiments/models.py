"""Builds the network of a cell: one of `gradprobe.networks`, or what a user's function returns for a depth."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe import networks
from gradprobe.errors import ArgumentError, not_among
from gradprobe.experiments.data import Dataset, channels_last
from gradprobe.experiments.target import find, run_user_code


def is_user_model(family: str) -> bool:
    """Returns whether a family is a user's function, ``MODULE:CALLABLE`` or ``FILE.py:CALLABLE``."""
    return ":" in family


def build(
    family: str, depth: int, data: Dataset, norm: networks.Norm = "batch", init: networks.Init = "he"
) -> nn.Module:
    """Builds a network from torch's global random generator.

    A user's function is called with the depth, and with those of `in_channels`, `image_size` (a pair if the images are
    not square), `in_features`, and `num_classes` or `n_classes` that it has a parameter for. Literal arguments in the
    family, as in ``my:net(width=32)``, come first.

    Args:
        family: One of `gradprobe.networks.FAMILIES`, or ``MODULE:CALLABLE``.
        depth: Depth; `gradprobe.networks` says which depths its families have.
        data: The data set, whose sizes the network must fit.
        norm: Normalisation of ``"plain"`` and ``"resnet"``.
        init: Initialisation of ``"plain"`` and ``"resnet"``.

    Returns:
        The network.

    Raises:
        ArgumentError: The family or the depth is unknown, the data do not suit it, or the user's function raises an
            exception or returns no network.
    """
    if is_user_model(family):
        return _build_user_model(family, depth, data)
    if family not in networks.BUILDERS:
        raise not_among("families", family, networks.FAMILIES, "one or more of")
    if data.train_x.ndim != 4:
        raise ArgumentError(
            f"families: {family} needs images, got features of shape {list(data.train_x.shape)}; use --model"
        )
    options: dict[str, Any] = {"in_channels": data.in_channels, "num_classes": data.num_classes}
    if family in networks.NORMALISED_FAMILIES:
        options |= {"norm": norm, "init": init}
    elif family in networks.TRANSFORMERS:
        options["image_size"] = min(data.train_x.shape[2:])
    return networks.BUILDERS[family](depth, **options)


def check(family: str, depth: int, model: nn.Module, data: Dataset) -> None:
    """Checks that a user's network maps inputs to one logit per class, and that its weights can be trained.

    Raises:
        ArgumentError: It raises an exception, returns something else, or has no weight that the logits depend on.
    """
    if not is_user_model(family):
        return
    name = f"{family} of depth {depth}"
    with torch.random.fork_rng(devices=[]):
        logits = run_user_code("model", name, lambda: _evaluated(model, data))
    needed = [len(data.train_x[:2]), data.num_classes]
    if not isinstance(logits, Tensor) or list(logits.shape) != needed:
        got = (
            f"shape {list(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"an object of type {type(logits).__name__}"
        )
        raise ArgumentError(f"model: needed logits of shape {needed} for {needed[0]} examples; {name} returned {got}")
    if not run_user_code("model", name, lambda: trained_weights(family, model, data)):
        raise ArgumentError(f"model: needed weights that can be trained; {name} has none")


def trained_weights(family: str, model: nn.Module, data: Dataset) -> dict[str, int]:
    """Returns the weights that the loss depends on, in the network's order: parameters of more than one dimension.

    A user's network may have weights that are frozen or unused; they would be read as gradients that vanish.

    Returns:
        Number of elements by name.
    """
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    if is_user_model(family) and weights:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            loss = F.cross_entropy(_evaluated(model, data), data.train_y[:2])
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        weights = {name: p for (name, p), g in zip(weights.items(), gradients, strict=True) if g is not None}
    return {name: parameter.numel() for name, parameter in weights.items()}


def _evaluated(model: nn.Module, data: Dataset) -> Any:
    training = model.training
    try:
        return model.eval()(channels_last(data.train_x[:2]))
    finally:
        model.train(training)


def _build_user_model(family: str, depth: int, data: Dataset) -> nn.Module:
    found = find("model", family)
    shape = data.train_x.shape[1:]
    given: dict[str, Any] = {
        "num_classes": data.num_classes,
        "n_classes": data.num_classes,
        "in_features": shape.numel(),
    }
    if len(shape) == 3:
        given["in_channels"] = shape[0]
        given["image_size"] = shape[1] if shape[1] == shape[2] else tuple(shape[1:])
    if not callable(found.value) or isinstance(found.value, nn.Module):
        raise ArgumentError(
            f"model: needed a function or class that builds a network of a given depth; {family} is of type "
            f"{type(found.value).__name__}"
        )
    arguments, keywords = _arguments(family, found.value, found.arguments, found.keywords, {"depth": depth, **given})
    model = run_user_code("model", f"{family} of depth {depth}", lambda: found.value(*arguments, **keywords))
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model: needed a torch.nn.Module; {family} of depth {depth} returned an object of type "
            f"{type(model).__name__}"
        )
    return model


def _arguments(
    family: str, build: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds what the function has parameters for: by name, and the depth to its first free parameter otherwise."""
    try:
        signature = inspect.signature(build)
        bound = signature.bind_partial(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"model: {family} cannot be called with the arguments given: {error}") from error
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = {name: one for name, one in signature.parameters.items() if name not in bound.arguments}
    added = {name: given[name] for name, one in free.items() if one.kind in named and name in given}
    if "depth" not in free:
        first = next((name for name, one in free.items() if one.kind in named and name not in given), None)
        if first is None:
            raise ArgumentError(f"model: {family} needs a parameter for the depth, has {signature}")
        added[first] = given["depth"]
    required = [
        name
        for name, one in free.items()
        if one.kind in named and one.default is inspect.Parameter.empty and name not in added
    ]
    if required:
        raise ArgumentError(
            f"model: {family} needs {', '.join(required)}; the sweep gives {', '.join(given)}; give the rest in the "
            f"target, as in {family.partition('(')[0]}({required[0]}=…)"
        )
    return arguments, {**keywords, **added}
