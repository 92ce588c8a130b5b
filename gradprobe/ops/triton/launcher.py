"""Launches the operators' Triton kernels: for CUDA without compiled kernels, and for ROCm.

The algorithm is that of the CUDA kernels (see docs/kernels.md): sums of up to 16 elements in float32, accumulated in
float64; a chunk whose squares leave the safe range of float32 is added again in float64; a second launch merges the
partial results in a fixed order. The table of tensors is copied to the device from pinned memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from gradprobe.errors import BackendError
from gradprobe.ops import residual_reference as plain
from gradprobe.ops.reference import FLOAT_DTYPES, check_no_overlap, check_rows, check_tensors
from gradprobe.ops.residual_reference import check_operands
from gradprobe.ops.row_math import clip_of, rows_by
from gradprobe.ops.rows import STATS
from gradprobe.ops.transfer import to_device

# dtype -> its name in the kernels, columns of a tile (16 bytes for each of 128 threads), rows of a tile.
_TILES = {
    torch.float32: ("f32", 512, 16),
    torch.float16: ("f16", 1024, 8),
    torch.bfloat16: ("bf16", 1024, 8),
    torch.float64: ("f64", 256, 8),
    torch.float8_e4m3fn: ("e4m3", 2048, 4),
    torch.float8_e5m2: ("e5m2", 2048, 4),
}
_TILES_IN_CHUNK = 4
_MERGE_TILE = 128
_WARPS = 4


def is_installed() -> bool:
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def unavailable(device_type: str) -> str | None:
    """Returns why the Triton kernels cannot run on a type of device.

    Args:
        device_type: "cuda" (also the name for ROCm), "cpu", ….

    Returns:
        The reason, or None if they can. On "cpu" they run only in Triton's interpreter, for tests.

    Example:
        >>> unavailable("mps")
        'the Triton kernels have no code for mps tensors'
    """
    if device_type not in ("cuda", "cpu"):
        return f"the Triton kernels have no code for {device_type} tensors"
    if not is_installed():
        return "triton is not installed (GPU builds of torch bring it)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "the Triton kernels run only on GPUs"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _device_code(name: str = "device") -> ModuleType:
    # Imported at the first launch: importing triton is slow, and few installations need it.
    return importlib.import_module(f"gradprobe.ops.triton.{name}")


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill their memory without gaps or overlap, in any order."""
    if tensor.is_contiguous():
        return True
    span = 1
    for stride, size in sorted((d, n) for d, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != span:
            return False
        span *= size
    return True


def _dense(tensor: Tensor) -> Tensor:
    """Returns the tensor or a dense copy. Statistics do not depend on the order of elements."""
    return tensor if _is_dense(tensor) else tensor.contiguous()


def _share_order(a: Tensor, b: Tensor) -> bool:
    """Returns whether a kernel can walk both tensors as flat memory, element for element."""
    return (a.is_contiguous() and b.is_contiguous()) or (a.stride() == b.stride() and _is_dense(a))


def _groups(tensors: Sequence[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    """Yields each dtype with the indices of its non-empty tensors."""
    for dtype in _TILES:
        numbers = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype and tensor.numel() > 0]
        if numbers:
            yield dtype, numbers


def _table(tensors: Sequence[Tensor], chunk_numel: int) -> tuple[list[list[int]], list[int], int]:
    """Returns the columns of a launch's table, the number of chunks of each tensor and the total."""
    counts = [-(-tensor.numel() // chunk_numel) for tensor in tensors]
    first_chunk = []
    n_chunks = 0
    for count in counts:
        first_chunk.append(n_chunks)
        n_chunks += count
    addresses = [tensor.data_ptr() for tensor in tensors]
    return [addresses, [tensor.numel() for tensor in tensors], first_chunk], counts, n_chunks


def _is_aligned(addresses: Sequence[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "the Triton kernels cannot be captured into a CUDA graph: a replay would copy their table of tensors from "
            "host memory that may have changed; use the native back end"
        )


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the raw rows of tensors into `out`, as `reference.grad_stats_into` does.

    Raises:
        ArgumentError: A tensor or `out` does not fit; the message names it, what was needed and what was given.
        BackendError: A CUDA graph is being captured.
    """
    check_rows(out, len(tensors))
    check_tensors(tensors, out.device)
    _refuse_capture(out.device)
    kernels = _device_code()
    torch.autograd.graph.increment_version(out)
    if any(tensor.numel() == 0 for tensor in tensors):
        out.zero_()
    for dtype, numbers in _groups(tensors):
        dense = [_dense(tensors[k].detach().resolve_neg()) for k in numbers]
        name, columns, rows = _TILES[dtype]
        table, counts, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = to_device(torch.tensor([*table, counts, numbers], dtype=torch.int64), out.device)
        partials = torch.empty(n_chunks, len(STATS), dtype=torch.float64, device=out.device)
        with _on(out.device):
            kernels.sum_chunks[(n_chunks,)](
                *(*on_device[:3], len(dense), partials),
                *(name, columns, rows, _TILES_IN_CHUNK, _is_aligned(table[0])),
                num_warps=_WARPS,
            )
            kernels.merge_partials[(len(dense),)](partials, *on_device[2:], out, _MERGE_TILE, num_warps=_WARPS)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies tensors by `coefficient` in place, as `reference.scale_` does.

    Raises:
        ArgumentError: A tensor does not fit; the message names it, what was needed and what was given.
        BackendError: A CUDA graph is being captured.
    """
    check_tensors(tensors, coefficient.device, FLOAT_DTYPES)
    for k, tensor in enumerate(tensors):
        check_no_overlap(tensor, f"tensors[{k}]")
    _refuse_capture(coefficient.device)
    kernels = _device_code()
    for dtype, numbers in _groups(tensors):
        targets = [tensors[k].detach() for k in numbers]
        dense = [_dense(target) for target in targets]
        name, columns, rows = _TILES[dtype]
        table, _, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = to_device(torch.tensor(table, dtype=torch.int64), coefficient.device)
        with _on(coefficient.device):
            kernels.scale_chunks[(n_chunks,)](
                *(*on_device, len(dense), coefficient),
                *(name, columns, rows, _TILES_IN_CHUNK, _is_aligned(table[0])),
                num_warps=_WARPS,
            )
        for target, copy in zip(targets, dense, strict=True):
            torch.autograd.graph.increment_version(target)
            if copy is not target:
                target.copy_(copy)


def residual_add(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    """Computes y, as `residual_reference.add` does."""
    check_operands(x, f, "x", "f")
    y = _empty_sum(x, f)
    if y is None:
        return plain.sum_of(x, f, relu)
    _join_into(x, f, y, "add_relu" if relu else "add")
    return y


def residual_add_backward(grad_y: Tensor, y: Tensor) -> Tensor:
    """Computes grad_x, as `residual_reference.backward` does."""
    check_operands(grad_y, y, "grad_y", "y")
    if not _share_order(grad_y, y):
        return plain.backward(grad_y, y)
    grad_x = torch.empty_like(y)
    _join_into(grad_y, y, grad_x, "mask")
    return grad_x


def residual_add_stats(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Computes y and its raw row [1, 6], as `residual_reference.add_stats` does."""
    check_operands(x, f, "x", "f")
    y = _empty_sum(x, f)
    if y is None:
        y = plain.sum_of(x, f, relu)
        return y, rows_by(grad_stats_into, [y])
    return y, _launch_chunks("join_chunks", (x, f, y), 1, "add_relu" if relu else "add")


def residual_add_backward_stats(grad_y: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes grad_x and the raw rows [2, 6] of grad_y and grad_x, as `residual_reference.backward_stats` does."""
    if y is None or not _share_order(grad_y, y):
        grad_x = plain.backward(grad_y, y)
        return grad_x, rows_by(grad_stats_into, [grad_y, grad_x])
    check_operands(grad_y, y, "grad_y", "y")
    grad_x = torch.empty_like(y)
    return grad_x, _launch_chunks("join_chunks", (grad_y, y, grad_x), 2, "mask")


def residual_branch_stats(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Computes the raw row of branch and the row of the sum of products, as `residual_reference.branch_stats` does."""
    check_operands(branch, shortcut, "branch", "shortcut")
    branch = _dense(branch)
    if not _share_order(branch, shortcut):
        shortcut = torch.empty_like(branch).copy_(shortcut)
    return _launch_chunks("branch_chunks", (branch, shortcut), 2)


def _empty_sum(x: Tensor, f: Tensor) -> Tensor | None:
    """Allocates y with the strides of `x + f`; None if a kernel cannot walk the operands as flat memory."""
    if x.numel() == 0:
        return None
    if x.is_contiguous() and f.is_contiguous():
        return x.new_empty(x.shape)
    # With dimensions of size 1, torch may treat the operands as channels-last and choose other strides.
    is_ambiguous = x.dim() in (4, 5) and 1 in x.shape
    return None if is_ambiguous or not _share_order(x, f) else torch.empty_like(x)


def clip_coefficient(rows: Tensor, max_norm: float) -> Tensor:
    """Computes a total norm and the factor that clips it, as `reference.clip_coefficient` does."""
    check_rows(rows, len(rows) if rows.dim() else 0, "rows")
    row = torch.zeros(1, len(STATS), dtype=torch.float64, device=rows.device)
    if len(rows):
        with _on(rows.device):
            _device_code().merge_rows[(1,)](rows, len(rows), row, _MERGE_TILE, num_warps=_WARPS)
    return clip_of(row, max_norm)


def _launch_chunks(kernel: str, operands: Sequence[Tensor], n_rows: int, *constants: str) -> Tensor:
    """Runs a kernel that writes `n_rows` partial rows per chunk of flat operands; returns them merged, [n_rows, 6]."""
    numel, device = operands[0].numel(), operands[0].device
    name, columns, rows_in_tile = _TILES[operands[0].dtype]
    n_chunks = -(-numel // (columns * rows_in_tile * _TILES_IN_CHUNK))
    rows = torch.zeros(n_rows, len(STATS), dtype=torch.float64, device=device)
    if n_chunks == 0:
        return rows
    partials = torch.empty(n_rows, n_chunks, len(STATS), dtype=torch.float64, device=device)
    with _on(device):
        getattr(_device_code("residual_device"), kernel)[(n_chunks,)](
            *(*operands, numel, partials), *(name, columns, rows_in_tile, _TILES_IN_CHUNK, *constants), num_warps=_WARPS
        )
        _device_code().merge_rows[(n_rows,)](partials, n_chunks, rows, _MERGE_TILE, num_warps=_WARPS)
    return rows


def _join_into(a: Tensor, b: Tensor, out: Tensor, operation: str) -> None:
    """Adds or masks two tensors into `out`, which may be either of them. All three share one memory order."""
    name, columns, rows = _TILES[a.dtype]
    n_chunks = -(-a.numel() // (columns * rows * _TILES_IN_CHUNK))
    if n_chunks == 0:
        return
    with _on(a.device):
        _device_code("residual_device").join_elements[(n_chunks,)](
            *(a, b, out, a.numel()), *(name, columns, rows, _TILES_IN_CHUNK, operation), num_warps=_WARPS
        )


_KERNELS = (
    grad_stats_into,
    scale_,
    clip_coefficient,
    residual_add,
    residual_add_backward,
    residual_add_stats,
    residual_add_backward_stats,
    residual_branch_stats,
)


def register(library: torch.library.Library, dispatch_key: str) -> None:
    """Registers the Triton kernels with torch's dispatcher.

    Args:
        library: A library of the namespace whose operators get the kernels; see `schemas.define_operators`.
        dispatch_key: "CUDA", which ROCm uses too; "CPU" for Triton's interpreter.

    Example:
        >>> from gradprobe.ops.schemas import define_operators
        >>> library = torch.library.Library("gradprobe_example_triton", "DEF")
        >>> define_operators(library)
        >>> register(library, "CUDA")
    """
    for kernel in _KERNELS:
        library.impl(kernel.__name__, kernel, dispatch_key)
