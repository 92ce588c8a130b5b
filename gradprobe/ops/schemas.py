"""Defines the operators: all schemas, fakes and registrations.

The operators work under `torch.compile` and on every device: a device without C++, CUDA or Triton kernels runs the
reference. `count_if` sets a flag (int32, on the device) that CUDA kernels launched by this thread read when they run:
if it is 0 they skip the statistics, even if a CUDA graph replays them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradprobe.ops import batch_norm_reference, libraries, reference, residual_reference
from gradprobe.ops.autograd import Normalised, ResidualSum, autograd_kernel, backward_kernel, masked_by
from gradprobe.ops.residual_reference import check_operands
from gradprobe.ops.row_math import empty_rows
from gradprobe.ops.rows import N_MAGNITUDES, STATS
from gradprobe.ops.triton import launcher as triton_launcher

SCHEMAS = (
    "grad_stats_into(Tensor[] tensors, Tensor(a!) out) -> ()",
    "magnitudes_into(Tensor[] tensors, Tensor(a!) out) -> ()",
    "scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()",
    "clip_coefficient(Tensor rows, float max_norm) -> Tensor",
    "count_if(Tensor flag, bool on) -> ()",
    "residual_add(Tensor x, Tensor f, bool relu) -> Tensor",
    "residual_add_backward(Tensor grad_y, Tensor y) -> Tensor",
    "residual_add_stats(Tensor x, Tensor f, bool relu) -> (Tensor y, Tensor rows)",
    "residual_add_backward_stats(Tensor grad_y, Tensor? y) -> (Tensor grad_x, Tensor rows)",
    "residual_branch_stats(Tensor branch, Tensor shortcut) -> Tensor",
    "batch_norm_relu(Tensor x, Tensor? shortcut, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor y, Tensor saved)",
    "batch_norm_relu_backward(Tensor grad_y, Tensor? y, Tensor x, Tensor weight, Tensor saved, bool masked) -> "
    "(Tensor grad_x, Tensor grad_shortcut, Tensor grad_weight, Tensor grad_bias)",
)


def _fake_rows_into(width: int) -> Callable[[Sequence[Tensor], Tensor], None]:
    def fake(tensors: Sequence[Tensor], out: Tensor) -> None:
        torch._check(
            out.dim() == 2 and out.shape[0] == len(tensors) and out.shape[1] == width,
            lambda: f"out: needed shape [{len(tensors)}, {width}], got {list(out.shape)}",
        )

    return fake


def _fake_scale(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    torch._check(
        coefficient.numel() == 1, lambda: f"coefficient: needed one element, got shape {list(coefficient.shape)}"
    )


def _fake_clip(rows: Tensor, max_norm: float) -> Tensor:
    return rows.new_empty(2)


def _ignore_flag(flag: Tensor, on: bool) -> None:
    """Implements `count_if` for devices without CUDA graphs."""


def _fake_add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    y = residual_reference.add(x, f, relu)
    return y, empty_rows(1, y)


def _fake_backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return residual_reference.backward(grad_y, y), empty_rows(2, grad_y)


def _fake_branch_stats(branch: Tensor, shortcut: Tensor) -> Tensor:
    check_operands(branch, shortcut, "branch", "shortcut")
    return empty_rows(2, branch)


# Each operator with its fake and its reference.
_REFERENCE: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("grad_stats_into", _fake_rows_into(len(STATS)), reference.grad_stats_into),
    ("magnitudes_into", _fake_rows_into(N_MAGNITUDES), reference.magnitudes_into),
    ("scale_", _fake_scale, reference.scale_),
    ("clip_coefficient", _fake_clip, reference.clip_coefficient),
    ("count_if", _ignore_flag, _ignore_flag),
    ("residual_add", residual_reference.add, residual_reference.add),
    ("residual_add_backward", residual_reference.backward, residual_reference.backward),
    ("residual_add_stats", _fake_add_stats, residual_reference.add_stats),
    ("residual_add_backward_stats", _fake_backward_stats, residual_reference.backward_stats),
    ("residual_branch_stats", _fake_branch_stats, residual_reference.branch_stats),
    ("batch_norm_relu", batch_norm_reference.fake, batch_norm_reference.forward),
    ("batch_norm_relu_backward", batch_norm_reference.fake_backward, batch_norm_reference.backward),
)


def define_operators(library: torch.library.Library) -> None:
    """Defines every operator in a library, with all its registrations except those of C++, CUDA and Triton kernels.

    Args:
        library: Its namespace gets the operators of `SCHEMAS`.

    Example:
        >>> library = torch.library.Library("gradprobe_example", "DEF")
        >>> define_operators(library)
        >>> torch.ops.gradprobe_example.residual_add(torch.ones(2), torch.ones(2), False)
        tensor([2., 2.])
    """
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, fake, kernel in _REFERENCE:
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        library.impl(name, kernel, "CompositeExplicitAutograd")
    _define_derivatives(library)


def _define_derivatives(library: torch.library.Library) -> None:
    """Registers the operators with autograd and with the transforms of `torch.func`."""
    # Measurements and updates have no derivative.
    for name in ("grad_stats_into", "magnitudes_into", "scale_", "clip_coefficient", "residual_branch_stats"):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    operators, plain = getattr(torch.ops, library.ns), residual_reference
    library.impl("scale_", _count_writes(operators.scale_.default), "ADInplaceOrView", with_keyset=True)
    mask, mask_stats = operators.residual_add_backward.default, operators.residual_add_backward_stats.default
    for name, composite in (("residual_add", plain.sum_of), ("residual_add_stats", _refuse_transform)):
        add = getattr(operators, name).default
        library.impl(name, autograd_kernel(add, ResidualSum, masked_by(mask), composite), "Autograd")
    library.impl("residual_add_backward", backward_kernel(mask, plain.composite_mask), "Autograd")
    library.impl("residual_add_backward_stats", backward_kernel(mask_stats, _mask_and_rows(mask_stats)), "Autograd")
    normalise, gradients = operators.batch_norm_relu.default, operators.batch_norm_relu_backward.default
    of_norm, of_gradients = batch_norm_reference.composite, batch_norm_reference.composite_backward
    library.impl("batch_norm_relu", autograd_kernel(normalise, Normalised, gradients, of_norm), "Autograd")
    library.impl("batch_norm_relu_backward", backward_kernel(gradients, of_gradients), "Autograd")
    # The first key of a call inside a torch.func transform: the transform sees torch's operators instead of ours.
    library.impl("batch_norm_relu", of_norm, "FuncTorchDynamicLayerFrontMode")
    library.impl("batch_norm_relu_backward", of_gradients, "FuncTorchDynamicLayerFrontMode")
    library.impl("residual_add", plain.sum_of, "FuncTorchDynamicLayerFrontMode")
    library.impl("residual_add_backward", plain.composite_mask, "FuncTorchDynamicLayerFrontMode")
    for name in ("residual_add_stats", "residual_add_backward_stats", "residual_branch_stats"):
        library.impl(name, _refuse_transform, "FuncTorchBatched")


def _mask_and_rows(operator: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Builds the composite of `residual_add_backward_stats`: only the gradient has derivatives."""

    def composite(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            _, rows = operator(grad_y, y)
        return grad_y.clone() if y is None else residual_reference.composite_mask(grad_y, y), rows

    return composite


def _count_writes(operator: Any) -> Callable[..., None]:
    """Builds the kernel that increments the versions of the tensors written: kernels of the stable ABI cannot."""

    def kernel(keyset: torch._C.DispatchKeySet, written: Sequence[Tensor], *arguments: Any) -> None:
        torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *arguments)

    return kernel


