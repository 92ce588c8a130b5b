"""Device code of the Triton kernels for statistics and scaling. Names in capitals are compile-time constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradprobe.ops import rows

try:
    import triton
    from triton import language as tl
except ImportError:  # `launcher.unavailable` reports it, and nothing below is launched
    triton = None

_constant: Any = int if triton is None else tl.constexpr  # a kernel reads a global only if it is a constexpr
N_STATS = _constant(len(rows.STATS))
SUM, SUM_ABS, SUM_SQ = _constant(rows.SUM), _constant(rows.SUM_ABS), _constant(rows.SUM_SQ)
ABS_MAX, N_ZERO, N_NONFINITE = _constant(rows.ABS_MAX), _constant(rows.N_ZERO), _constant(rows.N_NONFINITE)


def jit(function: Callable[..., Any]) -> Any:
    """Applies `triton.jit`, or nothing if triton is missing."""
    return function if triton is None else triton.jit(function)


@jit
def _element_pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    if TYPE == "f32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == "f16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif TYPE == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif TYPE == "f64":
        pointer = address.to(tl.pointer_type(tl.float64))
    else:  # float8, as bits
        pointer = address.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # allows 16-byte loads
    return pointer


@jit
def load_elements(begin, at, n, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads elements of a chunk. A mask makes the compiler load one by one, so whole chunks go without."""
    return tl.load(begin + at, mask=at < n, other=0.0) if MASKED else tl.load(begin + at)


@jit
def _find_tensor(first_chunk, n_tensors, chunk):  # type: ignore[no-untyped-def]
    """Returns the last tensor whose first chunk is not after `chunk`."""
    low = n_tensors * 0
    high = n_tensors
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_chunk + middle) <= chunk:
            low = middle
        else:
            high = middle
    return low


