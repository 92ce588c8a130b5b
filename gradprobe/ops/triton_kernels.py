"""The operators as Triton kernels: for CUDA where the compiled part is missing, and for ROCm.

The same chunks, groups and full range as the CUDA kernels (see docs/kernels.md): sums of up to 16 elements in float32,
carried in float64; a chunk whose largest magnitude float32 squares cannot hold is added again in float64; partial
results merge in a second launch, in a fixed order. The table of tensors is copied to the device from pinned memory.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradprobe.errors import BackendError
from gradprobe.ops.reference import check_no_overlap, check_rows, check_tensors

try:
    import triton
    from triton import language as tl
except ImportError:  # `unavailable` says so; nothing below is launched then
    triton = None


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


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


# ---- Device code. Names in capitals are compile-time constants.


@_jit
def _element_pointer(address, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if TYPE == "f32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "f16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    return pointer


@_jit
def _find_tensor(first_chunk, n_tensors, chunk):  # type: ignore[no-untyped-def]
    """The last tensor whose first chunk is not after `chunk`."""
    low = n_tensors * 0
    high = n_tensors
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_chunk + middle) <= chunk:
            low = middle
        else:
            high = middle
    return low


@_jit
def _magnitude_bits(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """|x| as an integer: orders like the numbers, infinity above all finite, NaN above infinity."""
    if TYPE == "f64":
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    return bits


@_jit
def _factor(abs_max_bits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What elements are multiplied by in float64: a power of two that keeps squares in range; only f64 needs one."""
    one = abs_max_bits.to(tl.float64) * 0.0 + 1.0
    if TYPE == "f64":
        # 2**480, 2**-480 and infinity as bits.
        large = abs_max_bits > 0x5DF0000000000000
        small = (abs_max_bits > 0) & (abs_max_bits < 0x21F0000000000000)
        # Powers of two by halves: literals are float32.
        up = (one * 1.2676506002282294e30) * 1.2676506002282294e30
        up = up * up * up * (one * 1.0)
        down = (one * 7.888609052210118e-31) * 7.888609052210118e-31
        down = down * down * down
        one = tl.where(large, down, tl.where(small, up, one))
    return one


