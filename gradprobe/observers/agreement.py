"""What ranks that hold parts of one model agree on at attach: which parameters there are, and in how many copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from gradprobe.errors import ArgumentError
from gradprobe.observers.meeting import Part, meet
from gradprobe.observers.parameters import Layout, ObservedParameter
from gradprobe.observers.shards import is_dtensor, local_of
from gradprobe.ops.transfer import to_device
from gradprobe.snapshot.records import IntArray

ProcessGroups: TypeAlias = Literal["local"] | dist.ProcessGroup | Mapping[str, dist.ProcessGroup] | None

# A process group of ours for each list of ranks, and the world in which it was made: a GPU keeps buffers for each.
_made: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}
WIDE = (torch.float64, torch.complex128)  # their sums of squares may need an exponent
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by bytes of an element


@dataclass(frozen=True, slots=True)
class Agreement:
    """The K parameters that the ranks hold together, the same on every rank.

    Attributes:
        group: The ranks.
        device: Where their rows are reduced.
        names: Names of the parameters.
        ndims: Number of dimensions of each. Length K.
        is_wide: Some are float64, whose sums may need an exponent.
        numels: Number of elements of each whole. [K]
        held: Number of elements that the ranks hold together, copies and padding included. [K]
        padding: Number of these that are padding. [K]
        copies: Number of copies of each whole. [K]
        is_copied: Whether each copy lies on one rank. [K]
    """

    group: dist.ProcessGroup
    device: torch.device
    names: tuple[str, ...]
    ndims: tuple[int, ...]
    is_wide: bool
    numels: IntArray
    held: IntArray
    padding: IntArray
    copies: IntArray
    is_copied: npt.NDArray[np.bool_]


def participants(
    sites: Sequence[ObservedParameter], process_group: ProcessGroups, reduces_signals: bool = False
) -> tuple[tuple[int, ...], list[int]] | None:
    """Tells which ranks hold the whole gradients of a model between them.

    Args:
        sites: The parameters of this rank.
        process_group: As for `attach`.
        reduces_signals: All ranks have something to reduce, even if each holds all parameters.

    Returns:
        The ranks, in order; and for each parameter the number of ranks whose tensors are the pieces of a whole, 0 if
        the parameter tells itself. None if nothing is to be reduced.

    Raises:
        ArgumentError: This rank is not in a group.
    """
    if process_group == "local":
        return None
    are_named = isinstance(process_group, Mapping)
    groups = process_group if isinstance(process_group, Mapping) else {"*": process_group}
    sizes, found = [], {site.piece.ranks for site in sites if site.piece.ranks}
    for site in sites:
        group = next((group for pattern, group in groups.items() if fnmatchcase(site.name, pattern)), None)
        if group is None or (site.piece.ranks and not are_named):
            sizes.append(0)
            continue
        ranks = tuple(sorted(dist.get_process_group_ranks(group)))
        sizes.append(len(ranks))
        found.add(ranks)
    for group in groups.values():
        if group is not None and dist.get_rank(group) < 0:
            raise ArgumentError(f"process_group: needed a group of this rank, {dist.get_rank()}; it is in none of it")
    if not found and reduces_signals and dist.is_initialized():
        found.add(tuple(range(dist.get_world_size())))
    if not found:
        return None
    widest = max(found, key=len)
    if not all(set(ranks) <= set(widest) for ranks in found):
        widest = tuple(range(dist.get_world_size()))
    return widest, sizes


def agree(
    sites: Sequence[ObservedParameter],
    parameters: Sequence[torch.Tensor | None],
    group_sizes: Sequence[int],
    ranks: Sequence[int],
    options: dict[str, object],
) -> Agreement:
    """Meets the other ranks. Takes a few collectives after all have come.

    Args:
        sites: The parameters of this rank.
        parameters: The same as tensors.
        group_sizes: For each, the number of ranks whose tensors are the pieces of a whole, 0 if its piece tells.
        ranks: The ranks that take part.
        options: Options of `attach` that must be the same on all.

    Raises:
        ArgumentError: The ranks do not agree, some are missing, or what they hold makes up no whole.
    """
    tensors = [parameter for parameter in parameters if parameter is not None]
    layouts = [Layout.of(tensor) for tensor in tensors]
    device = next((layout.device for layout in layouts if layout.device.type != "cpu"), layouts[0].device)
    parts = meet(
        ranks,
        {**options, "device": device.type},
        [
            Part(site.name, layout.shape if size else site.shape, size, layout.dtype in WIDE, site.piece.n_padding)
            for site, layout, size in zip(sites, layouts, group_sizes, strict=True)
        ],
    )
    group = _communicator(ranks)
    device = _device_of(group, device)
    names = tuple(part.name for part in parts)
    position = {name: k for k, name in enumerate(names)}
    slots = [position[site.name] for site in sites]

    held = np.zeros((2, len(parts)), dtype=np.int64)  # elements, and ranks that have some
    held[0, slots] = [layout.numel for layout in layouts]
    held[1] = held[0] > 0
    on_device = to_device(torch.from_numpy(held), device)
    dist.all_reduce(on_device, group=group)
    elements, holders = on_device.cpu().numpy()
    padding = np.array([part.n_padding for part in parts], dtype=np.int64)
    sizes = np.array([part.group_size for part in parts], dtype=np.int64)
    stated = np.array([math.prod(part.shape) for part in parts], dtype=np.int64)
    numels = np.where(sizes > 0, elements * sizes // len(ranks), stated)
    padded = np.maximum(numels + padding, 1)
    for k in np.flatnonzero(elements % padded):
        raise ArgumentError(
            f"parameter {names[k]!r}: needed pieces that make up whole copies of it, got {elements[k]} elements on "
            f"{len(ranks)} ranks of a whole of {numels[k]}"
        )
    copies = np.maximum(elements // padded, 1)
    agreement = Agreement(
        group,
        device,
        names,
        tuple(len(part.shape) for part in parts),
        any(part.is_wide for part in parts),
        numels,
        elements,
        padding * copies,
        copies,
        (copies > 1) & (holders == copies),
    )
    _compare_copies(agreement, dict(zip(slots, tensors, strict=True)), sizes, len(ranks))
    return agreement


def _compare_copies(agreement: Agreement, tensors: Mapping[int, torch.Tensor], sizes: IntArray, n_ranks: int) -> None:
    """Raises if DTensors that look like copies of one have different values: experts of which a mesh does not know.

    Args:
        agreement: What the ranks hold.
        tensors: The parameters of this rank, by position.
        sizes: For each parameter, the number of ranks whose tensors are the pieces of a whole, or 0. [K]
        n_ranks: Number of ranks.
    """
    compared = (agreement.copies > 1) & (sizes == 0)
    if not compared.any():
        return
    sums = torch.zeros(len(compared), dtype=torch.int64, device=agreement.device)
    is_here = torch.zeros(len(compared), dtype=torch.bool, device=agreement.device)
    over: dict[tuple[Any, int], list[int]] = {}  # mesh and dimension -> parameters sharded over it
    for k, tensor in tensors.items():
        # the others claim no layout: plain copies that differ are a finding
        if not compared[k] or not is_dtensor(tensor):
            continue
        values = local_of(tensor).detach()
        if values.layout is not torch.strided:
            continue
        integers = values.contiguous().view(-1).view(_INTEGERS[values.element_size()])
        sums[k] = integers.sum(dtype=torch.int64).to(agreement.device)
        is_here[k] = True
        sharded: Any = tensor
        for dim, placement in enumerate(getattr(sharded, "placements", ())):
            if not placement.is_replicate():
                over.setdefault((sharded.device_mesh, dim), []).append(k)
    for (mesh, dim), chosen in over.items():
        part = sums[chosen]
        dist.all_reduce(part, group=mesh.get_group(dim))
        sums[chosen] = part
    lowest = torch.iinfo(torch.int64).min
    ends = torch.stack((torch.where(is_here, sums, lowest), torch.where(is_here, -sums, lowest)))
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=agreement.group)
    high, low = ends.cpu().numpy()
    for differing in np.flatnonzero((high != lowest) & (high != -low)):
        n_copies, numel = agreement.copies[differing], agreement.numels[differing]
        raise ArgumentError(
            f"parameter {agreement.names[differing]!r}: needed pieces or equal copies of one tensor, got {n_copies} "
            f"different ones of {numel} elements on {n_ranks} ranks. If they are pieces of a whole, such "
            "as experts, name their group: process_group={'*experts*': group}; if not, the copies have drifted apart"
        )


def _communicator(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Returns a process group of these ranks, which all of them ask for."""
    if len(ranks) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    world, group = _made.get(tuple(ranks), (None, None))
    if group is None or world is not dist.group.WORLD:
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        _made[tuple(ranks)] = dist.group.WORLD, group
    return group


def _device_of(group: dist.ProcessGroup, preferred: torch.device) -> torch.device:
    """Returns a device on which a group can reduce, the preferred one if possible."""
    kinds = {device.type for device in group._device_types}
    if preferred.type in kinds or not kinds:
        return preferred
    kind = next(iter(sorted(kinds, reverse=True)))
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
