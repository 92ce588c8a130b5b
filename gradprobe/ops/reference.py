"""The statistics and the scaling in plain torch: the truth that kernels are tested against, the backend of last resort.

Works on every device and in every layout, in float64, without a host synchronisation. Reads the bit patterns where
arithmetic would not do: `torch.set_flush_denormal(True)` makes torch's own conversions and comparisons take subnormal
numbers for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradprobe.errors import ArgumentError
from gradprobe.ops.rows import STATS, range_exponent

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# dtype -> the integer of the same width, mask of |x|, bits of infinity, mask of the fraction (for types whose
# subnormals need care).
_BITS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000, 0x007FFFFF),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
}

# Elements that are worked on at once: bounds the memory of a call, also for an expanded tensor of any size.
_PIECE_NUMEL = 1 << 19

# Tensors up to the first size share tables of up to the second: there the calls of torch take longer than the work.
_SMALL_NUMEL = 1 << 12
_TABLE_NUMEL = 1 << 16


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Splits a tensor into flat pieces of at most `_PIECE_NUMEL` elements; only a piece is ever copied."""
    if tensor.numel() <= _PIECE_NUMEL:
        yield tensor.reshape(-1).resolve_neg()
        return
    dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    length = tensor.shape[dim]
    step = max(1, _PIECE_NUMEL * length // tensor.numel())
    for start in range(0, length, step):
        yield from _pieces(tensor.narrow(dim, start, min(step, length - start)))


def _as_wide(piece: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: every value is exact, and no subnormal float16 stays subnormal."""
    return piece if piece.dtype in _BITS else piece.float()


def _scaled(piece: Tensor, factor: Tensor) -> Tensor:
    """`piece * factor` in float64, [N]; subnormal inputs are built from their fraction bits: none is flushed."""
    integer, mask, _, fraction = _BITS[piece.dtype]
    bits = piece.view(integer)
    is_subnormal = (bits & mask) <= fraction
    unit = 2.0**-149 if piece.dtype == torch.float32 else 2.0**-500
    # The unit of float64 subnormals is 2**-1074: split in two, since with FTZ that product is zero unless `factor`
    # comes between.
    rest = 1.0 if piece.dtype == torch.float32 else 2.0**-574
    magnitude = (bits & fraction).double() * unit * factor * rest
    return torch.where(is_subnormal, torch.where(bits < 0, -magnitude, magnitude), piece.double() * factor)


def _rows(
    tables: Callable[[], Iterable[Tensor]], dtype: torch.dtype, device: torch.device, n_padding: Tensor | int = 0
) -> Tensor:
    """The raw rows [K, 6] of K tensors.

    Args:
        tables: gives the elements, the same each time: one or more tables [K, N], a tensor to a line.
        dtype: of the tables.
        device: of the tables.
        n_padding: how many zeros were added to each tensor, [K] or for all.
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
    if wide_dtype == torch.float64:
        abs_max = abs_max_bits.view(torch.float64)
    else:
        abs_max = _scaled(abs_max_bits.to(integer).view(wide_dtype), one)
    abs_max = torch.where(torch.isnan(abs_max), torch.nan, abs_max)  # a NaN loses its payload
    # With a NaN or infinity among them, finite elements are scaled down so that they cannot overflow: the sums are
    # non-finite anyway.
    exponent = torch.where(torch.isfinite(abs_max), range_exponent(abs_max), 600)
    factor = torch.where(exponent > 0, 2.0**-600, torch.where(exponent < 0, 2.0**600, one)).unsqueeze(1)
    sums = torch.zeros(3, 1, dtype=torch.float64, device=device)
    for table in tables():
        scaled = _scaled(_as_wide(table), factor)
        sums = sums + torch.stack((scaled.sum(1), scaled.abs().sum(1), scaled.square().sum(1)))
    return torch.stack((*sums, abs_max, (n_zero - n_padding).double(), n_nonfinite.double()), dim=1)


def _rows_of_small(tensors: Sequence[Tensor]) -> Tensor:
    """The raw rows [K, 6] of K tensors of one dtype, in one table: shorter ones are filled up with zeros."""
    flat = [tensor.detach().reshape(-1).resolve_neg() for tensor in tensors]
    table = pad_sequence(flat, batch_first=True)
    width = table.shape[1]
    numbers = torch.arange(width + 1, device=table.device)  # on the device: a copy from the host would wait
    n_padding = torch.stack([numbers[width - len(elements)] for elements in flat])
    return _rows(lambda: [table], table.dtype, table.device, n_padding)


def _rows_of_large(tensor: Tensor) -> Tensor:
    """The raw row [1, 6] of one tensor, of which only a piece is ever copied."""
    return _rows(lambda: (piece.unsqueeze(0) for piece in _pieces(tensor.detach())), tensor.dtype, tensor.device)


def _tables(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Chooses which tensors to measure together: small ones of one dtype and of like size; none that is empty."""
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


def check_tensors(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Refuses what no backend takes, by the index of the tensor."""
    for k, tensor in enumerate(tensors):
        if tensor.dtype not in FLOAT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise ArgumentError(
                f"tensors[{k}]: needed a dtype of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.layout != torch.strided:
            raise ArgumentError(f"tensors[{k}]: needed a strided layout, got {tensor.layout}")
        if tensor.device != device:
            raise ArgumentError(f"tensors[{k}]: needed device {device}, got {tensor.device}")


def check_rows(out: Tensor, n_tensors: int) -> None:
    """Refuses an output that cannot take the rows of `n_tensors` tensors."""
    if out.dtype != torch.float64 or list(out.shape) != [n_tensors, len(STATS)] or not out.is_contiguous():
        raise ArgumentError(
            f"out: needed contiguous float64 of shape [{n_tensors}, 6], got {str(out.dtype).removeprefix('torch.')} "
            f"of shape {list(out.shape)} with strides {list(out.stride())}"
        )


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Writes the raw statistics of each tensor into a row of `out`.

    Args:
        tensors: K tensors of float16, bfloat16, float32 or float64, any layout, on the device of `out`.
        out: [K, 6] float64, columns in the order of `gradprobe.STATS`. Sums are of `x * 2**-e` with e =
            `range_exponent(abs_max)`.

    Raises:
        ArgumentError: a tensor or `out` is not as needed; the message names it and what came.

    Example:
        >>> out = torch.empty(1, 6, dtype=torch.float64)
        >>> grad_stats_into([torch.tensor([3.0, -4.0, 0.0])], out)
        >>> out.tolist()
        [[-1.0, 7.0, 25.0, 4.0, 1.0, 0.0]]
    """
    check_rows(out, len(tensors))
    check_tensors(tensors, out.device)
    if not tensors:
        return
    rows = [torch.zeros(len(STATS), dtype=torch.float64, device=out.device)] * len(tensors)  # empty ones stay so
    for table in _tables(tensors):
        if tensors[table[0]].numel() > _SMALL_NUMEL:
            measured = _rows_of_large(tensors[table[0]])
        else:
            measured = _rows_of_small([tensors[k] for k in table])
        for k, row in zip(table, measured.unbind(), strict=True):
            rows[k] = row
    out.copy_(torch.stack(rows))


def check_no_overlap(tensor: Tensor, name: str) -> None:
    """Refuses a tensor of which two indices may share an element: a stride has to reach over what smaller ones span."""
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
        tensors: float16, bfloat16, float32 or float64 tensors, any layout without overlap. The product is computed in
            float32 for the first three, in float64 for the last.
        coefficient: one element, float32 or float64, on the tensors' device.

    Raises:
        ArgumentError: a tensor is not as needed; the message names it and what came.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> scale_([x], torch.tensor(0.5))
        >>> x.tolist()
        [0.5, 1.0]
    """
    check_tensors(tensors, coefficient.device)
    for k, tensor in enumerate(tensors):
        check_no_overlap(tensor, f"tensors[{k}]")
    scalar = coefficient.detach().reshape(())
    for tensor in tensors:
        target = tensor.detach()  # shares storage and version counter
        if target.dtype in _BITS:
            target.mul_(scalar.to(target.dtype))
        else:
            target.copy_(target.float().mul_(scalar.float()))
