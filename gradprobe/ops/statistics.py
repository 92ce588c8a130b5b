"""Six statistics of each tensor in one pass, and multi-tensor scaling: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops.dispatch import Backend, resolve
from gradprobe.ops.reference import FLOAT_DTYPES
from gradprobe.ops.row_math import true_rows
from gradprobe.ops.rows import STATS
from gradprobe.ops.schemas import COUNT_IF

_COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)


def _plain(tensors: Iterable[Tensor], needed: tuple[torch.dtype, ...], *, writable: bool) -> list[Tensor]:
    """Checks tensors and turns them into dense ones; complex ones are handled by the caller."""
    if isinstance(tensors, Tensor):
        raise ArgumentError("tensors: needed a sequence of tensors, got one Tensor; put it into a list")
    checked: list[Tensor] = []
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"tensors[{k}]: needed a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in needed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in needed)
            raise ArgumentError(
                f"tensors[{k}]: needed a dtype of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        if checked and tensor.device != checked[0].device:
            raise ArgumentError(
                f"tensors[{k}]: needed device {checked[0].device}, that of tensors[0], got {tensor.device}"
            )
        if tensor.layout == torch.sparse_coo:
            # A product reaches duplicates of an index one by one, their sum included; statistics need the sum itself.
            tensor = tensor._values() if writable else tensor.detach().coalesce().values()
        elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
            tensor = tensor.values()
        elif tensor.layout != torch.strided:
            raise ArgumentError(f"tensors[{k}]: needed a strided or sparse layout, got {tensor.layout}")
        checked.append(tensor)
    return checked


def _absolute(tensor: Tensor) -> Tensor:
    """Absolute values of a complex tensor; of half precision in float32, whose range holds sqrt(2) * 65504."""
    return tensor.to(torch.complex64).abs() if tensor.dtype == torch.complex32 else tensor.abs()


def dense_values(tensor: Tensor) -> Tensor:
    """Gives the values whose statistics count, as a real dense tensor.

    Args:
        tensor: any layout, of float16, bfloat16, float32, float64 or complex dtype.

    Returns:
        The specified values of a sparse tensor, duplicates summed; the absolute values of a complex one; the tensor
        itself otherwise.

    Raises:
        ArgumentError: a tensor of another dtype or layout.

    Example:
        >>> dense_values(torch.tensor([3 + 4j]))
        tensor([5.])
    """
    (plain,) = _plain([tensor], FLOAT_DTYPES + _COMPLEX_DTYPES, writable=False)
    return _absolute(plain.detach()) if plain.is_complex() else plain


def grad_stats(tensors: Iterable[Tensor], *, backend: str = "auto") -> Tensor:
    """Takes six statistics of each tensor, reading every element once.

    Right to 1e-6 for every magnitude that the dtypes hold, subnormal numbers included, whether or not
    `torch.set_flush_denormal` is on. NaN and infinity propagate into sums and maximum and are counted.

    Args:
        tensors: K tensors on one device, any shape and layout, of float16, bfloat16, float32, float64 or complex dtype,
            mixed as they come. Of sparse tensors the specified values are taken, duplicates summed; of complex ones the
            absolute values.
        backend: "auto", "native", "triton" or "reference"; see `backends`.

    Returns:
        [K, 6] float64 on the tensors' device, columns in the order of `STATS`. Rows of empty tensors are zero. A sum
        beyond the range of float64 is infinite here; take `norms` of raw rows where that matters.

    Raises:
        ArgumentError: a tensor of another dtype, layout or device, or no tensor at all; the message names its index.
        BackendError: the named backend cannot run there.

    Example:
        >>> grad_stats([torch.tensor([3.0, -4.0, 0.0]), torch.tensor([1e-25, float("inf")])])
        tensor([[-1.,  7., 25.,  4.,  1.,  0.],
                [inf, inf, inf, inf,  0.,  1.]], dtype=torch.float64)
    """
    plain = _plain(tensors, FLOAT_DTYPES + _COMPLEX_DTYPES, writable=False)
    if not plain:
        return torch.zeros(0, len(STATS), dtype=torch.float64)
    real = [_absolute(t.detach()) if t.is_complex() else t for t in plain]
    device = real[0].device
    out = torch.empty(len(real), len(STATS), dtype=torch.float64, device=device)
    resolve(backend, device).grad_stats_into(real, out)
    return true_rows(out)


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor, backend: Backend) -> None:
    """Writes raw rows into `out`: the hot path, with the checks that the backend itself makes.

    Args:
        tensors: list of K dense tensors of float16, bfloat16, float32 or float64 on the device of `out`.
        out: [K, 6] float64, contiguous; may be a view of a larger tensor.
        backend: what `resolve` gave for that device.

    Raises:
        RuntimeError: a tensor or `out` is not as needed; the message names it and what came.

    Example:
        >>> out = torch.empty(1, 6, dtype=torch.float64)
        >>> grad_stats_into([torch.tensor([3.0, -4.0])], out, resolve("auto", out.device))
        >>> norms(out).tolist()
        [5.0]
    """
    backend.grad_stats_into(tensors, out)


@contextmanager
def counting_if(flag: Tensor) -> Iterator[None]:
    """Has the kernels that are launched inside the block ask a flag each time they run, before they take statistics.

    Args:
        flag: One int32 on their device, which must outlive the CUDA graphs that hold the launches.
    """
    COUNT_IF(flag, True)
    try:
        yield
    finally:
        COUNT_IF(flag, False)


def scale_(tensors: Iterable[Tensor], coefficient: Tensor, *, backend: str = "auto") -> None:
    """Multiplies tensors in place by a coefficient that stays on the device, as gradient clipping needs it.

    Each product is rounded once, as `tensor.mul_(coefficient)` rounds it: computed in float64 for float64 tensors, in
    float32 for the other dtypes.

    Args:
        tensors: tensors on one device, of float16, bfloat16, float32, float64 or complex dtype, any layout without
            overlapping elements.
        coefficient: one element, float32 or float64, on the same device.
        backend: "auto", "native", "triton" or "reference"; see `backends`.

    Raises:
        ArgumentError: an argument is not as needed; the message names it and what came.
        BackendError: the named backend cannot run there.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> scale_([x], torch.tensor(0.5))
        >>> x
        tensor([0.5000, 1.0000])
    """
    plain = _plain(tensors, FLOAT_DTYPES + _COMPLEX_DTYPES, writable=True)
    if coefficient.dtype not in (torch.float32, torch.float64) or coefficient.numel() != 1:
        raise ArgumentError(
            "coefficient: needed one float32 or float64 element, "
            f"got {str(coefficient.dtype).removeprefix('torch.')} of shape {list(coefficient.shape)}"
        )
    if not plain:
        return
    if coefficient.device != plain[0].device:
        raise ArgumentError(f"coefficient: needed device {plain[0].device}, got {coefficient.device}")
    with torch.no_grad():
        # Lazily conjugated and negated tensors are scaled through their base: the coefficient is real.
        bases = [t.conj() if t.is_conj() else torch._neg_view(t) if t.is_neg() else t for t in plain]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in bases]
        resolve(backend, coefficient.device).scale_(real, coefficient)
