"""The operators' CUDA registration, on CPU tensors with emulated kernels, and on a GPU if there is one."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from emulation.building import compiler
from emulation.operators import emulated_operators
from helpers.ops_truth import DTYPES, MEASURED, scaled_by_torch
from torch import Tensor

from gradprobe import ops
from gradprobe.ops import reference
from gradprobe.ops.rows import N_MAGNITUDES, SUM_SQUARE

OPERATORS = ("grad_stats_into", "magnitudes_into", "scale_")

Operator = Callable[..., None]


@pytest.fixture
def emulated() -> object:
    if compiler() is None or sys.platform != "linux":
        pytest.skip("the emulation needs g++ on Linux")
    return emulated_operators()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> tuple[object, torch.device]:
    """The operators and their device."""
    if request.param == "cuda":
        return torch.ops.gradprobe, torch.device("cuda")
    return request.getfixturevalue("emulated"), torch.device("cpu")


def layouts(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of every layout that a gradient may have."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return [
        random(7),
        random(1).reshape(()),
        random(0, 3),
        random(4, 3, 5, 5).to(memory_format=torch.channels_last),
        random(30, 20).t(),
        random(40, 30)[::2, 1::3],
        random(1000)[3:],
        random(70_000),
    ]


def assert_rows_match(out: Tensor, tensors: list[Tensor]) -> None:
    needed = torch.empty(len(tensors), 6, dtype=torch.float64)
    reference.grad_stats_into([t.cpu() for t in tensors], needed)
    sums_abs = needed[:, 1:2]
    got = out.cpu()
    torch.testing.assert_close(got[:, 3:], needed[:, 3:], rtol=0, atol=0, equal_nan=True)
    assert ((got[:, :1] - needed[:, :1]).abs() <= 1e-6 * sums_abs).all()
    torch.testing.assert_close(got[:, 1:3], needed[:, 1:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", MEASURED, ids=str)
def test_statistics_of_every_layout(target: tuple[object, torch.device], dtype: torch.dtype) -> None:
    operators, device = target
    tensors = [*layouts(dtype, device), torch.randn(5, 1, device=device).to(dtype).expand(5, 7)]
    out = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=device)
    operators.grad_stats_into(tensors, out)
    assert_rows_match(out, tensors)


def test_mixed_dtypes_go_to_their_own_rows(target: tuple[object, torch.device]) -> None:
    operators, device = target
    tensors = [tensor for row in zip(*(layouts(dtype, device) for dtype in MEASURED), strict=True) for tensor in row]
    ring = torch.full((3, len(tensors), 6), torch.nan, dtype=torch.float64, device=device)
    operators.grad_stats_into(tensors, ring[1])
    assert_rows_match(ring[1], tensors)
    assert ring[0].isnan().all()
    assert ring[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_of_every_layout_are_those_of_the_cpu(
    target: tuple[object, torch.device], dtype: torch.dtype
) -> None:
    operators, device = target
    tensors = [*layouts(dtype, device), torch.randn(5, 1, device=device).to(dtype).expand(5, 7)]
    tensors.append(torch.tensor([0.0, torch.inf, torch.nan], device=device, dtype=dtype))
    out = torch.full((len(tensors), N_MAGNITUDES), torch.nan, dtype=torch.float64, device=device)
    version = out._version
    operators.magnitudes_into(tensors, out)
    needed = torch.empty_like(out, device="cpu")
    torch.ops.gradprobe.magnitudes_into([tensor.cpu() for tensor in tensors], needed)
    assert torch.equal(out[:, :SUM_SQUARE].cpu(), needed[:, :SUM_SQUARE])
    torch.testing.assert_close(out[:, SUM_SQUARE:].cpu(), needed[:, SUM_SQUARE:], rtol=1e-12, atol=0, equal_nan=True)
    assert out._version > version


@pytest.mark.parametrize("coefficient_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_of_every_layout(
    target: tuple[object, torch.device], dtype: torch.dtype, coefficient_dtype: torch.dtype
) -> None:
    operators, device = target
    tensors = layouts(dtype, device)
    coefficient = torch.tensor(1 / 3, dtype=coefficient_dtype, device=device)
    expected = [scaled_by_torch(tensor, coefficient) for tensor in tensors]
    operators.scale_(tensors, coefficient)
    for tensor, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, d: o.grad_stats_into([torch.ones(2, device=d), torch.ones(2, dtype=torch.int32, device=d)],
                                        torch.empty(2, 6, dtype=torch.float64, device=d)),
         r"tensors\[1\]: needed a dtype of float16, bfloat16, float32, float64"),
        (lambda o, d: o.grad_stats_into([torch.ones(2, device=d)], torch.empty(1, 6, device=d)),
         "out: needed dtype float64"),
        (lambda o, d: o.grad_stats_into([torch.ones(2, device=d)], torch.empty(2, 6, dtype=torch.float64, device=d)),
         r"out: needed shape \[1, 6\], got \[2, 6\]"),
        (lambda o, d: o.grad_stats_into([torch.ones(2, device=d)] * 2,
                                        torch.empty(6, 2, dtype=torch.float64, device=d).t()),
         "out: needed contiguous rows"),
        (lambda o, d: o.clip_coefficient(torch.ones(2, 6, device=d), 1.0), "rows: needed dtype float64, got Float"),
        (lambda o, d: o.clip_coefficient(torch.ones(2, 5, dtype=torch.float64, device=d), 1.0),
         r"rows: needed shape \[2, 6\], got \[2, 5\]"),
        (lambda o, d: o.clip_coefficient(torch.ones(6, dtype=torch.float64, device=d), 1.0),
         r"rows: needed shape \[6, 6\], got 1 dimensions"),
        (lambda o, d: o.scale_([torch.ones(1, device=d).expand(4)], torch.ones((), device=d)),
         r"tensors\[0\]: needed elements that do not overlap"),
        (lambda o, d: o.scale_([torch.ones(1, device=d)], torch.ones(2, device=d)),
         "coefficient: needed one element, got 2"),
        (lambda o, d: o.scale_([torch.ones(1, device=d)], torch.ones((), dtype=torch.float16, device=d)),
         "coefficient: needed dtype float32 or float64, got Half"),
    ],
    ids=["dtype", "out-dtype", "out-shape", "out-strides", "rows-dtype", "rows-shape", "rows-dimensions", "overlap",
         "coefficient-shape", "coefficient-dtype"],
)  # fmt: skip
def test_bad_arguments_are_named(
    target: tuple[object, torch.device], call: Callable[[object, torch.device], None], message: str
) -> None:
    operators, device = target
    with pytest.raises(RuntimeError, match=message):
        call(operators, device)


def test_the_total_norm_and_the_factor_that_clips_it(target: tuple[object, torch.device]) -> None:
    operators, device = target
    tensors = [torch.randn(n, device=device) for n in (3, 50_000, 0, 7)]
    rows = torch.empty(4, 6, dtype=torch.float64, device=device)
    operators.grad_stats_into(tensors, rows)
    needed = math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))
    for max_norm in (0.5, 1e6):
        total, factor = operators.clip_coefficient(rows, max_norm).tolist()
        assert total == pytest.approx(needed, rel=1e-6)
        assert factor == pytest.approx(min(1.0, max_norm / needed), rel=1e-6)
    torch.library.opcheck(operators.clip_coefficient.default, (rows, 0.5))


def test_an_empty_list_is_no_work(target: tuple[object, torch.device]) -> None:
    operators, device = target
    operators.grad_stats_into([], torch.empty(0, 6, dtype=torch.float64, device=device))
    operators.magnitudes_into([], torch.empty(0, N_MAGNITUDES, dtype=torch.float64, device=device))
    operators.scale_([], torch.ones((), device=device))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_passes(target: tuple[object, torch.device], name: str) -> None:
    operators, device = target
    tensors = [torch.randn(n, device=device) for n in (3, 50_000)]
    rows = torch.empty(2, N_MAGNITUDES if name == "magnitudes_into" else 6, dtype=torch.float64, device=device)
    second = torch.tensor(0.5, device=device) if name == "scale_" else rows
    torch.library.opcheck(getattr(operators, name).default, (tensors, second))


# ---- Tests that need a GPU.


@pytest.mark.gpu
def test_work_is_enqueued_on_the_current_stream() -> None:
    """On a busy side stream the result must appear only when the stream reaches the kernel."""
    x = torch.zeros(1 << 24, device="cuda")
    out = torch.full((1, 6), torch.nan, dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(1.0)
        torch.ops.gradprobe.grad_stats_into([x], out)
    stream.synchronize()
    assert out[0, 0].item() == x.numel()


@pytest.mark.gpu
def test_no_synchronisation() -> None:
    tensors = [torch.randn(n, device="cuda") for n in (5, 100_000, 3)]
    out = torch.empty(3, 6, dtype=torch.float64, device="cuda")
    coefficient = torch.tensor(0.5, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.gradprobe.grad_stats_into(tensors, out)
        torch.ops.gradprobe.scale_(tensors, coefficient)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_a_captured_graph_measures_the_values_at_replay() -> None:
    tensors = [torch.ones(n, device="cuda") for n in (5, 100_000, 3)]
    out = torch.empty(3, 6, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.ops.gradprobe.grad_stats_into(tensors, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.gradprobe.grad_stats_into(tensors, out)
    # Overwrites any scratch space that was freed.
    noise = [torch.full((1 << 16,), torch.nan, device="cuda") for _ in range(50)]
    for value in (2.0, 3.0):
        for tensor in tensors:
            tensor.fill_(value)
        graph.replay()
        assert out[:, 0].tolist() == [value * tensor.numel() for tensor in tensors]
    del noise


CAPTURE = """
import torch
from gradprobe import ops
device = torch.device("cuda", 0)
a = torch.ones(100_000, dtype=torch.bfloat16, device=device)
ops.resolve("native", device)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    rows = torch.ops.gradprobe.residual_branch_stats(a, a)
graph.replay()
assert rows[0, 0].item() == a.numel()
"""


@pytest.mark.gpu
def test_a_kernel_that_never_ran_can_be_captured() -> None:
    """Choosing the back end loads the kernels that its trial does not run, too."""
    done = subprocess.run([sys.executable, "-c", CAPTURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_no_allocation_in_steady_state() -> None:
    tensors = [torch.randn(100_000, device="cuda") for _ in range(50)]
    out = torch.empty(50, 6, dtype=torch.float64, device="cuda")
    torch.ops.gradprobe.grad_stats_into(tensors, out)
    before = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()
    for _ in range(20):
        torch.ops.gradprobe.grad_stats_into(tensors, out)
    assert (torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()) == before


@pytest.mark.gpu
def test_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.full((50_000,), 2.0, device="cuda:1")
    out = torch.empty(1, 6, dtype=torch.float64, device="cuda:1")
    with torch.cuda.device(0):
        torch.ops.gradprobe.grad_stats_into([x], out)
    assert out[0, 0].item() == 100_000
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: needed device cuda:1"):
        torch.ops.gradprobe.grad_stats_into(
            [x, x.to("cuda:0")], torch.empty(2, 6, dtype=torch.float64, device="cuda:1")
        )


@pytest.mark.gpu
def test_auto_selects_the_native_kernels() -> None:
    assert ops.resolve("auto", torch.device("cuda")).name == "native"
