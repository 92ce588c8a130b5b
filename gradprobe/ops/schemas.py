"""The operators as torch knows them: schema, fake, autograd and the reference kernel, each defined once for all.

`torch.ops.gradprobe.grad_stats_into` and `torch.ops.gradprobe.scale_` work under `torch.compile` and on every device:
where no compiled or Triton kernel is registered for a device, dispatch ends at the reference. `count_if` has the CUDA
kernels that this thread launches ask a flag, int32 on their device, when they run: where it is 0 they take no
statistics, also in a graph that is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradprobe.ops import reference
from gradprobe.ops.autograd import count_writes
from gradprobe.ops.rows import STATS

SCHEMAS = (
    "grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()",
    "scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()",
    "count_if(Tensor flag, bool on) -> ()",
)
Kernel = Callable[[Sequence[Tensor], Tensor], None]


def _fake_grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    torch._check(
        out.dim() == 2 and out.shape[0] == len(tensors) and out.shape[1] == len(STATS),
        lambda: f"out: needed shape [{len(tensors)}, {len(STATS)}], got {list(out.shape)}",
    )


def _fake_scale(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    torch._check(
        coefficient.numel() == 1, lambda: f"coefficient: needed one element, got shape {list(coefficient.shape)}"
    )


def _ask_nothing(flag: Tensor, on: bool) -> None:
    """What a device without CUDA graphs has to do."""


def register(library: torch.library.Library, grad_stats_into: Kernel, scale_: Kernel) -> None:
    """Gives the operators of a library all but their kernels for a device.

    Args:
        library: defines `SCHEMAS`.
        grad_stats_into: what runs where no kernel is registered for the device of the tensors.
        scale_: likewise.

    Example:
        >>> library = torch.library.Library("gradprobe_example", "DEF")
        >>> for schema in SCHEMAS:
        ...     _ = library.define(schema)
        >>> register(library, reference.grad_stats_into, reference.scale_)
    """
    for name, fake, kernel in (
        ("grad_stats_into", _fake_grad_stats_into, grad_stats_into),
        ("scale_", _fake_scale, scale_),
    ):
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        # They are measurements and updates, not functions to differentiate: autograd lets them through.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    count_writes(library, "scale_")
    torch.library.register_fake(f"{library.ns}::count_if", _ask_nothing, lib=library)
    library.impl("count_if", _ask_nothing, "CompositeExplicitAutograd")


_library = torch.library.Library("gradprobe", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
register(_library, reference.grad_stats_into, reference.scale_)

GRAD_STATS_INTO = torch.ops.gradprobe.grad_stats_into.default
SCALE = torch.ops.gradprobe.scale_.default
COUNT_IF = torch.ops.gradprobe.count_if.default
