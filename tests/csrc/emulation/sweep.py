"""The checks of the emulated kernels, by name.

`python -m emulation.sweep LIBRARY [--only PREFIX] [--short] [--exact-ends]` runs them in a separate process, for
sanitizers and planted bugs. It exits with 1 and prints the check's name if one fails.
"""

from __future__ import annotations

import argparse
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emulation.kernels import (
    CHUNK_BYTES,
    ELEMENTS,
    ITEM_BYTES,
    VECTOR_BYTES,
    WRITTEN,
    Block,
    KernelError,
    Kernels,
    decode,
    encode,
)
from emulation.reference import check_magnitudes, check_products, check_row

THREADS = 256
LOADS = 4

Check = Callable[[Kernels], None]


def sizes_at_boundaries(element: str, short: bool = False) -> list[int]:
    """Returns tensor sizes around each boundary in the kernels: vector, warp, block, unrolled loop, chunk."""
    vector = VECTOR_BYTES // ITEM_BYTES[element]
    chunk = CHUNK_BYTES // ITEM_BYTES[element]
    marks = [1, vector, 32, 256, 32 * vector, THREADS * vector, LOADS * THREADS * vector, chunk]
    if not short:
        marks += [2 * vector, 2 * THREADS * vector, (LOADS - 1) * THREADS * vector, 2 * chunk]
    return sorted({0, *(mark + step for mark in marks for step in (-1, 0, 1)), chunk + vector - 1})


def random_values(rng: np.random.Generator, numel: int) -> NDArray[np.float64]:
    """Returns values like a gradient's: normal with a random scale, some zero."""
    values = rng.standard_normal(numel) * 10.0 ** rng.uniform(-3, 1)
    values[rng.random(numel) < 0.05] = 0.0
    return values


def check_tensors(kernels: Kernels, blocks: list[Block], what: str) -> None:
    """Checks the raw rows of `blocks` against the reference, and that thread order does not change a bit."""
    kernels.seed(len(blocks))
    rows = kernels.grad_stats(blocks)
    for k, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        check_row(
            row,
            decode(block.storage, block.element),
            block.element,
            f"{what}, tensor {k} [{block.storage.size}] + {block.offset}",
        )
    kernels.seed(len(blocks) + 1)
    again = kernels.grad_stats(blocks)
    if again.tobytes() != rows.tobytes():
        raise AssertionError(f"{what}: another order of threads changes the result")


def check_counts(kernels: Kernels, blocks: list[Block], what: str) -> None:
    """Checks the rows of magnitudes of `blocks`, and that thread order does not change a bit."""
    kernels.seed(len(blocks))
    rows = kernels.magnitudes(blocks)
    for k, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        values = decode(block.storage, block.element)
        check_magnitudes(row, values, f"{what}, tensor {k} [{values.size}] + {block.offset}")
    kernels.seed(len(blocks) + 1)
    if kernels.magnitudes(blocks).tobytes() != rows.tobytes():
        raise AssertionError(f"{what}: another order of threads changes the result")


def counted_boundaries(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(14)
        vector = VECTOR_BYTES // ITEM_BYTES[element]
        sizes = sizes_at_boundaries(element, short)
        blocks = [Block(encode(random_values(rng, n), element), element, k % vector) for k, n in enumerate(sizes)]
        check_counts(kernels, blocks, f"{element} sizes at boundaries")

    return check


def counted_extremes(element: str, short: bool) -> Check:
    """Values at both ends of the range, and each power of two with its neighbours."""

    def check(kernels: Kernels) -> None:
        lowest, highest = {"f16": (-24, 15), "bf16": (-133, 127), "f32": (-149, 127), "f64": (-1074, 1023)}[element]
        powers = encode(np.ldexp(1.0, np.arange(lowest, highest + 1)), element)
        bits = powers.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[ITEM_BYTES[element]])
        beside = np.concatenate((bits - 1, bits, bits + 1)).view(powers.dtype)
        cases = [encode(values, element) for values in _extremes(element)[:: 4 if short else 1]]
        check_counts(
            kernels,
            [Block(storage, element, k % 2) for k, storage in enumerate((beside, *cases))],
            f"{element} extremes",
        )

    return check


