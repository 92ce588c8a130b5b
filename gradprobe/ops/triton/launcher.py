"""The operators as Triton kernels: for CUDA where the compiled part is missing, and for ROCm.

The same plan as the CUDA kernels (see docs/kernels.md): sums of up to 16 elements in float32, carried in float64; a
chunk whose largest magnitude float32 squares cannot hold is added again in float64; partial results merge in a second
launch, in a fixed order. The table of tensors is copied to the device from pinned memory.
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
from gradprobe.ops.reference import check_no_overlap, check_rows, check_tensors
from gradprobe.ops.rows import STATS

# dtype -> name that the kernels know, columns of a tile (16 bytes for each of 128 threads), rows of a tile.
_TILES = {
    torch.float32: ("f32", 512, 16),
    torch.float16: ("f16", 1024, 8),
    torch.bfloat16: ("bf16", 1024, 8),
    torch.float64: ("f64", 256, 8),
}
_TILES_IN_CHUNK = 4
_MERGE_TILE = 128
_WARPS = 4


def unavailable(device_type: str) -> str | None:
    """Says why the Triton kernels cannot serve a kind of device.

    Args:
        device_type: "cuda" (which ROCm builds of torch use too), "cpu", ….

    Returns:
        The reason, or None where they can. They serve "cpu" only in Triton's interpreter, for tests.

    Example:
        >>> unavailable("mps")
        'the Triton kernels have no code for mps tensors'
    """
    if device_type not in ("cuda", "cpu"):
        return f"the Triton kernels have no code for {device_type} tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (GPU builds of torch bring it)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "the Triton kernels run on GPUs"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _device_code() -> ModuleType:
    # Imported at the first launch: triton takes a while, and few installations need it.
    return importlib.import_module("gradprobe.ops.triton.device")


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy; in memory order, which statistics do not depend on."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _upload(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[len(columns), N] int64 on the device, without a synchronisation."""
    table = torch.tensor(columns, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _groups(tensors: Sequence[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    """The numbers of the tensors that are not empty, by dtype."""
    for dtype in _TILES:
        numbers = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype and tensor.numel() > 0]
        if numbers:
            yield dtype, numbers


def _table(tensors: Sequence[Tensor], chunk_numel: int) -> tuple[list[list[int]], list[int], int]:
    """Columns of a launch's table, number of chunks of each tensor, number of all chunks."""
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
            "the Triton kernels cannot be captured into a CUDA graph: their table of tensors is copied from memory "
            "that a replay would find changed; use the native backend"
        )


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the raw statistics of each tensor into a row of `out`, as `reference.grad_stats_into` defines them.

    Args:
        tensors: K tensors of float16, bfloat16, float32 or float64, any layout, on the device of `out`.
        out: [K, 6] float64, contiguous, columns in the order of `gradprobe.STATS`.

    Raises:
        ArgumentError: a tensor or `out` is not as needed; the message names it and what came.
        BackendError: a CUDA graph is being captured.

    Example:
        >>> out = torch.empty(1, 6, dtype=torch.float64, device="cuda")  # doctest: +SKIP
        >>> grad_stats_into([torch.ones(3, device="cuda")], out)  # doctest: +SKIP
    """
    check_rows(out, len(tensors))
    check_tensors(tensors, out.device)
    _refuse_capture(out.device)
    kernels = _device_code()
    torch.autograd.graph.increment_version(out)
    if any(tensor.numel() == 0 for tensor in tensors):
        out.zero_()
    for dtype, numbers in _groups(tensors):
        dense = [_dense(tensors[k].detach()) for k in numbers]
        name, columns, rows = _TILES[dtype]
        table, counts, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = _upload([*table, counts, numbers], out.device)
        partials = torch.empty(n_chunks, 6, dtype=torch.float64, device=out.device)
        with _on(out.device):
            kernels.sum_chunks[(n_chunks,)](
                *(*on_device[:3], len(dense), partials),
                *(name, columns, rows, _TILES_IN_CHUNK, _is_aligned(table[0])),
                num_warps=_WARPS,
            )
            kernels.merge_partials[(len(dense),)](partials, *on_device[2:], out, _MERGE_TILE, num_warps=_WARPS)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies each tensor by `coefficient` in place, rounding each product once to the tensor's dtype.

    Args:
        tensors: float16, bfloat16, float32 or float64 tensors, any layout without overlap. The product is computed in
            float32 for the first three, in float64 for the last.
        coefficient: one element, float32 or float64, on the tensors' device.

    Raises:
        ArgumentError: a tensor is not as needed; the message names it and what came.
        BackendError: a CUDA graph is being captured.

    Example:
        >>> x = torch.ones(3, device="cuda")  # doctest: +SKIP
        >>> scale_([x], torch.tensor(0.5, device="cuda"))  # doctest: +SKIP
    """
    check_tensors(tensors, coefficient.device)
    for k, tensor in enumerate(tensors):
        check_no_overlap(tensor, f"tensors[{k}]")
    _refuse_capture(coefficient.device)
    kernels = _device_code()
    for dtype, numbers in _groups(tensors):
        targets = [tensors[k].detach() for k in numbers]
        dense = [_dense(target) for target in targets]
        name, columns, rows = _TILES[dtype]
        table, _, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = _upload(table, coefficient.device)
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


def _join(a: Tensor, b: Tensor, operation: str) -> tuple[Tensor, Tensor]:
    kernels = _device_code()
    name, columns, rows = _TILES[a.dtype]
    n_rows = 2 if operation == "mask" else 1
    n_chunks = -(-a.numel() // (columns * rows * _TILES_IN_CHUNK))
    out = torch.empty_like(a)
    statistics = torch.zeros(n_rows, len(STATS), dtype=torch.float64, device=a.device)
    if n_chunks == 0:
        return out, statistics
    partials = torch.empty(n_rows, n_chunks, len(STATS), dtype=torch.float64, device=a.device)
    with _on(a.device):
        kernels.join_chunks[(n_chunks,)](
            *(a, b, out, a.numel(), partials), *(name, columns, rows, _TILES_IN_CHUNK, operation), num_warps=_WARPS
        )
        kernels.merge_rows[(n_rows,)](partials, n_chunks, statistics, _MERGE_TILE, num_warps=_WARPS)
    return out, statistics


def _join_into(a: Tensor, b: Tensor, out: Tensor, operation: str) -> None:
    name, columns, rows = _TILES[a.dtype]
    n_chunks = -(-a.numel() // (columns * rows * _TILES_IN_CHUNK))
    if n_chunks == 0:
        return
    with _on(a.device):
        _device_code().join_elements[(n_chunks,)](
            *(a, b, out, a.numel()), *(name, columns, rows, _TILES_IN_CHUNK, operation), num_warps=_WARPS
        )


def residual_add_into(x: Tensor, f: Tensor, relu: bool, y: Tensor) -> None:
    """Adds two tensors, with ReLU if wanted, and takes no statistics.

    Args:
        x: dense, float16, bfloat16, float32 or float64.
        f: alike, with the same strides.
        relu: whether to take `max(x + f, 0)`.
        y: alike, what is written to; may be `x` or `f`.

    Example:
        >>> x = torch.ones(3, device="cuda")  # doctest: +SKIP
        >>> residual_add_into(x, torch.ones(3, device="cuda"), True, x)  # doctest: +SKIP
    """
    _join_into(x, f, y, "add_relu" if relu else "add")


def residual_add_backward_into(grad_y: Tensor, y: Tensor, grad_x: Tensor) -> None:
    """Masks a gradient where a ReLU was shut, and takes no statistics.

    Args:
        grad_y: dense, float16, bfloat16, float32 or float64.
        y: what the junction gave, alike, with the same strides.
        grad_x: alike, what is written to.

    Example:
        >>> grad_x = torch.empty(3, device="cuda")  # doctest: +SKIP
        >>> residual_add_backward_into(torch.ones_like(grad_x), torch.ones_like(grad_x), grad_x)  # doctest: +SKIP
    """
    _join_into(grad_y, y, grad_x, "mask")


def residual_add(x: Tensor, f: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Adds two tensors, with ReLU if wanted, and takes the statistics of the sum in the same pass.

    Args:
        x: dense, float16, bfloat16, float32 or float64.
        f: alike, with the same strides.
        relu: whether to take `max(x + f, 0)`.

    Returns:
        The sum, and its raw row [1, 6].

    Example:
        >>> residual_add(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"), True)  # doctest: +SKIP
    """
    return _join(x, f, "add_relu" if relu else "add")


def residual_add_backward(grad_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Masks a gradient where a ReLU was shut, and takes the statistics of the incoming and of the outgoing one.

    Args:
        grad_y: dense, float16, bfloat16, float32 or float64.
        y: what the junction gave, alike, with the same strides.

    Returns:
        The gradient for both branches, and the raw rows [2, 6] of `grad_y` and of it.

    Example:
        >>> residual_add_backward(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))  # doctest: +SKIP
    """
    return _join(grad_y, y, "mask")
