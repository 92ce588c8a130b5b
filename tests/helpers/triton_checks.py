"""The Triton kernels against exact sums; run by test_triton_kernels.py, in a process of their own.

With TRITON_INTERPRET=1 they run on the CPU in Triton's interpreter, otherwise on the GPU. Triton reads that variable
when it is imported: hence the process.
"""

import os

import numpy as np
import pytest
import torch
from emulation.reference import check_row

from gradprobe import ops
from gradprobe.errors import ArgumentError, BackendError
from gradprobe.ops.triton import launcher as triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
DTYPES = pytest.mark.parametrize("dtype", NAMES, ids=str)


def check(tensors: list[torch.Tensor], what: str) -> None:
    out = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=DEVICE)
    ops.resolve("triton", DEVICE).grad_stats_into(tensors, out)
    again = torch.empty_like(out)
    ops.resolve("triton", DEVICE).grad_stats_into(tensors, again)
    assert out.cpu().numpy().tobytes() == again.cpu().numpy().tobytes()
    for k, (row, tensor) in enumerate(zip(out.cpu(), tensors, strict=True)):
        values = tensor.detach().cpu().double().reshape(-1).numpy()
        check_row(row.numpy(), values, NAMES[tensor.dtype], f"{what}, tensor {k} {list(tensor.shape)}")


def random(numel: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    values[::17] = 0.0
    return values.to(dtype).to(DEVICE)


@DTYPES
def test_sizes_at_boundaries(dtype: torch.dtype) -> None:
    _, columns, rows = triton_kernels._TILES[dtype]
    chunk = columns * rows * triton_kernels._TILES_IN_CHUNK
    marks = (1, columns, columns * rows, chunk, 2 * chunk)
    sizes = [0, *(mark + step for mark in marks for step in (-1, 0, 1))]
    check([random(n, dtype, k) for k, n in enumerate(sizes)], "boundaries")


@DTYPES
def test_unaligned_and_strided_tensors(dtype: torch.dtype) -> None:
    base = random(5000, dtype, 1)
    check(
        [base[1:], base[3:4000], base[::3], base[:4800].view(8, 6, 10, 10).to(memory_format=torch.channels_last)],
        "views",
    )


@DTYPES
def test_the_whole_range(dtype: torch.dtype) -> None:
    smallest = {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149, torch.float64: -1074}[dtype]
    largest = {torch.float16: 15, torch.bfloat16: 127, torch.float32: 127, torch.float64: 1023}[dtype]
    rng = np.random.default_rng(1)

    def spread(low: int, high: int, numel: int) -> torch.Tensor:
        values = rng.uniform(1, 2, numel) * np.ldexp(1.0, rng.integers(low, high, numel)) * rng.choice([-1, 1], numel)
        return torch.from_numpy(values).to(dtype).to(DEVICE)

    marks = np.linspace(smallest, largest - 1, 8).astype(int)
    narrow = [spread(int(mark), int(mark) + 1, 700) for mark in marks]
    chunk = triton_kernels._TILES[dtype][1] * triton_kernels._TILES[dtype][2] * triton_kernels._TILES_IN_CHUNK
    # One magnitude a chunk: partial results of different exponents merge.
    steps = torch.cat([spread(int(mark), int(mark) + 1, chunk) for mark in marks[[0, 3, 7]]])
    check([*narrow, spread(smallest, largest, 9000), steps, steps.flip(0)], "range")


@DTYPES
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
    check([random(k % 40, dtypes[k % 4], k) for k in range(120 if INTERPRETED else 3000)], "many")


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
            # The interpreter cuts off where hardware rounds to the nearest bfloat16.
            rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
            torch.testing.assert_close(tensor, needed, rtol=rtol, atol=0)


def test_scaling_by_one_touches_nothing() -> None:
    x = torch.tensor([0x7FA00000], dtype=torch.int32).view(torch.float32).to(DEVICE)
    ops.resolve("triton", DEVICE).scale_([x], torch.ones((), device=DEVICE))
    assert x.view(torch.int32).item() == 0x7FA00000


@pytest.mark.parametrize("numel", [0, 1, 5000, 40_000])
@DTYPES
def test_residual_junction(dtype: torch.dtype, numel: int) -> None:
    x, f = random(numel, dtype, 1), random(numel, dtype, 2, scale=1e-3 if dtype == torch.float16 else 1e-30)
    if numel > 1000:
        x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
        f[:4] = torch.tensor([1.0, -torch.inf, 2.0, torch.nan])
    # The interpreter cuts off where hardware rounds to the nearest bfloat16.
    rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
    for relu in (False, True):
        y, row = triton_kernels.residual_add(x, f, relu)
        torch.testing.assert_close(y, (x + f).relu() if relu else x + f, rtol=rtol, atol=0, equal_nan=True)
        check_row(row[0].cpu().numpy(), y.cpu().double().numpy(), NAMES[dtype], f"y, relu={relu}")
        for target, place in ((torch.full_like(x, -1.0), None), (x.clone(), "x"), (f.clone(), "f")):
            operands = (target if place == "x" else x, target if place == "f" else f)
            triton_kernels.residual_add_into(*operands, relu, target)
            torch.testing.assert_close(target, y, rtol=0, atol=0, equal_nan=True)
    for grad_y in (f, x):
        grad_x, rows = triton_kernels.residual_add_backward(grad_y, y)
        torch.testing.assert_close(grad_x, grad_y.masked_fill(y <= 0, 0), rtol=0, atol=0, equal_nan=True)
        plain = torch.full_like(y, -1.0)
        triton_kernels.residual_add_backward_into(grad_y, y, plain)
        torch.testing.assert_close(plain, grad_x, rtol=0, atol=0, equal_nan=True)
        check_row(rows[0].cpu().numpy(), grad_y.cpu().double().numpy(), NAMES[dtype], "incoming")
        check_row(rows[1].cpu().numpy(), grad_x.cpu().double().numpy(), NAMES[dtype], "outgoing")


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