@_jit
def _store_partial(to, sum_, sum_abs, sum_sq, bits, n_zero, n_nonfinite, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One raw row [6], its largest magnitude as float64."""
    tl.store(to + 0, sum_)
    tl.store(to + 1, sum_abs)
    tl.store(to + 2, sum_sq)
    if TYPE == "f64":
        tl.store(to + 3, bits.to(tl.float64, bitcast=True))
    else:
        tl.store(to + 3, bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(to + 4, n_zero.to(tl.float64))
    tl.store(to + 5, n_nonfinite.to(tl.float64))


@_jit
def _widened(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if TYPE == "f64":
        wide = x
    else:
        wide = x.to(tl.float32)
    return wide


@_jit
def _chunk_statistics(  # type: ignore[no-untyped-def]
    begin, n, to, TYPE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """Writes the statistics of the `n` elements at `begin` to `to` [6]."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([COLUMNS], tl.float64)
    sums_abs = tl.zeros([COLUMNS], tl.float64)
    sums_sq = tl.zeros([COLUMNS], tl.float64)
    bits_max = tl.zeros([COLUMNS], tl.int64)
    zeros = tl.zeros([COLUMNS], tl.int32)
    nonfinite = tl.zeros([COLUMNS], tl.int32)
    infinity: tl.constexpr = 0x7FF0000000000000 if TYPE == "f64" else 0x7F800000
    for tile in range(TILES):
        at = tile * ROWS * COLUMNS + place
        inside = at < n
        x = _widened(tl.load(begin + at, mask=inside, other=0.0), TYPE)
        bits = _magnitude_bits(x, TYPE)
        bits_max = tl.maximum(bits_max, tl.max(bits, axis=0))
        zeros += tl.sum(((bits == 0) & inside).to(tl.int32), axis=0)
        nonfinite += tl.sum((bits >= infinity).to(tl.int32), axis=0)
        if TYPE != "f64":
            sums += tl.sum(x, axis=0).to(tl.float64)
            sums_abs += tl.sum(tl.abs(x), axis=0).to(tl.float64)
            sums_sq += tl.sum(x * x, axis=0).to(tl.float64)
    abs_max_bits = tl.max(bits_max, axis=0)

    # 2**-55 and 2**55 as float32 bits: outside, squares in float32 lose digits or overflow.
    if TYPE == "f64":
        again = abs_max_bits > 0
    else:
        again = (abs_max_bits > 0) & ((abs_max_bits < 0x24000000) | (abs_max_bits > 0x5B000000))
    if again:
        sums = tl.zeros([COLUMNS], tl.float64)
        sums_abs = tl.zeros([COLUMNS], tl.float64)
        sums_sq = tl.zeros([COLUMNS], tl.float64)
        factor = _factor(abs_max_bits, TYPE)
        for tile in range(TILES):
            at = tile * ROWS * COLUMNS + place
            x = tl.load(begin + at, mask=at < n, other=0.0).to(tl.float64) * factor
            sums += tl.sum(x, axis=0)
            sums_abs += tl.sum(tl.abs(x), axis=0)
            sums_sq += tl.sum(x * x, axis=0)
    _store_partial(
        to,
        tl.sum(sums, axis=0),
        tl.sum(sums_abs, axis=0),
        tl.sum(sums_sq, axis=0),
        abs_max_bits,
        tl.sum(zeros, axis=0),
        tl.sum(nonfinite, axis=0),
        TYPE,
    )


@_jit
def sum_chunks(  # type: ignore[no-untyped-def]
    addresses,  # [n_tensors] int64
    numel,  # [n_tensors] int64
    first_chunk,  # [n_tensors] int64
    n_tensors,
    partials,  # [n_chunks, 6] float64
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Statistics of each chunk of each tensor."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = _find_tensor(first_chunk, n_tensors, chunk)
    offset = (chunk - tl.load(first_chunk + tensor)) * (ROWS * COLUMNS * TILES)
    begin = _element_pointer(tl.load(addresses + tensor), TYPE) + offset
    _chunk_statistics(begin, tl.load(numel + tensor) - offset, partials + chunk * 6, TYPE, COLUMNS, ROWS, TILES)


@_jit
def merge_partials(partials, first_partial, n_partials, row, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merges the partials of one row: first their largest magnitude, then the sums at the exponent that it asks for."""
    program = tl.program_id(0)
    begin = partials + tl.load(first_partial + program) * 6
    n = tl.load(n_partials + program)
    lane = tl.arange(0, TILE)
    bits_max = tl.zeros([TILE], tl.int64)
    start = n * 0
    while start < n:
        inside = start + lane < n
        abs_max = tl.load(begin + (start + lane) * 6 + 3, mask=inside, other=0.0)
        bits_max = tl.maximum(bits_max, _magnitude_bits(abs_max, "f64"))
        start += TILE
    abs_max_bits = tl.max(bits_max, axis=0)
    factor = _factor(abs_max_bits, "f64")
    is_finite = abs_max_bits < 0x7FF0000000000000

    sums = tl.zeros([TILE], tl.float64)
    sums_abs = tl.zeros([TILE], tl.float64)
    sums_sq = tl.zeros([TILE], tl.float64)
    zeros = tl.zeros([TILE], tl.float64)
    nonfinite = tl.zeros([TILE], tl.float64)
    start = n * 0
    while start < n:
        inside = start + lane < n
        at = begin + (start + lane) * 6
        bits = _magnitude_bits(tl.load(at + 3, mask=inside, other=0.0), "f64")
        # Beside a NaN or infinity, finite elements do not count, and might overflow.
        counts = is_finite | (bits >= 0x7FF0000000000000)
        # From the partial's exponent to the row's: 1, 2**-600 or 2**-1200, which is zero.
        shift = tl.where(counts & is_finite & (bits > 0), factor / _factor(bits, "f64"), 1.0)
        sums += tl.where(counts, tl.load(at + 0, mask=inside, other=0.0) * shift, 0.0)
        sums_abs += tl.where(counts, tl.load(at + 1, mask=inside, other=0.0) * shift, 0.0)
        sums_sq += tl.where(counts, tl.load(at + 2, mask=inside, other=0.0) * shift * shift, 0.0)
        zeros += tl.load(at + 4, mask=inside, other=0.0)
        nonfinite += tl.load(at + 5, mask=inside, other=0.0)
        start += TILE
    _store_partial(
        out + tl.load(row + program) * 6,
        tl.sum(sums, axis=0),
        tl.sum(sums_abs, axis=0),
        tl.sum(sums_sq, axis=0),
        abs_max_bits,
        tl.sum(zeros, axis=0),
        tl.sum(nonfinite, axis=0),
        "f64",
    )


@_jit
def scale_chunks(  # type: ignore[no-untyped-def]
    addresses,  # [n_tensors] int64
    numel,  # [n_tensors] int64
    first_chunk,  # [n_tensors] int64
    n_tensors,
    coefficient,  # one float32 or float64
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Multiplies each chunk by the coefficient; moves nothing where that is 1."""
    if TYPE == "f64":
        factor = tl.load(coefficient).to(tl.float64)
    else:
        factor = tl.load(coefficient).to(tl.float32)
    if factor != 1.0:
        chunk = tl.program_id(0).to(tl.int64)
        tensor = _find_tensor(first_chunk, n_tensors, chunk)
        offset = (chunk - tl.load(first_chunk + tensor)) * (ROWS * COLUMNS * TILES)
        begin = _element_pointer(tl.load(addresses + tensor), TYPE) + offset
        n = tl.load(numel + tensor) - offset
        for tile in range(TILES * ROWS):
            at = tile * COLUMNS + tl.arange(0, COLUMNS)
            x = tl.load(begin + at, mask=at < n, other=0.0)
            tl.store(begin + at, (_widened(x, TYPE) * factor).to(x.dtype), mask=at < n)


# ---- Host code.


def unavailable(device_type: str) -> str | None:
    """Says why the Triton kernels cannot serve a kind of device.

    Args:
        device_type: "cuda" (which ROCm builds of torch use too), "cpu", ….

    Returns:
        The reason, or None where they can. They serve "cpu" only in Triton's interpreter (TRITON_INTERPRET=1), a test tool.

    Example:
        >>> unavailable("mps")
        'the Triton kernels have no code for mps tensors'
    """
    if device_type not in ("cuda", "cpu"):
        return f"the Triton kernels have no code for {device_type} tensors"
    if triton is None:
        found = importlib.util.find_spec("triton") is not None
        return "triton does not import" if found else "triton is not installed (GPU builds of torch bring it)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "the Triton kernels run on GPUs"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


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
    """The columns of a launch's table, the number of chunks of each tensor, and of all."""
    counts = [-(-tensor.numel() // chunk_numel) for tensor in tensors]
    first_chunk = []
    n_chunks = 0
    for count in counts:
        first_chunk.append(n_chunks)
        n_chunks += count
    addresses = [tensor.data_ptr() for tensor in tensors]
    return [addresses, [tensor.numel() for tensor in tensors], first_chunk], counts, n_chunks


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
    if any(tensor.numel() == 0 for tensor in tensors):
        out.zero_()
    for dtype, numbers in _groups(tensors):
        dense = [_dense(tensors[k].detach()) for k in numbers]
        name, columns, rows = _TILES[dtype]
        table, counts, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = _upload([*table, counts, numbers], out.device)
        partials = torch.empty(n_chunks, 6, dtype=torch.float64, device=out.device)
        with torch.cuda.device_of(out):
            sum_chunks[(n_chunks,)](
                *on_device[:3], len(dense), partials, name, columns, rows, _TILES_IN_CHUNK, num_warps=_WARPS
            )
            merge_partials[(len(dense),)](partials, *on_device[2:], out, _MERGE_TILE, num_warps=_WARPS)


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
    check_no_overlap(tensors)
    _refuse_capture(coefficient.device)
    for dtype, numbers in _groups(tensors):
        targets = [tensors[k].detach() for k in numbers]
        dense = [_dense(target) for target in targets]
        name, columns, rows = _TILES[dtype]
        table, _, n_chunks = _table(dense, columns * rows * _TILES_IN_CHUNK)
        on_device = _upload(table, coefficient.device)
        with torch.cuda.device_of(coefficient):
            scale_chunks[(n_chunks,)](
                *on_device, len(dense), coefficient, name, columns, rows, _TILES_IN_CHUNK, num_warps=_WARPS
            )
        for target, copy in zip(targets, dense, strict=True):
            if copy is not target:
                target.copy_(copy)
