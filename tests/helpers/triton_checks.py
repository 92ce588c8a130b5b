"""Checks the Triton kernels against exact sums. tests/ops/test_triton.py runs this module in a child process.

With TRITON_INTERPRET=1 the kernels run on the CPU in Triton's interpreter, otherwise on the GPU. Triton reads that
variable when it is imported, hence the process.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from csrc.emulation.reference import check_products, check_row
from helpers.ops_truth import FLOAT8

from gradprobe import ops
from gradprobe.errors import ArgumentError, BackendError
from gradprobe.ops import reference, schemas
from gradprobe.ops.triton import device, residual_device
from gradprobe.ops.triton import launcher as triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
WRITTEN = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
NAMES = WRITTEN | FLOAT8
DTYPES = pytest.mark.parametrize("dtype", WRITTEN, ids=str)
MEASURED = pytest.mark.parametrize("dtype", NAMES, ids=str)

if INTERPRETED:
    from triton.runtime import interpreter

    # The interpreter's time depends on the number of operations, not of elements.
    triton_kernels._TILES_IN_CHUNK = 2
    _patched: set[int] = set()

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Patches triton.language once per module; the interpreter does it in each call, for most of its time."""
        if id(self.fn.__globals__) not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function


def check(tensors: list[torch.Tensor], what: str) -> None:
    out = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=DEVICE)
    ops.resolve("triton", DEVICE).grad_stats_into(tensors, out)
    again = torch.empty_like(out)
    ops.resolve("triton", DEVICE).grad_stats_into(tensors, again)
    assert out.cpu().numpy().tobytes() == again.cpu().numpy().tobytes()
    for k, (row, tensor) in enumerate(zip(out.cpu(), tensors, strict=True)):
        values = tensor.detach().cpu().double().reshape(-1).resolve_neg().numpy()
        check_row(row.numpy(), values, NAMES[tensor.dtype], f"{what}, tensor {k} {list(tensor.shape)}")


