"""Calls the emulated kernels of a built library through ctypes, on tensors in guarded memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emulation import float8

WRITTEN = ("f16", "bf16", "f32", "f64")
ELEMENTS = (*WRITTEN, "e4m3", "e5m2")  # by gradprobe::cuda::Element
ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "e4m3": 1, "e5m2": 1}
CHUNK_BYTES = 64 * 1024
VECTOR_BYTES = 16


def encode(values: NDArray[np.float64], element: str) -> NDArray[np.generic]:
    """Rounds values to the element type. bfloat16 is returned as bit patterns in uint16, float8 in uint8."""
    if element in float8.NUMBERS:
        return float8.encode(values, element)
    with np.errstate(over="ignore", invalid="ignore"):
        if element == "f64":
            return values.astype(np.float64)
        if element == "f16":
            return values.astype(np.float16)
        single = values.astype(np.float32)
    if element == "f32":
        return single
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded).astype(np.uint16)


def decode(storage: NDArray[np.generic], element: str) -> NDArray[np.float64]:
    """Returns the exact values as float64."""
    if element in float8.NUMBERS:
        return float8.NUMBERS[element][storage.astype(np.uint8)]
    if element == "bf16":
        return (storage.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return storage.astype(np.float64)


class _Span(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("numel", ctypes.c_int64), ("row", ctypes.c_int64)]


@dataclass
class Block:
    """A tensor to place in device memory, `offset` elements after a 16-byte boundary."""

    storage: NDArray[np.generic]
    element: str
    offset: int = 0


class KernelError(Exception):
    """A launch failed, or the emulation found a violation."""


class Kernels:
    """The kernels of one built library.

    Args:
        library: Returned by `build`.
        guard_bytes: Number of 0xFF bytes (NaN in every type) around each tensor. 0 under the address sanitizer, which
            knows the exact ends.
    """

    def __init__(self, library: Path, guard_bytes: int = 64) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_error.restype = ctypes.c_char_p
        self._library.emulated_allocate.restype = ctypes.c_void_p
        self._library.emulated_allocate.argtypes = [ctypes.c_int64]
        self._library.emulated_free.argtypes = [ctypes.c_void_p]
        self._library.emulated_shared_bytes.restype = ctypes.c_uint64
        self._library.emulated_launches.restype = ctypes.c_int64
        self._library.emulated_seed.argtypes = [ctypes.c_uint64]
        self._library.emulated_run_only.argtypes = [ctypes.c_int64]
        self._guard_bytes = guard_bytes

    def seed(self, value: int) -> None:
        """Seeds the order of threads and blocks."""
        self._library.emulated_seed(value)

    def shared_bytes(self) -> int:
        """Returns the bytes of shared memory that the kernels of all files declare."""
        return int(self._library.emulated_shared_bytes())

    def take_launches(self) -> int:
        """Returns the number of launches since the last call."""
        return self.take_launches_and_bytes()[0]

    def take_launches_and_bytes(self) -> tuple[int, int]:
        """Returns the number of launches since the last call, and the bytes of their parameters."""
        parameter_bytes = ctypes.c_int64()
        launches = int(self._library.emulated_launches(ctypes.byref(parameter_bytes)))
        return launches, parameter_bytes.value

    def run_only(self, first_block: int) -> None:
        """Skips the blocks before `first_block` in larger grids, leaving zeros in scratch space; 0 runs all blocks."""
        self._library.emulated_run_only(first_block)

    def _check(self, status: int) -> None:
        if status != 0:
            raise KernelError(self._library.emulated_error().decode())

    def grad_stats(
        self, blocks: Sequence[Block], rows: Sequence[int] | None = None, n_rows: int | None = None
    ) -> NDArray[np.float64]:
        """Returns the raw rows [n_rows, 6] of tensors of one type. Tensor k goes to rows[k]; unwritten rows are NaN."""
        return self._rows(self._library.emulated_grad_stats, 6, blocks, rows, n_rows)

    def magnitudes(
        self, blocks: Sequence[Block], rows: Sequence[int] | None = None, n_rows: int | None = None
    ) -> NDArray[np.float64]:
        """Returns the rows of magnitudes [n_rows, 285] of tensors of one type, as `grad_stats` does."""
        return self._rows(self._library.emulated_magnitudes, 285, blocks, rows, n_rows)

    def _rows(
        self,
        function: Callable[..., int],
        width: int,
        blocks: Sequence[Block],
        rows: Sequence[int] | None,
        n_rows: int | None,
    ) -> NDArray[np.float64]:
        with _Memory(self._library, self._guard_bytes) as memory:
            spans = (_Span * max(1, len(blocks)))()
            for k, block in enumerate(blocks):
                spans[k] = _Span(memory.place(block), block.storage.size, k if rows is None else rows[k])
            out = np.full((len(blocks) if n_rows is None else n_rows, width), np.nan)
            element = ELEMENTS.index(blocks[0].element) if blocks else 0
            self._check(function(spans, ctypes.c_int64(len(blocks)), element, ctypes.c_void_p(out.ctypes.data)))
            memory.check_untouched()
        return out

    def grad_stats_at(self, tensors: Sequence[NDArray[np.generic]], element: str) -> NDArray[np.float64]:
        """Returns the raw rows [K, 6] of tensors where they lie, such as in memory that is only reserved."""
        return self._rows_at(self._library.emulated_grad_stats, 6, tensors, element)

    def magnitudes_at(self, tensors: Sequence[NDArray[np.generic]], element: str) -> NDArray[np.float64]:
        """Returns the rows of magnitudes [K, 285] of tensors where they lie."""
        return self._rows_at(self._library.emulated_magnitudes, 285, tensors, element)

    def _rows_at(
        self, function: Callable[..., int], width: int, tensors: Sequence[NDArray[np.generic]], element: str
    ) -> NDArray[np.float64]:
        out = np.full((len(tensors), width), np.nan)
        spans = (_Span * len(tensors))()
        for k, tensor in enumerate(tensors):
            spans[k] = _Span(tensor.ctypes.data, tensor.size, k)
        self._check(
            function(spans, ctypes.c_int64(len(tensors)), ELEMENTS.index(element), ctypes.c_void_p(out.ctypes.data))
        )
        return out

    def scale(
        self, blocks: Sequence[Block], coefficient: float, coefficient_element: str = "f32"
    ) -> list[NDArray[np.generic]]:
        """Returns the tensors, of one element type, multiplied by a coefficient."""
        with _Memory(self._library, self._guard_bytes) as memory:
            spans = (_Span * max(1, len(blocks)))()
            for k, block in enumerate(blocks):
                spans[k] = _Span(memory.place(block), block.storage.size, 0)
            number = encode(np.array([coefficient]), coefficient_element)
            self._check(
                self._library.emulated_scale(
                    spans,
                    ctypes.c_int64(len(blocks)),
                    ELEMENTS.index(blocks[0].element) if blocks else 0,
                    ctypes.c_void_p(number.ctypes.data),
                    ELEMENTS.index(coefficient_element),
                )
            )
            memory.check_untouched(written=range(len(blocks)))
            return [np.frombuffer(memory.read(k), block.storage.dtype) for k, block in enumerate(blocks)]

    def clip_coefficient(self, rows: NDArray[np.float64], max_norm: float) -> NDArray[np.float64]:
        """Returns the total norm of tensors with raw rows [K, 6], and the factor that clips it."""
        out = np.full(2, np.nan)
        self._check(
            self._library.emulated_clip_coefficient(
                ctypes.c_void_p(np.ascontiguousarray(rows).ctypes.data),
                ctypes.c_int64(len(rows)),
                ctypes.c_double(max_norm),
                ctypes.c_void_p(out.ctypes.data),
            )
        )
        return out

    def residual_add(
        self, x: Block, f: Block, relu: bool, y_offset: int = 0, in_place: bool = False, counts: bool = True
    ) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
        """Returns y and its raw row [6], which is NaN unless `counts`. `in_place`: y overwrites x."""
        row = np.full(6, np.nan)
        wanted = row if counts else None
        y = self._join(x, f, y_offset, in_place, self._library.emulated_residual_add, int(relu), wanted)
        return y, row

    def residual_add_backward(
        self, grad_y: Block, y: Block, grad_x_offset: int = 0, in_place: bool = False, counts: bool = True
    ) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
        """Returns grad_x and the raw rows [2, 6] of grad_y and grad_x. `in_place`: grad_x overwrites grad_y."""
        rows = np.full((2, 6), np.nan)
        wanted = rows if counts else None
        grad_x = self._join(grad_y, y, grad_x_offset, in_place, self._library.emulated_residual_add_backward, wanted)
        return grad_x, rows

    @contextmanager
    def counting_if(self, flag: int) -> Iterator[None]:
        """Makes the kernels check a flag of this value before they take statistics."""
        self._library.emulated_set_flag(flag)
        try:
            yield
        finally:
            self._library.emulated_clear_flag()

    def branch_stats(self, branch: Block, shortcut: Block) -> NDArray[np.float64]:
        """Returns the raw rows [2, 6] of the branch's part and of the products of both parts."""
        rows = np.full((2, 6), np.nan)
        with _Memory(self._library, self._guard_bytes) as memory:
            addresses = [memory.place(branch), memory.place(shortcut)]
            self._check(
                self._library.emulated_branch_stats(
                    *(ctypes.c_void_p(address) for address in addresses),
                    ctypes.c_int64(branch.storage.size),
                    ELEMENTS.index(branch.element),
                    ctypes.c_void_p(rows.ctypes.data),
                )
            )
            memory.check_untouched()
        return rows

    def _join(
        self, a: Block, b: Block, offset: int, in_place: bool, function: Callable[..., int], *rest: object
    ) -> NDArray[np.generic]:
        with _Memory(self._library, self._guard_bytes) as memory:
            addresses = [memory.place(a), memory.place(b)]
            if not in_place:
                unwritten = np.frombuffer(b"\xff" * a.storage.nbytes, a.storage.dtype)
                addresses.append(memory.place(Block(unwritten, a.element, offset)))
            target = 0 if in_place else 2
            arguments = [*addresses[:2], addresses[target]]
            self._check(
                function(
                    *(ctypes.c_void_p(address) for address in arguments),
                    ctypes.c_int64(a.storage.size),
                    ELEMENTS.index(a.element),
                    *(ctypes.c_void_p(each.ctypes.data) if isinstance(each, np.ndarray) else each for each in rest),
                )
            )
            memory.check_untouched(written=[target])
            return np.frombuffer(memory.read(target), a.storage.dtype)


