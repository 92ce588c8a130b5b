"""The parameters that a probe observes: each trainable one once, with all of its names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradprobe.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class ObservedParameter:
    """One trainable parameter.

    Attributes:
        name: Its first name in the model.
        names: All its names; more than one for a tied parameter.
        shape: Its shape.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ObservedParameters:
    """The parameters of a model, in model order.

    Attributes:
        sites: One entry per distinct parameter that requires a gradient.
        parameters: The tensors, in the order of `sites`.
        frozen: Names of the parameters that do not require a gradient.
    """

    sites: tuple[ObservedParameter, ...]
    parameters: tuple[nn.Parameter, ...]
    frozen: tuple[str, ...]


def find_parameters(model: nn.Module) -> ObservedParameters:
    """Lists the trainable parameters of a model, tied ones once.

    Args:
        model: Any module.

    Returns:
        The trainable parameters, and the names of the frozen ones.

    Raises:
        ArgumentError: The model has no parameters, only frozen ones, or one without a shape yet (a lazy module).

    Example:
        >>> found = find_parameters(nn.Linear(3, 2))
        >>> [site.name for site in found.sites]
        ['weight', 'bias']
    """
    names_of: dict[int, list[str]] = {}
    tensor_of: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ArgumentError(
                f"model: parameter {name!r} has no shape yet (a lazy module); run one forward pass before attach"
            )
        names_of.setdefault(id(parameter), []).append(name)
        tensor_of[id(parameter)] = parameter
    if not tensor_of:
        raise ArgumentError(f"model: needed at least one parameter; {type(model).__name__} has none")
    trainable = [key for key, parameter in tensor_of.items() if parameter.requires_grad]
    frozen = tuple(name for key, names in names_of.items() if not tensor_of[key].requires_grad for name in names)
    if not trainable:
        raise ArgumentError(
            f"model: needed at least one parameter with requires_grad=True; "
            f"all {len(tensor_of)} of {type(model).__name__} are frozen"
        )
    sites = tuple(
        ObservedParameter(names_of[key][0], tuple(names_of[key]), tuple(tensor_of[key].shape)) for key in trainable
    )
    return ObservedParameters(sites, tuple(tensor_of[key] for key in trainable), frozen)


def unstepped_parameters(optimizer: torch.optim.Optimizer, found: ObservedParameters) -> tuple[str, ...]:
    """Lists the parameters that an optimizer does not step.

    Args:
        optimizer: The optimizer.
        found: The parameters.

    Returns:
        First names of the parameters in none of its groups, in model order.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return tuple(
        site.name for site, parameter in zip(found.sites, found.parameters, strict=True) if id(parameter) not in stepped
    )


def newly_trainable(model: nn.Module, known: ObservedParameters) -> tuple[str, ...]:
    """Lists the parameters that require a gradient now and were frozen or absent when `known` was made.

    Args:
        model: The model that `known` was made from.
        known: The earlier result of `find_parameters`.

    Returns:
        The names, in model order.
    """
    held = {id(parameter) for parameter in known.parameters}
    return tuple(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and id(parameter) not in held
    )


def is_regular(gradient: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Returns whether a gradient is a plain dense tensor of its parameter's dtype and device."""
    return (
        gradient.layout is torch.strided
        and gradient.dtype is parameter.dtype
        and gradient.device == parameter.device
        and not gradient.is_complex()
        and type(gradient) in (torch.Tensor, nn.Parameter)
    )
