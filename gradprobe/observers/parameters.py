"""The parameters that a probe observes: each trainable one once, with all of its names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from gradprobe import ops
from gradprobe.errors import ArgumentError
from gradprobe.observers.shards import Piece, ShardedModel, local_of


@dataclass(frozen=True, slots=True)
class ObservedParameter:
    """One parameter.

    Attributes:
        name: Its first name in the model.
        names: All its names; more than one for a tied parameter.
        piece: What it says of the whole that it is a part of; the whole is mostly itself.
    """

    name: str
    names: tuple[str, ...]
    piece: Piece

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return self.piece.shape


class Layout(NamedTuple):
    """What decides how the statistics of a parameter's gradient are computed."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Returns the layout of a tensor, or of the part of it that lies on this rank."""
        local = local_of(tensor)
        return cls(local.device, local.dtype, tuple(local.shape))

    def fits(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor has this layout. Faster than comparing with `Layout.of`."""
        return tensor.dtype is self.dtype and tensor.shape == self.shape and tensor.device == self.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class ParameterPlace:
    """Where a parameter is registered. Keeps neither the module nor the parameter alive.

    Args:
        module: The module.
        name: Name of the parameter there.
        find: Returns the parameter, if something takes it out of the module for a while.
    """

    __slots__ = ("_find", "_module", "_name")

    def __init__(self, module: nn.Module, name: str, find: Callable[[], nn.Parameter | None] | None = None) -> None:
        self._module = weakref.ref(module)
        self._name = name
        self._find = find

    def parameter(self) -> nn.Parameter | None:
        """Returns the parameter that is registered there now, None if there is none."""
        if self._find is not None:
            return self._find()
        module = self._module()
        return None if module is None else module._parameters.get(self._name)


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """The parameters of a model at one moment, in model order. Keeps them alive, so it is not kept itself.

    Attributes:
        sites: One entry per distinct parameter that requires a gradient.
        parameters: The tensors, in the order of `sites`.
        places: Where each is registered under its first name, in the order of `sites`.
        frozen: The parameters that do not require a gradient, each once.
        frozen_places: Where each of these is registered.
        frozen_names: All names of these.
        unmeasured: Names of the trainable ones that the kernels refuse, e.g. those of float8_e4m3fnuz.
        triggers: Tensors whose gradients tell that a backward pass runs, besides the parameters'.
    """

    sites: tuple[ObservedParameter, ...]
    parameters: tuple[nn.Parameter, ...]
    places: tuple[ParameterPlace, ...]
    frozen: tuple[nn.Parameter, ...]
    frozen_places: tuple[ParameterPlace, ...]
    frozen_names: tuple[str, ...]
    unmeasured: tuple[str, ...]
    triggers: tuple[torch.Tensor, ...] = ()

    @property
    def are_sharded(self) -> bool:
        """Whether some of them are parts of a larger whole, by what they say themselves."""
        return any(site.piece.ranks for site in self.sites)


def find_parameters(model: nn.Module, known: Mapping[int, str] | None = None) -> ModelParameters:
    """Lists the parameters of a model, tied ones once.

    Args:
        model: Any module.
        known: Names of the parameters that are observed already, by id: they stay observed if they are frozen for a
            while.

    Returns:
        The trainable parameters, and the frozen ones.

    Raises:
        ArgumentError: The model has no parameters, none that can be observed, one without a shape yet (a lazy module),
            or one that is sharded in a way that is not supported.

    Example:
        >>> found = find_parameters(nn.Linear(3, 2))
        >>> [site.name for site in found.sites]
        ['weight', 'bias']
    """
    names_of: dict[int, list[str]] = {}
    tensor_of: dict[int, nn.Parameter] = {}
    place_of: dict[int, ParameterPlace] = {}
    piece_of: dict[int, Piece] = {}
    sharded = ShardedModel(model)
    for prefix, module in model.named_modules(remove_duplicate=False):
        registered = dict(module._parameters.items())  # a scripted module has no real dictionary
        for key in (*registered, *sharded.names(module)):
            find = sharded.place(module, key)
            parameter = registered[key] if find is None else find()
            if parameter is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ArgumentError(
                    f"model: parameter {name!r} has no shape yet (a lazy module); run one forward pass before attach"
                )
            if parameter.requires_grad and (reason := sharded.refusal(module, key, parameter)) is not None:
                raise ArgumentError(f"parameter {name!r}: {reason}")
            if id(parameter) not in tensor_of:
                tensor_of[id(parameter)] = parameter
                place_of[id(parameter)] = ParameterPlace(module, key, find)
                piece_of[id(parameter)] = sharded.piece(module, key, parameter)
            names_of.setdefault(id(parameter), []).append(name)
    if not tensor_of:
        raise ArgumentError(f"model: needed at least one parameter; {type(model).__name__} has none")
    stays = {key for key, name in (known or {}).items() if key in names_of and names_of[key][0] == name}
    trainable = [key for key, parameter in tensor_of.items() if parameter.requires_grad or key in stays]
    frozen = [key for key, parameter in tensor_of.items() if not parameter.requires_grad and key not in stays]
    refusals = {key: ops.refusal(local_of(tensor_of[key])) for key in trainable}
    observed = [key for key in trainable if refusals[key] is None]
    if not trainable:
        raise ArgumentError(
            f"model: needed at least one parameter with requires_grad=True; "
            f"all {len(tensor_of)} of {type(model).__name__} are frozen"
        )
    if not observed:
        raise ArgumentError(f"parameter {names_of[trainable[0]][0]!r}: {refusals[trainable[0]]}")
    return ModelParameters(
        sites=tuple(ObservedParameter(names_of[key][0], tuple(names_of[key]), piece_of[key]) for key in observed),
        parameters=tuple(tensor_of[key] for key in observed),
        places=tuple(place_of[key] for key in observed),
        frozen=tuple(tensor_of[key] for key in frozen),
        frozen_places=tuple(place_of[key] for key in frozen),
        frozen_names=tuple(name for key in frozen for name in names_of[key]),
        unmeasured=tuple(names_of[key][0] for key in trainable if refusals[key] is not None),
        triggers=tuple(sharded.triggers),
    )


def stepped_by(optimizer: torch.optim.Optimizer, parameters: Collection[torch.Tensor | None]) -> list[bool]:
    """Tells which parameters an optimizer steps.

    Args:
        optimizer: The optimizer.
        parameters: K parameters, None for one that is gone.

    Returns:
        For each, whether it is in a group of the optimizer. Length K.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter is not None and id(parameter) in stepped for parameter in parameters]


def is_regular(gradient: torch.Tensor, layout: Layout) -> bool:
    """Returns whether a gradient is a plain dense tensor of its parameter's layout."""
    return (
        gradient.layout is torch.strided
        and gradient.dtype is layout.dtype
        and gradient.device == layout.device
        and gradient.shape == layout.shape
        and not gradient.is_complex()
        and type(gradient) in (torch.Tensor, nn.Parameter)
    )
