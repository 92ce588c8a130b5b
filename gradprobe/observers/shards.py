"""What each parameter of a model says about the whole that it is a part of: DTensor, FSDP1, FSDP2."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

# `torch.distributed` takes long to import and is not needed to look at the parameters of other models.


_PLAIN = (torch.Tensor, nn.Parameter)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the part of a tensor that lies on this rank: of a DTensor its local tensor, otherwise the tensor itself.

    Waits for a tensor that a collective is writing. Unlike `DTensor.to_local`, this adds no node to the graph.
    """
    if type(tensor) in _PLAIN:
        return tensor
    local = getattr(tensor, "_local_tensor", tensor)
    if hasattr(local, "trigger_wait"):
        local = local.trigger_wait()
    return local if isinstance(local, torch.Tensor) else tensor


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a DTensor."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def partial_dims(tensor: torch.Tensor) -> tuple[int, ...]:
    """Returns the dimensions of a DTensor's mesh over which its values still have to be added up."""
    placements = getattr(tensor, "placements", ())
    return tuple(dim for dim, placement in enumerate(placements) if placement.is_partial())


@dataclass(frozen=True, slots=True)
class Piece:
    """What is known of the whole parameter.

    Attributes:
        shape: Shape of the whole.
        ranks: Ranks that hold the whole between them, in order; empty if the parameter does not say.
        n_padding: Number of zeros at the end of a flat parameter of FSDP1 that are no elements of it.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    n_padding: int = 0


class Shared(NamedTuple):
    """What the ranks tell each other in one step besides their rows.

    Attributes:
        smallest: Smallest factor by which some gradients changed since they were measured, 0-d or a number.
        largest: Largest of them.
        skipped: Non-zero if the optimizer's step is skipped, on some rank once they have told each other.
    """

    smallest: torch.Tensor | float = math.inf
    largest: torch.Tensor | float = -math.inf
    skipped: torch.Tensor | float = 0.0


class ShardedModel:
    """The parameters of a model that FSDP manages, which it takes out of their modules for a while.

    Attributes:
        triggers: Flat parameters of FSDP1: their gradients tell when a backward pass runs, those of their parts do not.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.triggers: list[torch.Tensor] = []
        self._places: dict[int, dict[str, tuple[Callable[[], nn.Parameter | None], Piece | None]]] = {}  # by module
        for module in model.modules():
            state = getattr(module, "_get_fsdp_state", None)
            if state is not None:
                for parameter in _fsdp2_parameters(state()):
                    self._add_fsdp2(parameter)
            handle = getattr(module, "_handle", None)
            if handle is not None and hasattr(handle, "flat_param"):
                self._add_fsdp1(handle)

    def place(self, module: nn.Module, name: str) -> Callable[[], nn.Parameter | None] | None:
        """Returns what returns the sharded parameter that belongs at a place, None if FSDP does not manage it."""
        found = self._places.get(id(module), {}).get(name)
        return None if found is None else found[0]

    def piece(self, module: nn.Module, name: str, parameter: torch.Tensor) -> Piece:
        """Returns what is known of the whole of a parameter."""
        found = self._places.get(id(module), {}).get(name)
        if found is not None and found[1] is not None:
            return found[1]
        if is_dtensor(parameter):
            return Piece(tuple(parameter.shape), _root_ranks(parameter))
        return Piece(tuple(parameter.shape))

    def refusal(self, module: nn.Module, name: str, parameter: torch.Tensor) -> str | None:
        """Says why the whole of a parameter cannot be measured: what was needed and what was given; None if it can."""
        marks = parameter.__dict__
        is_part = marks.get("_is_flat_param") is not None or marks.get("_fsdp_flattened") is not None
        if is_part and name not in self._places.get(id(module), {}):
            return (
                "needed the whole FullyShardedDataParallel module, got the module inside it, which does not know how "
                "its parameters are sharded; attach to the one around it"
            )
        for placement in getattr(parameter, "placements", ()):
            if not (placement.is_replicate() or placement.is_shard() or type(placement).__name__ == "_StridedShard"):
                return f"needed the placements Replicate or Shard, got {placement}"
        return None

    def names(self, module: nn.Module) -> Iterator[str]:
        """Yields the names of the parameters that belong to a module and that FSDP has taken out of it."""
        for name in self._places.get(id(module), {}):
            if module._parameters.get(name) is None:
                yield name

    def _add_fsdp2(self, managed: Any) -> None:
        find = _finder(managed, lambda alive: alive.sharded_param)
        info = managed._module_info
        places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
        for module, name in places:
            self._put(module, name, find, None)

    def _add_fsdp1(self, handle: Any) -> None:
        flat = handle.flat_param
        ranks = _ranks_of(handle.process_group)
        if flat.requires_grad:
            self.triggers.append(flat)
        if not handle._use_orig_params:
            owner = handle._fully_sharded_module
            numel = flat._unpadded_unsharded_size.numel()
            n_padding = len(ranks) * flat._sharded_size.numel() - numel if handle.uses_sharded_strategy else 0
            find = _finder(handle, lambda alive: alive.flat_param)
            self._put(owner, "_flat_param", find, Piece((numel,), ranks, n_padding))
            return
        for k, (info, shape) in enumerate(zip(flat._param_infos, flat._shapes, strict=True)):
            find = _finder(handle, partial(_flattened_part, k))
            self._put(info.module, info.param_name, find, Piece(tuple(shape), ranks))
        for info in flat._shared_param_infos:
            self._put(info.module, info.param_name, *self._places[id(info.prim_module)][info.prim_param_name])

    def _put(self, module: nn.Module, name: str, find: Callable[[], nn.Parameter | None], piece: Piece | None) -> None:
        self._places.setdefault(id(module), {})[name] = find, piece


def _ranks_of(group: Any) -> tuple[int, ...]:
    try:
        return tuple(torch.distributed.get_process_group_ranks(group))
    except (KeyError, ValueError):  # it has been destroyed, and nothing is reduced any more
        return tuple(range(group.size()))


def _finder(owner: Any, get: Callable[[Any], nn.Parameter]) -> Callable[[], nn.Parameter | None]:
    """Returns what gets a parameter from its owner as long as that is alive, without keeping it alive."""
    reference = weakref.ref(owner)

    def find() -> nn.Parameter | None:
        alive = reference()
        return None if alive is None else get(alive)

    return find


def _flattened_part(k: int, handle: Any) -> nn.Parameter:
    parameter: nn.Parameter = handle.flat_param._params[k]
    return parameter


def _fsdp2_parameters(state: Any) -> Iterator[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            yield from group.fsdp_params


def _root_ranks(parameter: Any) -> tuple[int, ...]:
    """Returns the ranks of the mesh from which a DTensor's mesh was cut."""
    mesh = parameter.device_mesh
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    return tuple(sorted(root.mesh.flatten().tolist()))
