"""Six statistics of each tensor in one pass, and multi-tensor scaling: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)

from gradprobe.errors import ArgumentError
from gradprobe.ops.dispatch import Backend, resolve
from gradprobe.ops.reference import FLOAT8_DTYPES, FLOAT_DTYPES, MEASURED_DTYPES
from gradprobe.ops.row_math import empty_rows, rows_by, true_rows
from gradprobe.ops.rows import STATS
from gradprobe.ops.schemas import COUNT_IF, GRAD_STATS_INTO

PLAIN = frozenset((Tensor, nn.Parameter))  # classes whose tensors run no code of their own

_STRIDED = torch.strided
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_MEASURED = frozenset((*MEASURED_DTYPES, *_COMPLEX))
_SCALED = frozenset((*FLOAT_DTYPES, *_COMPLEX))


def refusal(tensor: Tensor, writable: bool = False) -> str | None:
    """Says why a tensor cannot be measured, or scaled.

    Args:
        tensor: Any tensor.
        writable: It is to be scaled.

    Returns:
        What was needed and what was given, or None if it can.

    Example:
        >>> refusal(torch.zeros(2, dtype=torch.bool))
        'needed a dtype of float16, bfloat16, float32, float64, float8_e4m3fn, float8_e5m2 or complex, got bool'
        >>> refusal(torch.zeros(2)) is None
        True
    """
    if type(tensor) not in PLAIN and not torch.compiler.is_compiling():
        if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
            return (
                f"needed a tensor with data of its own, got a {type(tensor).__name__}, which computes operators "
                "itself; pass the tensors that it holds"
            )
        tensor = _without_class(tensor)
    if tensor.dtype not in (_SCALED if writable else _MEASURED):
        dtypes = FLOAT_DTYPES if writable else MEASURED_DTYPES
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"needed a dtype of {names} or complex, got {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.layout is not _STRIDED and tensor.layout not in (torch.sparse_coo, *_COMPRESSED):
        return f"needed a strided or sparse layout, got {tensor.layout}"
    if tensor.is_nested:
        return "needed one tensor, got a nested one; pass its parts"
    if tensor.is_meta:
        return "needed device cpu, cuda or another that holds data, got meta"
    if not torch.compiler.is_compiling() and _is_hidden(tensor):
        return "needed a tensor outside torch.func.vmap and functionalize, which hide its data, got one inside"
    return None


def _without_class(tensor: Tensor) -> Tensor:
    """Returns the same memory as a plain tensor, without calling `__torch_function__` of its class."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


def _is_hidden(tensor: Tensor) -> bool:
    """Returns whether a transform stands between the operators and the tensor's data."""
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor) or torch._is_functional_tensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return is_legacy_batchedtensor(tensor)  # of torch.autograd.grad(is_grads_batched=True)


def _strided(tensors: Iterable[Tensor], *, writable: bool) -> list[Tensor]:
    """Checks tensors and replaces sparse ones by their values; the caller handles complex ones."""
    if isinstance(tensors, Tensor):
        raise ArgumentError("tensors: needed a sequence of tensors, got one Tensor; put it into a list")
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        kind = type(torch.empty(0, device="cpu"))
        if kind is not Tensor:
            raise ArgumentError(f"tensors: needed a mode in which operators compute, got one of {kind.__name__}s")
    checked: list[Tensor] = []
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"tensors[{k}]: needed a Tensor, got {type(tensor).__name__}")
        reason = refusal(tensor, writable)
        if reason is not None:
            raise ArgumentError(f"tensors[{k}]: {reason}")
        if type(tensor) not in PLAIN:
            tensor = _without_class(tensor)
        if checked and tensor.device != checked[0].device:
            raise ArgumentError(
                f"tensors[{k}]: needed device {checked[0].device}, that of tensors[0], got {tensor.device}"
            )
        if tensor.layout is not _STRIDED:
            if tensor.layout in _COMPRESSED:
                tensor = tensor.values()
            else:  # scaling each duplicate of an index scales their sum; statistics need the sum itself
                tensor = tensor._values() if writable else _summed_values(tensor)
        checked.append(tensor)
    return checked


def _summed_values(tensor: Tensor) -> Tensor:
    """Returns the values of a sparse COO tensor, duplicates summed."""
    with torch._C._AutoDispatchBelowAutograd():  # autograd's coalesce fails on tensors made in inference mode
        if tensor.dtype == torch.complex32:  # torch cannot sum it
            tensor = tensor.to(torch.complex64)
        elif tensor.dtype in FLOAT8_DTYPES:  # nor these
            tensor = tensor.to(torch.float32)
        return tensor.coalesce().values()


def _absolute(tensor: Tensor) -> Tensor:
    """Returns the absolute values of a complex tensor; float32 for complex32, since sqrt(2) * 65504 overflows half."""
    return tensor.to(torch.complex64).abs() if tensor.dtype == torch.complex32 else tensor.abs()


def dense_values(tensor: Tensor) -> Tensor:
    """Returns the values that statistics of a tensor cover, as a real dense tensor.

    Args:
        tensor: Any layout; a dtype of `MEASURED_DTYPES` or complex.

    Returns:
        The specified values of a sparse tensor, duplicates summed; the absolute values of a complex one; otherwise the
        tensor itself.

    Raises:
        ArgumentError: The tensor has another dtype or layout.

    Example:
        >>> dense_values(torch.tensor([3 + 4j]))
        tensor([5.])
    """
    (strided,) = _strided([tensor], writable=False)
    return _absolute(strided.detach()) if strided.is_complex() else strided