def counted_many(kernels: Kernels) -> None:
    """More tensors than fit in a launch's table, and one of chunks of very different ranges; rows in any order."""
    rng = np.random.default_rng(15)
    sizes = np.where(rng.random(2500) < 0.3, 0, rng.integers(1, 20, 2500))
    sizes[[3, -3]] = 5 * CHUNK_BYTES // 8 + 5
    blocks = [Block(encode(random_values(rng, int(n)), "f64"), "f64") for n in sizes]
    apart = (
        random_values(rng, int(sizes[3]))
        * np.repeat([1e-200, 1e-40, 0.0, 1e200, 1e250, 1e-300], CHUNK_BYTES // 8)[: sizes[3]]
    )
    blocks[3] = Block(apart, "f64")
    order = rng.permutation(len(blocks)).tolist()
    out = kernels.magnitudes(blocks, rows=order, n_rows=len(blocks) + 1)
    for row, block in zip(order, blocks, strict=True):
        check_magnitudes(out[row], decode(block.storage, "f64"), f"row {row}")
    if not np.isnan(out[-1]).all():
        raise AssertionError("a kernel wrote other rows than those of its tensors")


def boundaries(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(1)
        vector = VECTOR_BYTES // ITEM_BYTES[element]
        blocks = [
            Block(encode(random_values(rng, numel), element), element, offset=k % vector)
            for k, numel in enumerate(sizes_at_boundaries(element, short))
        ]
        check_tensors(kernels, blocks, f"{element} sizes at boundaries")

    return check


def misaligned(element: str) -> Check:
    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(2)
        vector = VECTOR_BYTES // ITEM_BYTES[element]
        numel = THREADS * vector + vector + 1
        blocks = [Block(encode(random_values(rng, numel + k), element), element, offset=k) for k in range(vector)]
        check_tensors(kernels, blocks, f"{element} misaligned")

    return check


def _extremes(element: str) -> list[NDArray[np.float64]]:
    """Returns values at the ends of a type's range, alone and mixed, including NaN and infinities."""
    smallest, largest = {
        "f16": (2.0**-24, 65504.0),
        "bf16": (2.0**-133, 2.0**127),
        "f32": (2.0**-149, 3.4e38),
        "f64": (5e-324, 1.7e308),
        "e4m3": (2.0**-9, 448.0),
        "e5m2": (2.0**-16, 57344.0),
    }[element]
    rng = np.random.default_rng(3)
    cases = []
    for exponent in np.linspace(np.log2(smallest), np.log2(largest), 9):
        magnitude = 2.0 ** np.clip(exponent, np.log2(smallest), np.log2(largest) - 1)
        cases.append(magnitude * rng.uniform(0.5, 1.0, 1500) * rng.choice([-1, 1], 1500))
        cases.append(np.full(1100, magnitude))
    spread = 2.0 ** rng.uniform(np.log2(smallest), np.log2(largest) - 1, 5000) * rng.choice([-1, 1], 5000)
    cases += [
        spread,
        np.sort(spread),
        np.zeros(999),
        -np.zeros(33),
        np.array([largest, -largest, smallest]),
        np.array([smallest]),
    ]
    for special in ([np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf]):
        for values in (spread, np.full(700, largest), np.zeros(300), rng.standard_normal(70_000)):
            for position in (0, len(values) // 2, len(values) - len(special)):
                changed = values.copy()
                changed[position : position + len(special)] = special
                cases.append(changed)
    return cases


def extremes(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        cases = _extremes(element)[:: 4 if short else 1]
        check_tensors(
            kernels,
            [Block(encode(values, element), element, k % 2) for k, values in enumerate(cases)],
            f"{element} extremes",
        )

    return check


def every_number(element: str, check_blocks: Callable[[Kernels, list[Block], str], None]) -> Check:
    """All bit patterns of float8, alone, all together, and without those that are not finite."""

    def check(kernels: Kernels) -> None:
        bits = np.arange(256, dtype=np.uint8)
        finite = bits[np.isfinite(decode(bits, element))]
        storages = [*bits[:, None], bits[:-1], finite[::-1], np.tile(finite, 75)[:-3]]
        check_blocks(kernels, [Block(each, element, k % 16) for k, each in enumerate(storages)], f"every {element}")

    return check


def many(n_tensors: int, share_empty: float) -> Check:
    """More tensors than fit in a launch's table, with tensors of two chunks in the first and the last launch."""

    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(4)
        sizes = np.where(rng.random(n_tensors) < share_empty, 0, rng.integers(1, 40, n_tensors))
        sizes[[3, -3]] = CHUNK_BYTES // 4 + 5
        blocks = [Block(encode(random_values(rng, int(n)), "f32"), "f32") for n in sizes]
        kernels.take_launches()
        rows = kernels.grad_stats(blocks)
        for k, (row, block) in enumerate(zip(rows, blocks, strict=True)):
            check_row(row, decode(block.storage, "f32"), "f32", f"{n_tensors} tensors, number {k}")

    return check


def scattered_rows(kernels: Kernels) -> None:
    """Rows in any order and far apart, as if among those of other types; other rows of the output stay unchanged."""
    rng = np.random.default_rng(5)
    rows = [7, 3, 70_000, 12, 65_536 + 7, 5]
    blocks = [Block(encode(random_values(rng, n), "bf16"), "bf16") for n in (10, 40_000, 33, 0, 70_000, 1)]
    out = kernels.grad_stats(blocks, rows=rows, n_rows=70_001)
    for row, block in zip(rows, blocks, strict=True):
        check_row(out[row], decode(block.storage, "bf16"), "bf16", f"row {row}")
    if not np.isnan(np.delete(out, rows, axis=0)).all():
        raise AssertionError("a kernel wrote other rows than those of its tensors")


def many_chunks(n_chunks: int) -> Check:
    """The second launch's unrolled loop and its remainder."""

    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(6)
        blocks = [
            Block(encode(random_values(rng, n * CHUNK_BYTES // 8 + 5), "f64"), "f64", n % 2)
            for n in (n_chunks, THREADS, THREADS - 1)
        ]
        check_tensors(kernels, blocks, "many chunks")

    return check


def mixed_chunk_counts(kernels: Kernels) -> None:
    """One tensor of two chunks among empty ones: needs scratch space although there are fewer chunks than tensors."""
    blocks = [Block(encode(np.ones(n), "f64"), "f64") for n in (0, 0, 0, CHUNK_BYTES // 8 + 1, 0)]
    check_tensors(kernels, blocks, "mixed chunk counts")


def same(got: NDArray[np.generic], needed: NDArray[np.generic], element: str, what: str) -> None:
    """Checks that values are equal or both NaN. Zeros may differ in sign."""
    different = np.flatnonzero(
        ~((got == needed) | (np.isnan(decode(got, element)) & np.isnan(decode(needed, element))))
    )
    if different.size:
        k = different[0]
        raise AssertionError(
            f"{what}: element {k} of {got.size} is {decode(got, element)[k]!r}, needed {decode(needed, element)[k]!r}"
        )


def rounded_float(values: NDArray[np.float64], element: str) -> NDArray[np.float64]:
    """Rounds to the type that the kernels compute in: float64 for f64, else float32."""
    if element == "f64":
        return values
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float64)


def scaled(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(7)
        vector = VECTOR_BYTES // ITEM_BYTES[element]
        blocks = []
        for k, numel in enumerate(sizes_at_boundaries(element, short)):
            values = random_values(rng, numel)
            values[: numel // 50] = np.nan
            blocks.append(Block(encode(values, element), element, k % vector))
        for coefficient, coefficient_element in (
            (0.3, "f32"),
            (1.0 / 3.0, "f64"),
            (0.0, "f32"),
            (np.nan, "f32"),
            (1.0, "f64"),
        ):
            number = decode(encode(np.array([coefficient]), coefficient_element), coefficient_element)[0]
            number = rounded_float(np.array([number]), element)[0]
            results = kernels.scale(blocks, coefficient, coefficient_element)
            for k, (result, block) in enumerate(zip(results, blocks, strict=True)):
                needed = encode(rounded_float(decode(block.storage, element) * number, element), element)
                same(result, needed, element, f"{element} times {coefficient}, tensor {k}")

    return check


def scaled_many(kernels: Kernels) -> None:
    """More tensors than fit in a launch's table; a coefficient of 1 changes no byte."""
    rng = np.random.default_rng(8)
    blocks = [Block(encode(random_values(rng, int(n)), "f32"), "f32") for n in rng.integers(0, 9, 2300)]
    for block, result in zip(blocks, kernels.scale(blocks, 2.0), strict=True):
        same(result, block.storage * np.float32(2), "f32", "many tensors times 2")
    signalling = Block(np.array([0x7FA00000], np.uint32).view(np.float32), "f32")
    if kernels.scale([signalling], 1.0)[0].tobytes() != signalling.storage.tobytes():
        raise AssertionError("a coefficient of 1 changed a tensor")


def clipped(kernels: Kernels) -> None:
    """Rows of any number, any range of magnitudes, and not finite."""
    rng = np.random.default_rng(9)
    for n_rows in (0, 1, 2, 31, 33, THREADS - 1, THREADS, THREADS + 1, 3 * THREADS + 5):
        for exponents in ((0, 1), (-3, 3), (-1070, -900), (900, 1010), (-1070, 1010)):
            values = np.ldexp(rng.standard_normal((n_rows, 7)), rng.integers(*exponents, (n_rows, 7)))
            values[rng.random((n_rows, 7)) < 0.1] = 0.0
            blocks = [Block(row.copy(), "f64") for row in values]
            rows = kernels.grad_stats(blocks) if blocks else np.empty((0, 6))
            total, factor = kernels.clip_coefficient(rows, 0.75)
            largest = np.abs(values).max(initial=0.0)
            exponent = int(np.frexp(largest)[1])
            half = exponent // 2  # in two steps, since 2**1074 is beyond float64
            unit = np.ldexp(np.ldexp(values, -half), half - exponent)
            needed = np.ldexp(np.sqrt((unit * unit).sum()), exponent)
            np.testing.assert_allclose(total, needed, rtol=1e-14, atol=1e-322, err_msg=f"{n_rows} rows, 2**{exponents}")
            np.testing.assert_allclose(factor, min(1.0, 0.75 / (needed + 1e-6)), rtol=1e-14)
    for special, needed in ((np.nan, (np.nan, np.nan)), (-np.inf, (np.inf, 0.0)), (0.0, (0.0, 1.0))):
        values = np.zeros(3)
        values[1] = special
        blocks = [Block(np.array([1e-300 if special else 0.0]), "f64"), Block(values, "f64")]
        np.testing.assert_array_equal(kernels.clip_coefficient(kernels.grad_stats(blocks), 0.75), needed)


def _joined_inputs(element: str, short: bool) -> list[tuple[Block, Block, int]]:
    """Returns pairs of operands of all boundary sizes, equally aligned or not, with special values."""
    rng = np.random.default_rng(9)
    vector = VECTOR_BYTES // ITEM_BYTES[element]
    pairs = []
    for k, numel in enumerate(sizes_at_boundaries(element, short)):
        a = encode(random_values(rng, numel), element)
        b = encode(random_values(rng, numel), element)
        if numel > 40 and k % 3 == 0:
            a[5:9] = encode(np.array([np.nan, np.inf, -np.inf, 0.0]), element)
            b[6:11] = encode(np.array([np.inf, 1.0, np.nan, -0.0, np.nan]), element)
        offset = k % vector
        pairs.append((Block(a, element, offset), Block(b, element, offset), offset))
        if k % 4 == 1:
            pairs.append((Block(a, element, offset), Block(b, element, (offset + 1) % vector), offset))
    return pairs


def residual_forward(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        for k, (x, f, offset) in enumerate(_joined_inputs(element, short)):
            relu = k % 2 == 0
            y, row = kernels.residual_add(x, f, relu, offset, in_place=k % 3 == 0)
            what = f"{element} residual_add number {k} [{x.storage.size}] + {x.offset}, {f.offset}, relu={relu}"
            with np.errstate(invalid="ignore"):
                total = rounded_float(decode(x.storage, element) + decode(f.storage, element), element)
            same(y, encode(np.where(total <= 0, 0.0, total) if relu else total, element), element, what)
            check_row(row, decode(y, element), element, what)
            kernels.take_launches()
            plain, _ = kernels.residual_add(x, f, relu, offset, in_place=k % 3 != 0, counts=False)
            check_plain(kernels, plain, y, what)

    return check


def check_plain(kernels: Kernels, plain: NDArray[np.generic], counted: NDArray[np.generic], what: str) -> None:
    """Checks that the kernel without statistics returns the same bits, in one launch."""
    if plain.tobytes() != counted.tobytes():
        raise AssertionError(f"{what}: the result without statistics differs")
    launches = kernels.take_launches()
    if launches != min(plain.size, 1):
        raise AssertionError(f"{what}: {launches} launches without statistics")


def residual_backward(element: str, short: bool) -> Check:
    def check(kernels: Kernels) -> None:
        for k, (grad_y, y, offset) in enumerate(_joined_inputs(element, short)):
            grad_x, rows = kernels.residual_add_backward(grad_y, y, offset, in_place=k % 3 == 0)
            what = f"{element} residual_add_backward number {k} [{y.storage.size}] + {grad_y.offset}, {y.offset}"
            needed = np.where(decode(y.storage, element) <= 0, 0.0, decode(grad_y.storage, element))
            same(grad_x, encode(needed, element), element, what)
            check_row(rows[0], decode(grad_y.storage, element), element, f"{what}, incoming")
            check_row(rows[1], decode(grad_x, element), element, f"{what}, outgoing")
            kernels.take_launches()
            plain, _ = kernels.residual_add_backward(grad_y, y, offset, in_place=k % 3 != 0, counts=False)
            check_plain(kernels, plain, grad_x, what)

    return check


def both_parts(element: str, short: bool) -> Check:
    """The branch's part of a gradient, and its products with the shortcut's part."""

    def check(kernels: Kernels) -> None:
        for k, (branch, shortcut, _) in enumerate(_joined_inputs(element, short)):
            kernels.seed(k)
            rows = kernels.branch_stats(branch, shortcut)
            what = f"{element} branch_stats number {k} [{branch.storage.size}] + {branch.offset}, {shortcut.offset}"
            a, b = decode(branch.storage, element), decode(shortcut.storage, element)
            check_row(rows[0], a, element, what)
            check_products(rows[1], a, b, what)
            kernels.seed(k + 1)
            if kernels.branch_stats(branch, shortcut).tobytes() != rows.tobytes():
                raise AssertionError(f"{what}: another order of threads changes the result")

    return check


def products_of_any_range(kernels: Kernels) -> None:
    """Products of float64 outside its range, in all of a tensor and in some of its chunks only."""
    rng = np.random.default_rng(10)
    numel = CHUNK_BYTES // 8 + 100  # in the last chunk most threads are idle
    a, b = rng.standard_normal(numel), rng.standard_normal(numel)
    for exponents in ((-900, -900), (900, 900), (-900, 900), (-490, -490), (500, 20)):
        for part in (slice(None), slice(0, 300), slice(numel - 300, None)):
            pair = []
            for values, exponent in zip((a, b), exponents, strict=True):
                scaled = values.copy()
                scaled[part] = np.ldexp(values[part], exponent)
                pair.append(scaled)
            rows = kernels.branch_stats(*(Block(encode(values, "f64"), "f64") for values in pair))
            check_row(rows[0], pair[0], "f64", f"products of 2**{exponents}")
            check_products(rows[1], *pair, f"products of 2**{exponents} in {part}")


def only_if(operation: str, element: str) -> Check:
    """With a flag of 0 a kernel writes its result but no statistics; with 1 it does the same as without a flag."""

    def check(kernels: Kernels) -> None:
        rng = np.random.default_rng(11)
        chunk = CHUNK_BYTES // ITEM_BYTES[element]
        for numel in (5, chunk + 77):  # one launch, two launches
            a, b = (Block(encode(random_values(rng, numel), element), element, 1) for _ in range(2))

            def outcome(a: Block = a, b: Block = b) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
                if operation == "grad_stats":
                    return np.empty(0), kernels.grad_stats([a, b])
                if operation == "branch_stats":
                    return np.empty(0), kernels.branch_stats(a, b)
                if operation == "residual_add":
                    return kernels.residual_add(a, b, True)
                return kernels.residual_add_backward(a, b)

            needed, needed_rows = outcome()
            for flag in (0, 1):
                with kernels.counting_if(flag):
                    out, rows = outcome()
                what = f"{operation} of {element} [{numel}], flag {flag}"
                if out.tobytes() != needed.tobytes():
                    raise AssertionError(f"{what}: the result differs from the one without a flag")
                if not (np.isnan(rows).all() if flag == 0 else rows.tobytes() == needed_rows.tobytes()):
                    raise AssertionError(f"{what}: rows {rows!r}")

    return check


def beyond_int32(operation: str) -> Check:
    """Elements after index 2**31, between two small tensors. The memory is only reserved: untouched pages are zeros."""

    def check(kernels: Kernels) -> None:
        numel = 2**31 + 70_001
        chunk = 2**19  # 2**15 elements, doubled until at most 8,192 chunks hold the tensor
        first_block = 2**31 // chunk - 1
        small = [np.full(n, 0.25, dtype=np.float16) for n in (7, 40_000)]
        measure = kernels.magnitudes_at if operation == "magnitudes" else kernels.grad_stats_at
        with mmap.mmap(
            -1, numel * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        ) as memory:
            storage = np.frombuffer(memory, dtype=np.float16)
            storage[2**31 - 3 :] = 0.5
            storage[-1] = 2.0
            kernels.run_only(first_block)
            try:
                rows = measure([small[0], storage, small[1]], "f16")
            finally:
                kernels.run_only(0)
                tail = storage[first_block * chunk :].astype(np.float64)
                del storage
        for row, values in zip(rows, (small[0], tail, small[1]), strict=True):
            what = f"{values.size} elements beside more than 2**31"
            if operation == "magnitudes":
                check_magnitudes(row, values.astype(np.float64), what)
            else:
                check_row(row, values.astype(np.float64), "f16", what)

    return check


def all_checks(short: bool = False) -> dict[str, Check]:
    """Returns all checks by name. `short` omits some sizes, for slow builds such as the thread sanitizer's."""
    checks: dict[str, Check] = {}
    for element in ELEMENTS:
        checks[f"grad_stats/boundaries/{element}"] = boundaries(element, short)
        checks[f"grad_stats/misaligned/{element}"] = misaligned(element)
        checks[f"grad_stats/extremes/{element}"] = extremes(element, short)
        checks[f"magnitudes/boundaries/{element}"] = counted_boundaries(element, short)
        checks[f"grad_stats/only_if/{element}"] = only_if("grad_stats", element)
        if element not in WRITTEN:
            checks[f"grad_stats/every_number/{element}"] = every_number(element, check_tensors)
            checks[f"magnitudes/every_number/{element}"] = every_number(element, check_counts)
            continue
        checks[f"magnitudes/extremes/{element}"] = counted_extremes(element, short)
        checks[f"scale/boundaries/{element}"] = scaled(element, short)
        checks[f"residual_add/forward/{element}"] = residual_forward(element, short)
        checks[f"residual_add/backward/{element}"] = residual_backward(element, short)
        checks[f"branch_stats/parts/{element}"] = both_parts(element, short)
        checks[f"residual_add/only_if/forward/{element}"] = only_if("residual_add", element)
        checks[f"residual_add/only_if/backward/{element}"] = only_if("residual_add_backward", element)
        checks[f"branch_stats/only_if/{element}"] = only_if("branch_stats", element)
    checks["branch_stats/ranges"] = products_of_any_range
    checks["clip_coefficient"] = clipped
    checks["magnitudes/many"] = counted_many
    checks["grad_stats/scattered_rows"] = scattered_rows
    checks["grad_stats/mixed_chunk_counts"] = mixed_chunk_counts
    if not short:
        checks["grad_stats/beyond_int32"] = beyond_int32("grad_stats")
        checks["magnitudes/beyond_int32"] = beyond_int32("magnitudes")
        checks["scale/many"] = scaled_many
        checks["grad_stats/many/3000"] = many(3000, share_empty=0.02)
        checks["grad_stats/many/3000-mostly-empty"] = many(3000, share_empty=0.97)
    checks["grad_stats/many/300"] = many(300, share_empty=0.02)
    checks["grad_stats/many_chunks"] = many_chunks(3 if short else LOADS * THREADS + 1)
    return checks


def main() -> int:
    """Runs the checks in order; returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks a library of emulated kernels.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--only", action="append", metavar="PREFIX", help="run only checks with this prefix")
    parser.add_argument("--short", action="store_true", help="use fewer and smaller sizes")
    parser.add_argument(
        "--exact-ends", action="store_true", help="omit the guards around tensors, for the address sanitizer"
    )
    arguments = parser.parse_args()
    kernels = Kernels(arguments.library, guard_bytes=0 if arguments.exact_ends else 64)
    for name, check in all_checks(arguments.short).items():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        try:
            check(kernels)
        except (AssertionError, KernelError) as error:
            print(f"FAILED {name}: {error}", flush=True)
            return 1
    print("all held", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
