# torch.library is untyped.
# mypy: disable-error-code="no-untyped-call"
"""The operators as torch knows them: schema, fake, autograd and the reference kernel, each defined once for all.

`torch.ops.gradprobe.grad_stats_into` and `torch.ops.gradprobe.scale_` work under `torch.compile` and on every device:
where no compiled or Triton kernel is registered for a device, dispatch ends at the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gradprobe.ops import reference
from gradprobe.ops.reference import STATS

library = torch.library.Library("gradprobe", "DEF")
for schema in (
    "grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()",
    "scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()",
):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

GRAD_STATS_INTO = torch.ops.gradprobe.grad_stats_into.default
SCALE = torch.ops.gradprobe.scale_.default


def _fake_grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    torch._check(
        out.dim() == 2 and out.shape[0] == len(tensors) and out.shape[1] == len(STATS),
        lambda: f"out: needed shape [{len(tensors)}, {len(STATS)}], got {list(out.shape)}",
    )


def _fake_scale(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    torch._check(
        coefficient.numel() == 1, lambda: f"coefficient: needed one element, got shape {list(coefficient.shape)}"
    )


# A kernel of the stable ABI cannot tell autograd that it wrote into a tensor, so that happens here, before it runs.
def _versioned_grad_stats_into(keyset: torch._C.DispatchKeySet, tensors: Sequence[Tensor], out: Tensor) -> None:
    increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        GRAD_STATS_INTO.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, out)


def _versioned_scale(keyset: torch._C.DispatchKeySet, tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    increment_version(tensors)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        SCALE.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, coefficient)


torch.library.register_fake("gradprobe::grad_stats_into", _fake_grad_stats_into, lib=library)
torch.library.register_fake("gradprobe::scale_", _fake_scale, lib=library)
library.impl("grad_stats_into", reference.grad_stats_into, "CompositeExplicitAutograd")
library.impl("scale_", reference.scale_, "CompositeExplicitAutograd")
library.impl("grad_stats_into", _versioned_grad_stats_into, "ADInplaceOrView", with_keyset=True)
library.impl("scale_", _versioned_scale, "ADInplaceOrView", with_keyset=True)
# They are measurements and updates, not functions to differentiate: autograd lets them through.
library.impl("grad_stats_into", torch.library.fallthrough_kernel, "Autograd")
library.impl("scale_", torch.library.fallthrough_kernel, "Autograd")