def grad_stats(tensors: Iterable[Tensor], *, backend: str = "auto") -> Tensor:
    """Computes six statistics of each tensor, reading every element once.

    Accurate to 1e-6 for every magnitude that the dtypes can hold, including subnormal numbers, whether or not
    `torch.set_flush_denormal` is on. NaN and infinity propagate into sums and maximum and are counted.

    Args:
        tensors: K tensors on one device, any shapes and layouts; float16, bfloat16, float32, float64, float8_e4m3fn,
            float8_e5m2 and complex dtypes may be mixed. Sparse tensors count their specified values, duplicates summed;
            complex tensors count absolute values. A subclass is measured as the memory that it is; one with
            `__torch_dispatch__` has none and is refused.
        backend: "auto", "native", "triton" or "reference"; see `backends`.

    Returns:
        [K, 6] float64 on the tensors' device, columns in the order of `STATS`. Rows of empty tensors are zero. A sum
        beyond the range of float64 is infinite here; `norms` of raw rows is not.

    Raises:
        ArgumentError: An element is not a tensor, or has an unsupported class, dtype, layout or device; the message
            names its index.
        BackendError: The named back end cannot run on that device.

    Example:
        >>> grad_stats([torch.tensor([3.0, -4.0, 0.0]), torch.tensor([1e-25, float("inf")])])
        tensor([[-1.,  7., 25.,  4.,  1.,  0.],
                [inf, inf, inf, inf,  0.,  1.]], dtype=torch.float64)
    """
    strided = _strided(tensors, writable=False)
    if not strided:
        return torch.zeros(0, len(STATS), dtype=torch.float64, device="cpu")
    rows = empty_rows(len(strided), strided[0])
    real = [_absolute(t.detach()) if t.is_complex() else t for t in strided]
    resolve(backend, rows.device).grad_stats_into(real, rows)
    return true_rows(rows)


def grad_stats_into(tensors: Sequence[Tensor], out: Tensor, backend: Backend) -> None:
    """Writes raw rows into `out`: the hot path, which relies on the checks of the back end.

    Args:
        tensors: List of K dense tensors of `MEASURED_DTYPES` on the device of `out`.
        out: [K, 6] float64, contiguous; may be a view of a larger tensor.
        backend: The result of `resolve` for that device.

    Raises:
        RuntimeError, ArgumentError: A tensor or `out` does not fit; the message names it, what was needed and what
            came.

    Example:
        >>> out = torch.empty(1, 6, dtype=torch.float64)
        >>> grad_stats_into([torch.tensor([3.0, -4.0])], out, resolve("auto", out.device))
        >>> true_rows(out).tolist()
        [[-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]]
    """
    backend.grad_stats_into(tensors, out)


def raw_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Computes the raw rows of tensors through torch's dispatcher, which chooses the kernels of their device.

    Args:
        tensors: K tensors as for `grad_stats_into`, at least one.

    Returns:
        [K, 6] float64, raw rows.

    Example:
        >>> raw_rows([torch.tensor([3.0, -4.0])]).tolist()
        [[-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]]
    """
    return rows_by(GRAD_STATS_INTO, list(tensors))


@contextmanager
def counting_if(flag: Tensor) -> Iterator[None]:
    """Makes kernels launched inside the block read a flag when they run, and skip the statistics if it is 0.

    Args:
        flag: One int32 on the kernels' device. It must outlive the CUDA graphs that captured the launches.
    """
    COUNT_IF(flag, True)
    try:
        yield
    finally:
        COUNT_IF(flag, False)


def scale_(tensors: Iterable[Tensor], coefficient: Tensor, *, backend: str = "auto") -> None:
    """Multiplies tensors in place by a coefficient that stays on the device, e.g. for gradient clipping.

    Each product is rounded once: computed in float64 for float64 tensors, in float32 for the other dtypes. For half
    precision, `tensor.mul_(coefficient)` may differ: on a GPU it also rounds the coefficient to half precision.

    Args:
        tensors: Tensors on one device; float16, bfloat16, float32, float64 or complex; any layout without overlapping
            elements.
        coefficient: One element, float32 or float64, on the same device.
        backend: "auto", "native", "triton" or "reference"; see `backends`.

    Raises:
        ArgumentError: An argument does not fit; the message names it, what was needed and what was given.
        BackendError: The named back end cannot run on that device.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> scale_([x], torch.tensor(0.5))
        >>> x
        tensor([0.5000, 1.0000])
    """
    strided = _strided(tensors, writable=True)
    if coefficient.dtype not in (torch.float32, torch.float64) or coefficient.numel() != 1:
        raise ArgumentError(
            "coefficient: needed one float32 or float64 element, "
            f"got {str(coefficient.dtype).removeprefix('torch.')} of shape {list(coefficient.shape)}"
        )
    if not strided:
        return
    if coefficient.device != strided[0].device:
        raise ArgumentError(f"coefficient: needed device {strided[0].device}, got {coefficient.device}")
    with torch.no_grad():
        # The coefficient is real, so scaling the base of a lazily conjugated or negated tensor is the same.
        bases = [t.conj() if t.is_conj() else torch._neg_view(t) if t.is_neg() else t for t in strided]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in bases]
        resolve(backend, coefficient.device).scale_(real, coefficient)