def random(numel: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    values[::17] = 0.0
    return values.to(dtype).to(DEVICE)


@MEASURED
def test_sizes_at_boundaries(dtype: torch.dtype) -> None:
    _, columns, rows = triton_kernels._TILES[dtype]
    chunk = columns * rows * triton_kernels._TILES_IN_CHUNK
    marks = (1, columns, columns * rows, chunk, 2 * chunk)
    sizes = [0, *(mark + step for mark in marks for step in (-1, 0, 1))]
    check([random(n, dtype, k) for k, n in enumerate(sizes)], "boundaries")


@MEASURED
def test_unaligned_and_strided_tensors(dtype: torch.dtype) -> None:
    base = random(5000, dtype, 1)
    negated = [] if dtype in FLOAT8 else [torch._neg_view(base)]  # torch cannot negate float8
    check(
        [
            *(base[1:], base[3:4000], base[::3], *negated),
            base[:4800].view(8, 6, 10, 10).to(memory_format=torch.channels_last),
        ],
        "views",
    )


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_number_of_float8(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    finite = numbers[torch.isfinite(numbers.view(dtype).float())]
    single = torch.cat((numbers[::32], numbers[0x7C:0x80])).split(1)
    lists = [*single, numbers[:-1], numbers[::3], finite.repeat(75)[3:], finite.flip(0)]
    check([one.to(DEVICE).view(dtype) for one in lists], "every number")


@MEASURED
def test_the_whole_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest, largest = (math.frexp(each)[1] - 1 for each in (info.smallest_normal * info.eps, info.max))
    rng = np.random.default_rng(1)

    def spread(low: int, high: int, numel: int) -> torch.Tensor:
        values = rng.uniform(1, 2, numel) * np.ldexp(1.0, rng.integers(low, high, numel)) * rng.choice([-1, 1], numel)
        return torch.from_numpy(values).to(dtype).to(DEVICE)

    marks = np.linspace(smallest, largest - 1, 8).astype(int)
    narrow = [spread(int(mark), int(mark) + 1, 700) for mark in marks]
    chunk = triton_kernels._TILES[dtype][1] * triton_kernels._TILES[dtype][2] * triton_kernels._TILES_IN_CHUNK
    # One magnitude per chunk, so partial results of different exponents merge.
    steps = torch.cat([spread(int(mark), int(mark) + 1, chunk) for mark in marks[[0, 3, 7]]])
    backwards = steps.view(3, chunk)[[2, 1, 0]].view(-1)
    check([*narrow, spread(smallest, largest, 9000), steps, backwards], "range")


@MEASURED
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    tensors = []
    for k, special in enumerate(([np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf])):
        for numel in (len(special), 900, 70_000):
            tensor = random(numel, dtype, k)
            tensor[-len(special) :] = torch.tensor(special, dtype=dtype)
            tensors.append(tensor)
    check(tensors, "specials")


def test_many_tensors_of_mixed_dtypes() -> None:
    dtypes = list(NAMES)
    check([random(k % 40, dtypes[k % len(dtypes)], k) for k in range(120 if INTERPRETED else 3000)], "many")


@DTYPES
def test_scaling_rounds_once(dtype: torch.dtype) -> None:
    sizes = (0, 1, 1023, 40_000)
    before = [random(n, dtype, n) for n in sizes]
    before.append(random(600, dtype, 1).view(20, 30).t()[::2])
    for coefficient in (torch.tensor(1 / 3), torch.tensor(1 / 3, dtype=torch.float64), torch.tensor([2.0])):
        tensors = [tensor.clone() for tensor in before]
        ops.resolve("triton", DEVICE).scale_(tensors, coefficient.to(DEVICE))
        for tensor, old in zip(tensors, before, strict=True):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            needed = (old.to(wide) * coefficient.to(DEVICE, wide).reshape(())).to(dtype)
            torch.testing.assert_close(tensor, needed, rtol=rounding(dtype), atol=0)


def test_scaling_by_one_touches_nothing() -> None:
    x = torch.tensor([0x7FA00000], dtype=torch.int32).view(torch.float32).to(DEVICE)
    ops.resolve("triton", DEVICE).scale_([x], torch.ones((), device=DEVICE))
    assert x.view(torch.int32).item() == 0x7FA00000


def rounding(dtype: torch.dtype) -> float:
    """Returns the relative tolerance of a result: the interpreter truncates where hardware rounds to bfloat16."""
    return 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0


def check_rows(rows: torch.Tensor, tensors: Sequence[torch.Tensor], what: str) -> None:
    assert len(rows) == len(tensors)
    for row, tensor in zip(rows.cpu(), tensors, strict=True):
        check_row(row.numpy(), tensor.detach().cpu().double().reshape(-1).numpy(), NAMES[tensor.dtype], what)


@pytest.mark.parametrize("numel", [0, 1, 5000, 40_000])
@DTYPES
def test_residual_adds(dtype: torch.dtype, numel: int) -> None:
    x, f = random(numel, dtype, 1), random(numel, dtype, 2, scale=1e-3 if dtype == torch.float16 else 1e-30)
    if numel > 1000:
        x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
        f[:4] = torch.tensor([1.0, -torch.inf, 2.0, torch.nan])
    for relu in (False, True):
        y, rows = triton_kernels.residual_add_stats(x, f, relu)
        expected = (x + f).relu() if relu else x + f
        torch.testing.assert_close(y, expected, rtol=rounding(dtype), atol=0, equal_nan=True)
        check_rows(rows, [y], f"y, relu={relu}")
        overwritten, added = x.clone(), f.clone()
        triton_kernels._join_into(overwritten, f, overwritten, "add_relu" if relu else "add")
        triton_kernels._join_into(x, added, added, "add_relu" if relu else "add")
        for total in (triton_kernels.residual_add(x, f, relu), overwritten, added):
            torch.testing.assert_close(total, y, rtol=0, atol=0, equal_nan=True)
    for grad_y in (f, x):
        grad_x, rows = triton_kernels.residual_add_backward_stats(grad_y, y)
        torch.testing.assert_close(grad_x, grad_y.masked_fill(y <= 0, 0), rtol=0, atol=0, equal_nan=True)
        plain = triton_kernels.residual_add_backward(grad_y, y)
        torch.testing.assert_close(plain, grad_x, rtol=0, atol=0, equal_nan=True)
        check_rows(rows, [grad_y, grad_x], "incoming and outgoing")


def check_branch_stats(branch: torch.Tensor, shortcut: torch.Tensor, what: str) -> None:
    rows = triton_kernels.residual_branch_stats(branch, shortcut)
    if not INTERPRETED:  # where programs run in parallel
        again = triton_kernels.residual_branch_stats(branch, shortcut)
        assert rows.cpu().numpy().tobytes() == again.cpu().numpy().tobytes()
    check_rows(rows[:1], [branch], what)
    a, b = (tensor.detach().cpu().double().reshape(-1).numpy() for tensor in (branch, shortcut))
    check_products(rows[1].cpu().numpy(), a, b, what)


@DTYPES
def test_branch_statistics(dtype: torch.dtype) -> None:
    _, columns, rows = triton_kernels._TILES[dtype]
    chunk = columns * rows * triton_kernels._TILES_IN_CHUNK
    for numel in (0, 1, 700, chunk - 1, chunk, chunk + 1):
        check_branch_stats(random(numel, dtype, 1), random(numel, dtype, 2), f"{numel} elements")
    branch, shortcut = random(chunk + 900, dtype, 3), random(chunk + 900, dtype, 4)
    branch[:chunk] = 0.0
    check_branch_stats(branch, shortcut, "a chunk of zeros")
    check_branch_stats(torch.zeros_like(branch), shortcut, "all zeros")
    largest = torch.finfo(dtype).max
    check_branch_stats(torch.full_like(branch, largest / 4), torch.full_like(branch, largest / 4), "large")
    check_branch_stats(branch * torch.finfo(dtype).tiny, shortcut * torch.finfo(dtype).tiny, "subnormal")
    for odd in (torch.nan, torch.inf, -torch.inf):
        shortcut[-2] = odd
        check_branch_stats(torch.ones_like(branch), shortcut, f"shortcut with {odd}")
        check_branch_stats(shortcut, torch.ones_like(branch), f"branch with {odd}")


def test_products_beyond_the_range_of_doubles() -> None:
    _, columns, rows = triton_kernels._TILES[torch.float64]
    chunk = columns * rows * triton_kernels._TILES_IN_CHUNK
    branch, shortcut = (random(2 * chunk + 1, torch.float64, seed).abs() for seed in (1, 2))
    for exponents in ((-900, -900), (900, 900), (-900, 100), (-900, 900), (-490, -490)):
        scaled = [t.ldexp(torch.tensor(e, device=DEVICE)) for t, e in zip((branch, shortcut), exponents, strict=True)]
        check_branch_stats(*scaled, f"exponents {exponents}")
        scaled[0][chunk:] = 0.0  # chunks of zeros beside a chunk of that magnitude
        check_branch_stats(*scaled, f"exponents {exponents}, then zeros")
    mixed = branch.clone()
    mixed[:chunk] *= 2.0**-900
    mixed[chunk : 2 * chunk] *= 2.0**900
    check_branch_stats(mixed, mixed.flip(0), "chunks of different exponents")
    check_branch_stats(mixed, mixed, "squares of different exponents")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the launches of each kernel, and makes the reference's statistics fail."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts[self.name] += 1
            return self.kernel[grid]

    def count(module: ModuleType) -> SimpleNamespace:
        kernels = {name: kernel for name, kernel in vars(module).items() if hasattr(kernel, "run")}
        return SimpleNamespace(**{name: Counted(name, kernel) for name, kernel in kernels.items()})

    counted = {"device": count(device), "residual_device": count(residual_device)}
    monkeypatch.setattr(triton_kernels, "_device_code", lambda name="device": counted[name])

    def fail(*_: object) -> None:
        raise AssertionError("the reference took the statistics")

    monkeypatch.setattr(reference, "_rows", fail)
    return counts


@pytest.fixture(scope="module")
def operators() -> Any:
    """The operators in a namespace whose kernels for DEVICE are the Triton kernels, registered as `schemas` does it."""
    library = torch.library.Library("gradprobe_triton", "DEF")
    schemas.define_operators(library)
    triton_kernels.register(library, DEVICE.type.upper())
    yield torch.ops.gradprobe_triton
    del library


def test_every_operator_reaches_its_triton_kernel(operators: Any, launches: Counter[str]) -> None:
    x, f, grad = (random(600, torch.float32, seed).view(2, 3, 10, 10) for seed in (1, 2, 3))

    def launched(**expected: int) -> None:
        assert launches == expected
        launches.clear()

    out = torch.empty(2, 6, dtype=torch.float64, device=DEVICE)
    operators.grad_stats_into([x, f], out)
    launched(sum_chunks=1, merge_partials=1)
    check_rows(out, [x, f], "grad_stats_into")

    scaled = x.clone()
    operators.scale_([scaled], torch.tensor(0.5, device=DEVICE))
    launched(scale_chunks=1)
    assert torch.equal(scaled, x * 0.5)
    assert scaled._version > 0

    y = operators.residual_add(x, f, True)
    launched(join_elements=1)
    assert torch.equal(y, torch.relu(x + f))

    grad_x = operators.residual_add_backward(grad, y)
    launched(join_elements=1)
    assert torch.equal(grad_x, torch.where(y > 0, grad, 0.0))

    with_stats, rows = operators.residual_add_stats(x, f, True)
    launched(join_chunks=1, merge_rows=1)
    assert torch.equal(with_stats, y)
    check_rows(rows, [y], "residual_add_stats")

    with_stats, rows = operators.residual_add_backward_stats(grad, y)
    launched(join_chunks=1, merge_rows=1)
    assert torch.equal(with_stats, grad_x)
    check_rows(rows, [grad, grad_x], "residual_add_backward_stats")

    copy, rows = operators.residual_add_backward_stats(grad, None)
    launched(sum_chunks=1, merge_partials=1)
    assert torch.equal(copy, grad)
    check_rows(rows, [grad, grad], "residual_add_backward_stats without a mask")

    rows = operators.residual_branch_stats(x, f)
    launched(branch_chunks=1, merge_rows=1)
    check_rows(rows[:1], [x], "residual_branch_stats")


def test_a_backward_pass_reaches_the_triton_kernels(operators: Any, launches: Counter[str]) -> None:
    x, f = (random(600, torch.float32, seed).requires_grad_() for seed in (1, 2))
    y, _ = operators.residual_add_stats(x, f, True)
    grad = torch.ones_like(x)
    y.backward(grad)
    assert launches == {"join_chunks": 1, "merge_rows": 1, "join_elements": 1}
    assert x.grad is not None
    assert torch.equal(x.grad, (y > 0).float())


@pytest.mark.parametrize("layout", ["channels-last", "expanded", "every-second", "singletons"])
def test_operands_of_different_strides_still_have_triton_rows(
    operators: Any, launches: Counter[str], layout: str
) -> None:
    shape = (2, 1, 4, 4) if layout == "singletons" else (2, 3, 4, 4)
    x, f = (random(2 * 3 * 4 * 4, torch.float32, seed).view(2, 3, 4, 4)[:, : shape[1]] for seed in (1, 2))
    x = x.contiguous()
    f = {
        "channels-last": f.to(memory_format=torch.channels_last),
        "expanded": f[:, :1].expand(shape),
        "every-second": f.repeat_interleave(2, dim=3)[..., ::2],
        "singletons": f.contiguous().to(memory_format=torch.channels_last),
    }[layout]
    for a, b in ((x, f), (f, x), (f, f)):
        y, rows = operators.residual_add_stats(a, b, True)
        assert torch.equal(y, torch.relu(a + b))
        assert y.stride() == (a + b).stride()
        assert operators.residual_add(a, b, False).stride() == (a + b).stride()
        check_rows(rows, [y], layout)
        grad_x, rows = operators.residual_add_backward_stats(a, y)
        assert torch.equal(grad_x, a.masked_fill(y <= 0, 0))
        assert grad_x.stride() == torch.empty_like(y).stride()
        assert torch.equal(operators.residual_add_backward(a, y), grad_x)
        check_rows(rows, [a, grad_x], layout)
        rows = operators.residual_branch_stats(a, b)
        check_rows(rows[:1], [a], layout)
        check_products(
            rows[1].cpu().numpy(), *(t.cpu().double().reshape(-1).numpy() for t in (a, b)), f"products, {layout}"
        )
    assert launches["branch_chunks"] == 3
    assert launches["join_chunks"] + launches["sum_chunks"] == 6


def test_bad_arguments_are_named() -> None:
    out = torch.empty(1, 6, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ArgumentError, match=r"tensors\[0\]: needed a dtype"):
        triton_kernels.grad_stats_into([torch.ones(2, dtype=torch.int32, device=DEVICE)], out)
    with pytest.raises(ArgumentError, match="out: needed contiguous float64"):
        triton_kernels.grad_stats_into([torch.ones(2, device=DEVICE)], out.float())
    with pytest.raises(ArgumentError, match=r"tensors\[0\]: needed elements that do not overlap"):
        triton_kernels.scale_([torch.ones(1, device=DEVICE).expand(3)], torch.ones((), device=DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_capture_is_refused() -> None:
    x = torch.ones(100, device=DEVICE)
    out = torch.empty(1, 6, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BackendError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        triton_kernels.grad_stats_into([x], out)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_no_synchronisation() -> None:
    tensors = [torch.randn(n, device=DEVICE) for n in (5, 100_000)]
    out = torch.empty(2, 6, dtype=torch.float64, device=DEVICE)
    triton_kernels.grad_stats_into(tensors, out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_kernels.grad_stats_into(tensors, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