def _refuse_transform(*_: object) -> NoReturn:
    raise NotImplementedError(
        "the statistics of a residual add cover whole tensors and do not work under torch.vmap or in forward mode"
    )


def register_for_cuda(backend: str) -> None:
    """Registers kernels for CUDA tensors, in the place of compiled ones that cannot run here.

    Args:
        backend: "triton" or "reference".
    """
    with warnings.catch_warnings():  # torch warns of each kernel that is replaced
        warnings.simplefilter("ignore")
        if backend == "triton":
            triton_launcher.register(_library, "CUDA")
            _library.impl("magnitudes_into", reference.magnitudes_into, "CUDA", allow_override=True)  # Triton has none
            return
        for name, _, kernel in _REFERENCE:
            _library.impl(name, kernel, "CUDA", allow_override=True)


_library = torch.library.Library("gradprobe", "DEF")
define_operators(_library)
# Compiled kernels take the place of the reference; on a GPU that they cannot serve, the Triton kernels do.
if libraries.parts()["cuda"] != "ready" and triton_launcher.is_installed():
    register_for_cuda("triton")

_operators = torch.ops.gradprobe
GRAD_STATS_INTO = _operators.grad_stats_into.default
MAGNITUDES_INTO: Callable[[Sequence[Tensor], Tensor], None] = _operators.magnitudes_into.default
SCALE = _operators.scale_.default
CLIP_COEFFICIENT: Callable[[Tensor, float], Tensor] = _operators.clip_coefficient.default
COUNT_IF = _operators.count_if.default
RESIDUAL_ADD: Callable[[Tensor, Tensor, bool], Tensor] = _operators.residual_add.default
RESIDUAL_ADD_BACKWARD: Callable[[Tensor, Tensor], Tensor] = _operators.residual_add_backward.default
RESIDUAL_ADD_STATS: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]] = _operators.residual_add_stats.default
RESIDUAL_ADD_BACKWARD_STATS: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] = (
    _operators.residual_add_backward_stats.default
)
RESIDUAL_BRANCH_STATS: Callable[[Tensor, Tensor], Tensor] = _operators.residual_branch_stats.default
BATCH_NORM_RELU: Callable[..., tuple[Tensor, Tensor]] = _operators.batch_norm_relu.default
