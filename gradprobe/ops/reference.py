"""Statistics and scaling in plain torch: the reference that kernels are tested against, used where no kernel exists.

Works on every device and layout, in float64, without a host synchronisation. Reads bit patterns where arithmetic would
be wrong: under `torch.set_flush_denormal(True)` torch's conversions and comparisons treat subnormal numbers as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradprobe.errors import ArgumentError
from gradprobe.ops.row_math import clip_of, magnitude_exponent, merge_rows, power_of_two
from gradprobe.ops.rows import HIGHEST_POWER, LOWEST_POWER, N_MAGNITUDES, STATS, range_exponent

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # can be measured, but no kernel writes them
MEASURED_DTYPES = (*FLOAT_DTYPES, *FLOAT8_DTYPES)

# dtype -> integer dtype of the same width, mask of |x|, bits of infinity, mask of the fraction. Narrower dtypes are
# widened to float32 first.
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000, 0x007FFFFF),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
}

# Elements processed at once: bounds the memory of a call, even for an expanded tensor.
_PIECE_NUMEL = 1 << 19

# Computes the rows of K tensors, as `_rows` does.
_Rows = Callable[[Callable[[], Iterable[Tensor]], torch.dtype, torch.device, Tensor | int], Tensor]

# Tensors of up to _SMALL_NUMEL elements share tables of up to _TABLE_NUMEL: call overhead dominates their cost.
_SMALL_NUMEL = 1 << 12
_TABLE_NUMEL = 1 << 16


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Splits a tensor into flat pieces of at most `_PIECE_NUMEL` elements; copies at most one piece at a time."""
    if tensor.numel() <= _PIECE_NUMEL:
        yield tensor.reshape(-1).resolve_neg()
        return
    dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    length = tensor.shape[dim]
    step = max(1, _PIECE_NUMEL * length // tensor.numel())
    for start in range(0, length, step):
        yield from _pieces(tensor.narrow(dim, start, min(step, length - start)))


def _as_wide(piece: Tensor) -> Tensor:
    """Widens the dtypes below float32 to it: exact, and subnormal float16 and float8 numbers become normal."""
    return piece if piece.dtype in _BITS else piece.float()


def _scaled(piece: Tensor, factor: Tensor) -> Tensor:
    """Computes `piece * factor` in float64, [N]. Builds subnormal inputs from fraction bits, so none is flushed."""
    integer, mask, _, fraction = _BITS[piece.dtype]
    bits = piece.view(integer)
    is_subnormal = (bits & mask) <= fraction
    unit = 2.0**-149 if piece.dtype == torch.float32 else 2.0**-500
    # The unit of float64 subnormals, 2**-1074, is split in two: while denormals are flushed, the product is zero unless
    # `factor` is multiplied in between.
    rest = 1.0 if piece.dtype == torch.float32 else 2.0**-574
    magnitude = (bits & fraction).double() * unit * factor * rest
    return torch.where(is_subnormal, torch.where(bits < 0, -magnitude, magnitude), piece.double() * factor)


def _double_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns as float64 the numbers of a dtype of `_BITS` whose bits int64 integers hold."""
    if dtype == torch.float64:
        return bits.view(torch.float64)
    one = torch.ones((), dtype=torch.float64, device=bits.device)
    return _scaled(bits.to(_BITS[dtype][0]).view(dtype), one)


def _rows(
    tables: Callable[[], Iterable[Tensor]], dtype: torch.dtype, device: torch.device, n_padding: Tensor | int
) -> Tensor:
    """Computes the raw rows [K, 6] of K tensors.

    Args:
        tables: Returns the elements, the same in each call: one or more tables [K, N] with one tensor per line.
        dtype: Dtype of the tables.
        device: Device of the tables.
        n_padding: Number of zeros appended to each tensor, [K] or one number for all.
    """
    wide_dtype = dtype if dtype in _BITS else torch.float32
    integer, mask, infinity, _ = _BITS[wide_dtype]
    abs_max_bits = n_zero = n_nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    for table in tables():
        bits = _as_wide(table).view(integer) & mask
        abs_max_bits = torch.maximum(abs_max_bits, bits.amax(1))
        n_zero = n_zero + (bits == 0).sum(1)
        n_nonfinite = n_nonfinite + (bits >= infinity).sum(1)
    one = torch.ones((), dtype=torch.float64, device=device)
    abs_max = _double_of(abs_max_bits, wide_dtype)
    abs_max = torch.where(torch.isnan(abs_max), torch.nan, abs_max)  # a NaN loses its payload
    # Beside a NaN or infinity, finite elements are scaled down so that they cannot overflow; the sums are non-finite
    # anyway.
    exponent = torch.where(torch.isfinite(abs_max), range_exponent(abs_max), 600)
    factor = torch.where(exponent > 0, 2.0**-600, torch.where(exponent < 0, 2.0**600, one)).unsqueeze(1)
    sums = torch.zeros(3, 1, dtype=torch.float64, device=device)
    for table in tables():
        scaled = _scaled(_as_wide(table), factor)
        sums = sums + torch.stack((scaled.sum(1), scaled.abs().sum(1), scaled.square().sum(1)))
    return torch.stack((*sums, abs_max, (n_zero - n_padding).double(), n_nonfinite.double()), dim=1)


def _rows_of_small(tensors: Sequence[Tensor], rows: _Rows) -> Tensor:
    """Computes the rows of K tensors of one dtype in one table, shorter tensors padded with zeros."""
    flat = [tensor.detach().reshape(-1).resolve_neg() for tensor in tensors]
    table = pad_sequence(flat, batch_first=True)
    width = table.shape[1]
    numbers = torch.arange(width + 1, device=table.device)  # on the device: a copy from the host would synchronise
    n_padding = torch.stack([numbers[width - len(elements)] for elements in flat])
    return rows(lambda: [table], table.dtype, table.device, n_padding)


def _rows_of_large(tensor: Tensor, rows: _Rows) -> Tensor:
    """Computes the row of one tensor, piece by piece."""
    return rows(lambda: (piece.unsqueeze(0) for piece in _pieces(tensor.detach())), tensor.dtype, tensor.device, 0)


def _tables(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields groups of indices to measure together: small tensors of one dtype and similar size. Skips empty ones."""
    waiting: dict[tuple[torch.dtype, int], list[int]] = {}
    for k, tensor in enumerate(tensors):
        numel = tensor.numel()
        if numel > _SMALL_NUMEL:
            yield [k]
        elif numel > 0:
            kind = (tensor.dtype, 1 << (numel - 1).bit_length())
            table = waiting.setdefault(kind, [])
            table.append(k)
            if (len(table) + 1) * kind[1] > _TABLE_NUMEL:
                yield waiting.pop(kind)
    yield from waiting.values()


def check_tensors(
    tensors: Sequence[Tensor], device: torch.device, dtypes: Sequence[torch.dtype] = MEASURED_DTYPES
) -> None:
    """Raises ArgumentError, naming the index, for a tensor that no back end accepts."""
    for k, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ArgumentError(
                f"tensors[{k}]: needed a dtype of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.layout != torch.strided:
            raise ArgumentError(f"tensors[{k}]: needed a strided layout, got {tensor.layout}")
        if tensor.device != device:
            raise ArgumentError(f"tensors[{k}]: needed device {device}, got {tensor.device}")


def check_rows(rows: Tensor, n_tensors: int, name: str = "out", width: int = len(STATS)) -> None:
    """Raises ArgumentError unless `rows` can hold the rows of `n_tensors` tensors."""
    if rows.dtype != torch.float64 or list(rows.shape) != [n_tensors, width] or not rows.is_contiguous():
        got = f"{str(rows.dtype).removeprefix('torch.')} of shape {list(rows.shape)} with strides {list(rows.stride())}"
        raise ArgumentError(f"{name}: needed contiguous float64 of shape [{n_tensors}, {width}], got {got}")


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the raw statistics of each tensor into a row of `out`.

    Args:
        tensors: K tensors of `MEASURED_DTYPES`, any layout, on the device of `out`.
        out: [K, 6] float64, contiguous; gets raw rows as described in `rows`.

    Raises:
        ArgumentError: A tensor or `out` does not fit; the message names it, what was needed and what was given.

    Example:
        >>> out = torch.empty(1, 6, dtype=torch.float64)
        >>> grad_stats_into([torch.tensor([3.0, -4.0, 0.0])], out)
        >>> out.tolist()
        [[-1.0, 7.0, 25.0, 4.0, 1.0, 0.0]]
    """
    check_rows(out, len(tensors))
    check_tensors(tensors, out.device)
    if tensors:
        _measure(tensors, _rows, out)


def _measure(tensors: Sequence[Tensor], rows_of: _Rows, out: Tensor) -> None:
    """Writes the row of each tensor into `out`, small ones together; that of an empty one is zero."""
    rows = [torch.zeros_like(out[0])] * len(tensors)
    for table in _tables(tensors):
        if tensors[table[0]].numel() > _SMALL_NUMEL:
            measured = _rows_of_large(tensors[table[0]], rows_of)
        else:
            measured = _rows_of_small([tensors[k] for k in table], rows_of)
        for k, row in zip(table, measured.unbind(), strict=True):
            rows[k] = row
    out.copy_(torch.stack(rows))


def magnitudes_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Counts the elements of each tensor by magnitude.

    Args:
        tensors: K tensors of `MEASURED_DTYPES`, any layout, on the device of `out`.
        out: [K, 285] float64, contiguous; gets rows of magnitudes as described in `rows`.

    Raises:
        ArgumentError: A tensor or `out` does not fit; the message names it, what was needed and what was given.

    Example:
        >>> out = torch.empty(1, N_MAGNITUDES, dtype=torch.float64)
        >>> magnitudes_into([torch.tensor([0.0, 3.0, -4.0, 5.0])], out)
        >>> [(k, count) for k, count in enumerate(out[0].tolist()) if count]
        [(0, 1.0), (153, 2.0), (154, 1.0), (282, 5.0), (283, 3.125), (284, 3.7578125)]
    """
    check_rows(out, len(tensors), width=N_MAGNITUDES)
    check_tensors(tensors, out.device)
    if tensors:
        _measure(tensors, _magnitude_rows, out)


def _magnitude_rows(
    tables: Callable[[], Iterable[Tensor]], dtype: torch.dtype, device: torch.device, n_padding: Tensor | int
) -> Tensor:
    """Computes the rows of magnitudes [K, 285] of K tensors; the arguments are those of `_rows`."""
    wide_dtype = dtype if dtype in _BITS else torch.float32
    integer, mask, infinity, _ = _BITS[wide_dtype]
    limits = _limits(wide_dtype, device)  # [L]
    up_to = abs_max_bits = torch.zeros((), dtype=torch.int64, device=device)
    numel = 0
    for table in tables():
        bits = _as_wide(table).view(integer) & mask
        numel += table.shape[1]
        # [K, L], elements whose magnitude is at most each limit
        up_to = up_to + torch.searchsorted(bits.sort(1).values, limits.repeat(len(table), 1), right=True)
        abs_max_bits = torch.maximum(abs_max_bits, torch.where(bits < infinity, bits, 0).amax(1))
    n = torch.full_like(abs_max_bits, numel) - n_padding  # [K]
    up_to = up_to - (numel - n).unsqueeze(1)
    abs_max = _double_of(abs_max_bits, wide_dtype)
    # Over a power of two near the largest magnitude, no fourth power that matters leaves the range of float64.
    unit = power_of_two(-magnitude_exponent(abs_max)).unsqueeze(1)
    sums = torch.zeros(2, 1, dtype=torch.float64, device=device)
    for table in tables():
        squares = _scaled(_as_wide(table), unit).square()
        sums = sums + torch.stack((squares.sum(1), squares.square().sum(1)))
    counts = up_to.diff(dim=1, prepend=torch.zeros_like(up_to[:, :1]), append=n.unsqueeze(1))
    return torch.cat((counts.double(), abs_max.unsqueeze(1), sums.T), dim=1)


def _limits(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the bits of zero, the powers of two that part the bins, and the largest finite number, on the device."""
    integer, _, infinity, _ = _BITS[dtype]
    powers = torch.arange(LOWEST_POWER, HIGHEST_POWER + 1, device=device)
    if dtype == torch.float64:
        bits = (powers + 1023) << 52
    else:  # subnormal ones are multiples of 2**-149; 2**-150 itself becomes 0
        bits = torch.where(powers < -126, (1 << (powers + 150).clamp(max=24)) >> 1, (powers + 127) << 23)
    ends = torch.arange(2, device=device) * (infinity - 1)
    return torch.cat((ends[:1], bits, ends[1:])).clamp(max=infinity - 1).to(integer)


def check_no_overlap(tensor: Tensor, name: str) -> None:
    """Raises ArgumentError if elements may overlap: each stride must exceed the span of the smaller ones."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= span and tensor.numel() > 0:
            raise ArgumentError(
                f"{name}: needed elements that do not overlap in memory, "
                f"got shape {list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        span += stride * (size - 1)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies each tensor by `coefficient` in place, rounding each product once to the tensor's dtype.

    Args:
        tensors: float16, bfloat16, float32 or float64 tensors, any layout without overlapping elements. Products are
            computed in float64 for float64 tensors, in float32 for the others.
        coefficient: One element, float32 or float64, on the tensors' device.

    Raises:
        ArgumentError: A tensor does not fit; the message names it, what was needed and what was given.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> scale_([x], torch.tensor(0.5))
        >>> x.tolist()
        [0.5, 1.0]
    """
    check_tensors(tensors, coefficient.device, FLOAT_DTYPES)
    for k, tensor in enumerate(tensors):
        check_no_overlap(tensor, f"tensors[{k}]")
    scalar = coefficient.detach().reshape(())
    for tensor in tensors:
        target = tensor.detach()  # shares storage and version counter
        if target.dtype in _BITS:
            target.mul_(scalar.to(target.dtype))
        else:
            target.copy_(target.float().mul_(scalar.float()))


def clip_coefficient(rows: Tensor, max_norm: float) -> Tensor:
    """Computes the total norm of K tensors and the factor that clips it.

    Args:
        rows: [K, 6] float64, contiguous; raw rows of the tensors.
        max_norm: Largest total norm allowed.

    Returns:
        [2] float64 on the device of the rows: the Euclidean norm of all elements together, and the factor, at most 1.
        As in `torch.nn.utils.clip_grad_norm_`, the factor is NaN if the norm is.

    Raises:
        ArgumentError: `rows` does not fit.

    Example:
        >>> raw = torch.empty(2, 6, dtype=torch.float64)
        >>> grad_stats_into([torch.tensor([3.0]), torch.tensor([4.0])], raw)
        >>> [round(value, 6) for value in clip_coefficient(raw, 2.5).tolist()]
        [5.0, 0.5]
    """
    check_rows(rows, len(rows) if rows.dim() else 0, "rows")
    row = merge_rows(rows.unsqueeze(0)) if len(rows) else rows.new_zeros(1, len(STATS))
    return clip_of(row, max_norm)
