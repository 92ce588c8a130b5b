"""Device code of the Triton kernels for residual adds: sum, backward mask, branch statistics."""

from __future__ import annotations

from contextlib import suppress

from gradprobe.ops.triton.device import (
    N_STATS,
    chunk_statistics,
    jit,
    load_elements,
    magnitude_bits,
    range_factor,
    result_tile,
    store_partial,
    widened,
)

with suppress(ImportError):  # `launcher.unavailable` reports it
    from triton import language as tl


@jit
def join_chunks(  # type: ignore[no-untyped-def]
    a,  # [numel]: x, or grad_y
    b,  # [numel]: f, or y
    out,  # [numel]: y, or grad_x
    numel,
    partials,  # [1, n_chunks, 6] float64; for "mask" [2, n_chunks, 6], of a and of out
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    OPERATION: tl.constexpr,
):
    """Computes a residual add ("add", "add_relu") or its backward ("mask") with statistics, one chunk per program."""
    chunk = tl.program_id(0).to(tl.int64)
    offset = chunk * (ROWS * COLUMNS * TILES)
    n = numel - offset
    to = partials + chunk * N_STATS
    if n >= ROWS * COLUMNS * TILES:
        if OPERATION == "mask":
            chunk_statistics(a + offset, a, out, n, to, TYPE, COLUMNS, ROWS, TILES, False, "none")
            to += tl.num_programs(0).to(tl.int64) * N_STATS
        chunk_statistics(a + offset, b + offset, out + offset, n, to, TYPE, COLUMNS, ROWS, TILES, False, OPERATION)
    else:
        if OPERATION == "mask":
            chunk_statistics(a + offset, a, out, n, to, TYPE, COLUMNS, ROWS, TILES, True, "none")
            to += tl.num_programs(0).to(tl.int64) * N_STATS
        chunk_statistics(a + offset, b + offset, out + offset, n, to, TYPE, COLUMNS, ROWS, TILES, True, OPERATION)


@jit
def _chunk_products(  # type: ignore[no-untyped-def]
    a,
    b,
    n,
    to,
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Writes the sum of the products of `n` elements at `a` and `b` to `to` [6], scaled like a sum of squares.

    Its magnitude is the geometric mean of the largest magnitudes of `a` and `b`, rounded to 0, 2**-600, 1 or 2**600.
    """
    # Half a tile at a time: the operands are held as float64.
    place = tl.arange(0, ROWS // 2)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mean_bits = tl.full([], 0x3FF0000000000000, tl.int64)
    if TYPE == "f64":
        a_max = tl.zeros([COLUMNS], tl.int64)
        b_max = tl.zeros([COLUMNS], tl.int64)
        for tile in range(TILES * 2):
            at = tile * (ROWS // 2) * COLUMNS + place
            a_max = tl.maximum(a_max, tl.max(magnitude_bits(load_elements(a, at, n, MASKED), "f64"), axis=0))
            b_max = tl.maximum(b_max, tl.max(magnitude_bits(load_elements(b, at, n, MASKED), "f64"), axis=0))
        a_root = tl.sqrt(tl.max(a_max, axis=0).to(tl.float64, bitcast=True))
        b_root = tl.sqrt(tl.max(b_max, axis=0).to(tl.float64, bitcast=True))
        bits = magnitude_bits(a_root * b_root, "f64")
        mean_bits = tl.where(
            bits >= 0x7FF0000000000000, mean_bits, bits
        )  # products with NaN or infinity are not scaled
    factor = range_factor(mean_bits, "f64")
    sums = tl.zeros([COLUMNS], tl.float64)
    for tile in range(TILES * 2):
        at = tile * (ROWS // 2) * COLUMNS + place
        x = widened(load_elements(a, at, n, MASKED), TYPE).to(tl.float64) * factor
        y = widened(load_elements(b, at, n, MASKED), TYPE).to(tl.float64) * factor
        sums += tl.sum(x * y, axis=0)
    zero = factor * 0.0
    # Zero fits any range: a chunk of zeros must not decide the row's.
    magnitude = tl.where(mean_bits == 0, zero, 1.0 / factor)
    store_partial(to, zero, zero, tl.sum(sums, axis=0), magnitude.to(tl.int64, bitcast=True), zero, zero, "f64")


@jit
def branch_chunks(  # type: ignore[no-untyped-def]
    branch,  # [numel]
    shortcut,  # [numel]
    numel,
    partials,  # [2, n_chunks, 6] float64, of branch and of the products
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Computes the statistics of branch and the sum of its products with shortcut, one chunk per program."""
    chunk = tl.program_id(0).to(tl.int64)
    a = branch + chunk * (ROWS * COLUMNS * TILES)
    b = shortcut + chunk * (ROWS * COLUMNS * TILES)
    n = numel - chunk * (ROWS * COLUMNS * TILES)
    to = partials + chunk * N_STATS
    to_products = to + tl.num_programs(0).to(tl.int64) * N_STATS
    if n >= ROWS * COLUMNS * TILES:
        chunk_statistics(a, a, a, n, to, TYPE, COLUMNS, ROWS, TILES, False, "none")
        _chunk_products(a, b, n, to_products, TYPE, COLUMNS, ROWS, TILES, False)
    else:
        chunk_statistics(a, a, a, n, to, TYPE, COLUMNS, ROWS, TILES, True, "none")
        _chunk_products(a, b, n, to_products, TYPE, COLUMNS, ROWS, TILES, True)


@jit
def join_elements(  # type: ignore[no-untyped-def]
    a,  # [numel]: x, or grad_y
    b,  # [numel]: f, or y
    out,  # [numel]: y, or grad_x; may be a or b
    numel,
    TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    OPERATION: tl.constexpr,
):
    """Computes the results of `join_chunks` without statistics."""
    offset = tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS * TILES)
    n = numel - offset
    if n >= ROWS * COLUMNS * TILES:
        for tile in range(TILES * ROWS // 2):
            at = tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
            tl.store(out + offset + at, result_tile(a + offset, b + offset, at, n, TYPE, False, OPERATION))
    else:
        for tile in range(TILES * ROWS // 2):
            at = tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
            tl.store(out + offset + at, result_tile(a + offset, b + offset, at, n, TYPE, True, OPERATION), mask=at < n)