class _Memory:
    """Places tensors in memory from malloc, so that the address sanitizer knows their ends."""

    def __init__(self, library: ctypes.CDLL, guard_bytes: int) -> None:
        self._library = library
        self._guard_bytes = guard_bytes
        self._placed: list[tuple[int, int, int, Block, bytes]] = []

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        for address, *_rest in self._placed:
            self._library.emulated_free(address)

    def place(self, block: Block) -> int:
        """Copies a tensor to new memory; returns its address."""
        before = self._guard_bytes + block.offset * ITEM_BYTES[block.element]
        content = block.storage.tobytes()
        total = before + len(content) + self._guard_bytes
        address = self._library.emulated_allocate(total)
        if address % VECTOR_BYTES != 0:
            raise RuntimeError("malloc does not align to 16 bytes")
        ctypes.memset(address, 0xFF, total)
        ctypes.memmove(address + before, content, len(content))
        self._placed.append((address, before, total, block, content))
        return address + before

    def read(self, at: int) -> bytes:
        """Returns the bytes of the tensor that was placed as number `at`."""
        address, before, _, _, content = self._placed[at]
        return ctypes.string_at(address + before, len(content))

    def check_untouched(self, written: Sequence[int] = ()) -> None:
        """Raises KernelError if a kernel has written outside the tensors that it may write."""
        for k, (address, before, total, _, content) in enumerate(self._placed):
            now = ctypes.string_at(address, total)
            after = before + len(content)
            if now[:before].strip(b"\xff") or now[after:].strip(b"\xff"):
                raise KernelError(f"tensor {k}: a kernel wrote outside it")
            if k not in written and now[before:after] != content:
                raise KernelError(f"tensor {k}: a kernel wrote to an input")