@jit
def magnitude_bits(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns |x| as an integer: ordered like the numbers, infinity above all finite ones, NaN above infinity."""
    if TYPE == "f64":
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@jit
def range_factor(abs_max_bits, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the power of two, as float64, that elements are multiplied by to keep squares in range; 1 unless f64."""
    one = abs_max_bits.to(tl.float64) * 0.0 + 1.0
    if TYPE == "f64":
        # 2**480, 2**-480 and infinity as bits.
        large = abs_max_bits > 0x5DF0000000000000
        small = (abs_max_bits > 0) & (abs_max_bits < 0x21F0000000000000)
        # 2**600 and 2**-600 from factors that fit in float32, the type of literals.
        up = (one * 1.2676506002282294e30) * 1.2676506002282294e30
        up = up * up * up
        down = (one * 7.888609052210118e-31) * 7.888609052210118e-31
        down = down * down * down
        one = tl.where(large, down, tl.where(small, up, one))
    return one


@jit
def store_partial(to, sum_, sum_abs, sum_sq, bits, n_zero, n_nonfinite, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores a partial raw row [6], its largest magnitude as float64."""
    tl.store(to + SUM, sum_)
    tl.store(to + SUM_ABS, sum_abs)
    tl.store(to + SUM_SQ, sum_sq)
    if TYPE == "f64":
        tl.store(to + ABS_MAX, bits.to(tl.float64, bitcast=True))
    else:
        tl.store(to + ABS_MAX, bits.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(to + N_ZERO, n_zero.to(tl.float64))
    tl.store(to + N_NONFINITE, n_nonfinite.to(tl.float64))


@jit
def _widened_float8(x, SHIFT: tl.constexpr, REBIAS: tl.constexpr, FIRST_SPECIAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Does what `widened_float8` of csrc/core/float8.h does: not every GPU has the types of float8."""
    magnitude = x.to(tl.uint32) & 0x7F
    moved = ((x.to(tl.uint32) & 0x80) << 24) | (magnitude << SHIFT)
    finite = moved.to(tl.float32, bitcast=True) * REBIAS
    return tl.where(magnitude < FIRST_SPECIAL, finite, (moved | 0x7F800000).to(tl.float32, bitcast=True))


@jit
def widened(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns `x` as float64 if that is its type, else as float32."""
    if TYPE == "bf16":
        # bfloat16 is the upper half of a float32. A conversion in Triton's interpreter would lose subnormals.
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == "e4m3":
        wide = _widened_float8(x, 20, 1.329227995784916e36, 0x7F)  # 2**120
    elif TYPE == "e5m2":
        wide = _widened_float8(x, 21, 5.192296858534828e33, 0x7C)  # 2**112
    else:
        wide = x if TYPE == "f64" else x.to(tl.float32)
    return wide


@jit
def result_tile(a, b, at, n, TYPE: tl.constexpr, MASKED: tl.constexpr, OPERATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns elements of `a`, or the result of a residual operation on the elements of `a` and `b`."""
    x = load_elements(a, at, n, MASKED)
    if OPERATION == "mask":
        # If b is NaN the gradient passes, as in torch.relu.
        x = tl.where(widened(load_elements(b, at, n, MASKED), TYPE) <= 0, tl.zeros_like(x), x)
    elif OPERATION != "none":
        total = widened(x, TYPE) + widened(load_elements(b, at, n, MASKED), TYPE)
        if OPERATION == "add_relu":
            total = tl.where(total <= 0, tl.zeros_like(total), total)
        x = total.to(x.dtype)
    return x


@jit
def chunk_statistics(  # type: ignore[no-untyped-def]
    a,
    b,
    out,
    n,
    to,
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    MASKED: tl.constexpr,
    OPERATION: tl.constexpr,
):
    """Writes the statistics of the `n` elements at `a`, or of the operation's results, to `to` [6]."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([COLUMNS], tl.float64)
    sums_abs = tl.zeros([COLUMNS], tl.float64)
    sums_sq = tl.zeros([COLUMNS], tl.float64)
    bits_max = tl.zeros([COLUMNS], tl.int64 if TYPE == "f64" else tl.int32)
    zeros = tl.zeros([COLUMNS], tl.int32)
    nonfinite = tl.zeros([COLUMNS], tl.int32)
    infinity: tl.constexpr = 0x7FF0000000000000 if TYPE == "f64" else 0x7F800000
    for tile in range(TILES):
        at = tile * ROWS * COLUMNS + place
        narrow = result_tile(a, b, at, n, TYPE, MASKED, OPERATION)
        if OPERATION != "none":
            if MASKED:
                tl.store(out + at, narrow, mask=at < n)
            else:
                tl.store(out + at, narrow)
        x = widened(narrow, TYPE)
        bits = magnitude_bits(x, TYPE)
        bits_max = tl.maximum(bits_max, tl.max(bits, axis=0))
        zeros += tl.sum(((bits == 0) & (at < n)).to(tl.int32), axis=0)
        nonfinite += tl.sum((bits >= infinity).to(tl.int32), axis=0)
        if TYPE != "f64":
            sums += tl.sum(x, axis=0).to(tl.float64)
            sums_abs += tl.sum(tl.abs(x), axis=0).to(tl.float64)
            sums_sq += tl.sum(x * x, axis=0).to(tl.float64)
    abs_max_bits = tl.max(bits_max, axis=0).to(tl.int64)

    # 2**-55 and 2**55 as float32 bits. Outside that range, float32 squares lose digits or overflow.
    if TYPE == "f64":
        again = abs_max_bits > 0
    else:
        again = (abs_max_bits > 0) & ((abs_max_bits < 0x24000000) | (abs_max_bits > 0x5B000000))
    if again:
        sums = tl.zeros([COLUMNS], tl.float64)
        sums_abs = tl.zeros([COLUMNS], tl.float64)
        sums_sq = tl.zeros([COLUMNS], tl.float64)
        factor = range_factor(abs_max_bits, TYPE)
        for tile in range(TILES):
            at = tile * ROWS * COLUMNS + place
            x = widened(result_tile(a, b, at, n, TYPE, MASKED, OPERATION), TYPE).to(tl.float64) * factor
            sums += tl.sum(x, axis=0)
            sums_abs += tl.sum(tl.abs(x), axis=0)
            sums_sq += tl.sum(x * x, axis=0)
    store_partial(
        to,
        tl.sum(sums, axis=0),
        tl.sum(sums_abs, axis=0),
        tl.sum(sums_sq, axis=0),
        abs_max_bits,
        tl.sum(zeros, axis=0),
        tl.sum(nonfinite, axis=0),
        TYPE,
    )


@jit
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
    ALIGNED: tl.constexpr,
):
    """Computes the statistics of each chunk of each tensor."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = _find_tensor(first_chunk, n_tensors, chunk)
    offset = (chunk - tl.load(first_chunk + tensor)) * (ROWS * COLUMNS * TILES)
    begin = _element_pointer(tl.load(addresses + tensor), TYPE, ALIGNED) + offset
    n = tl.load(numel + tensor) - offset
    to = partials + chunk * N_STATS
    if n >= ROWS * COLUMNS * TILES:
        chunk_statistics(begin, begin, begin, n, to, TYPE, COLUMNS, ROWS, TILES, False, "none")
    else:
        chunk_statistics(begin, begin, begin, n, to, TYPE, COLUMNS, ROWS, TILES, True, "none")


@jit
def merge_partials(partials, first_partial, n_partials, row, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merges the partials of one of many rows, found through tables."""
    program = tl.program_id(0)
    begin = partials + tl.load(first_partial + program) * N_STATS
    _merge(begin, tl.load(n_partials + program), out + tl.load(row + program) * N_STATS, TILE)


@jit
def merge_rows(partials, n_partials, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merges [n_rows, n_partials, 6] into [n_rows, 6]."""
    row = tl.program_id(0).to(tl.int64)
    _merge(partials + row * n_partials * N_STATS, n_partials, out + row * N_STATS, TILE)


@jit
def _merge(begin, n, to, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merges `n` partials at `begin` into the row at `to`: first the largest magnitude, then sums at its exponent."""
    lane = tl.arange(0, TILE)
    bits_max = tl.zeros([TILE], tl.int64)
    start = n * 0
    while start < n:
        inside = start + lane < n
        abs_max = tl.load(begin + (start + lane) * N_STATS + ABS_MAX, mask=inside, other=0.0)
        bits_max = tl.maximum(bits_max, magnitude_bits(abs_max, "f64"))
        start += TILE
    abs_max_bits = tl.max(bits_max, axis=0)
    factor = range_factor(abs_max_bits, "f64")
    is_finite = abs_max_bits < 0x7FF0000000000000

    sums = tl.zeros([TILE], tl.float64)
    sums_abs = tl.zeros([TILE], tl.float64)
    sums_sq = tl.zeros([TILE], tl.float64)
    zeros = tl.zeros([TILE], tl.float64)
    nonfinite = tl.zeros([TILE], tl.float64)
    start = n * 0
    while start < n:
        inside = start + lane < n
        at = begin + (start + lane) * N_STATS
        bits = magnitude_bits(tl.load(at + ABS_MAX, mask=inside, other=0.0), "f64")
        # Beside a NaN or infinity, finite partials are left out: they cannot change the sum, but might overflow.
        counts = is_finite | (bits >= 0x7FF0000000000000)
        # Rescales from the partial's exponent to the row's: 1, 2**-600, or 2**-1200, which is zero.
        shift = tl.where(counts & is_finite & (bits > 0), factor / range_factor(bits, "f64"), 1.0)
        sums += tl.where(counts, tl.load(at + SUM, mask=inside, other=0.0) * shift, 0.0)
        sums_abs += tl.where(counts, tl.load(at + SUM_ABS, mask=inside, other=0.0) * shift, 0.0)
        sums_sq += tl.where(counts, tl.load(at + SUM_SQ, mask=inside, other=0.0) * shift * shift, 0.0)
        zeros += tl.load(at + N_ZERO, mask=inside, other=0.0)
        nonfinite += tl.load(at + N_NONFINITE, mask=inside, other=0.0)
        start += TILE
    store_partial(
        to,
        tl.sum(sums, axis=0),
        tl.sum(sums_abs, axis=0),
        tl.sum(sums_sq, axis=0),
        abs_max_bits,
        tl.sum(zeros, axis=0),
        tl.sum(nonfinite, axis=0),
        "f64",
    )


@jit
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
    ALIGNED: tl.constexpr,
):
    """Multiplies each chunk by the coefficient. Reads and writes no element if the coefficient is 1."""
    factor = tl.load(coefficient).to(tl.float64 if TYPE == "f64" else tl.float32)
    if factor != 1.0:
        chunk = tl.program_id(0).to(tl.int64)
        tensor = _find_tensor(first_chunk, n_tensors, chunk)
        offset = (chunk - tl.load(first_chunk + tensor)) * (ROWS * COLUMNS * TILES)
        begin = _element_pointer(tl.load(addresses + tensor), TYPE, ALIGNED) + offset
        n = tl.load(numel + tensor) - offset
        if n >= ROWS * COLUMNS * TILES:
            for tile in range(TILES * ROWS // 2):
                at = tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
                x = tl.load(begin + at)
                tl.store(begin + at, (widened(x, TYPE) * factor).to(x.dtype))
        else:
            for tile in range(TILES * ROWS // 2):
                at = tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
                x = tl.load(begin + at, mask=at < n, other=0.0)
                tl.store(begin + at, (widened(x, TYPE) * factor).to(x.dtype), mask=at < n)
