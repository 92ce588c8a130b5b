"""The six statistics against exact sums: magnitudes, dtypes, layouts, sizes, NaN and infinity, threads."""

import math
import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers.ops_truth import DTYPES, FLOAT8, MEASURED, TARGETS, Target, assert_right, measure, truth
from hypothesis import given
from hypothesis import strategies as st

from gradprobe import ops
from gradprobe.errors import ArgumentError

pytestmark = pytest.mark.parametrize("target", TARGETS)

MAGNITUDES = {
    torch.float16: (6e-8, 1e-6, 6e-5, 1e-3, 1.0, 1e3, 4e4),
    torch.bfloat16: (1e-40, 1e-38, 1e-30, 1e-25, 2e-17, 1e-10, 1e-3, 1.0, 1e3, 1e10, 5e16, 1e25, 1e38),
    torch.float32: (1e-45, 1e-43, 1e-40, 1e-38, 1e-30, 1e-25, 2e-17, 1e-10, 1e-3, 1.0, 1e3, 1e10, 5e16, 1e25, 2e38),
    torch.float64: (5e-324, 1e-320, 1e-308, 1e-200, 2e-145, 1e-100, 1e-25, 1.0, 1e25, 1e100, 5e144, 1e200, 1e308),
    torch.float8_e4m3fn: (2e-3, 1e-2, 0.02, 1.0, 290.0),
    torch.float8_e5m2: (2e-5, 5e-5, 1e-3, 1.0, 1e3, 3.5e4),
}
RANGES = [(dtype, magnitude) for dtype, magnitudes in MAGNITUDES.items() for magnitude in magnitudes]


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def noise(n: int, dtype: torch.dtype, magnitude: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Returns numbers of both signs whose magnitudes are uniform in [0.5, 1.5] * magnitude."""
    x = np.random.default_rng(seed).uniform(0.5, 1.5, n) * np.where(np.arange(n) * 7 % 5 < 2, -1.0, 1.0)
    return torch.from_numpy(x * magnitude).to(dtype)


@pytest.mark.parametrize(("dtype", "magnitude"), RANGES, ids=name)
def test_every_magnitude(target: Target, dtype: torch.dtype, magnitude: float) -> None:
    x = noise(5_001, dtype, magnitude)
    assert x.any()
    assert_right([x.to(target.device)], target)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_every_number_of_float8(target: Target, dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    finite = numbers[torch.isfinite(numbers.view(dtype).float())]
    tensors = [*numbers.split(1), numbers, numbers[:-1], numbers[::3], numbers.repeat(90)[:-5], numbers[:0]]
    tensors += [finite, finite.repeat(90)[3:], finite.repeat(90).view(-1, 2)[:, 1]]
    assert_right([tensor.to(target.device).view(dtype) for tensor in tensors], target)


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_every_power_of_two(target: Target, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    lowest = math.frexp(info.smallest_normal * info.eps)[1]
    highest = math.frexp(info.max)[1] - 1
    step = 1 if dtype != torch.float64 else 7
    tensors = [noise(700, dtype, math.ldexp(1.0, e)).to(target.device) for e in range(lowest, highest, step)]
    assert_right(tensors, target)


@pytest.mark.parametrize("limit", [2.0**-480, 2.0**480], ids=["low", "high"])
def test_chunks_on_both_sides_of_a_range_limit(target: Target, limit: float) -> None:
    # Such chunks keep their sums at different scales until they are merged.
    x = noise(100_000, torch.float64, limit / 2)
    x[50_000:] *= 4.0
    y = x.flip(0)
    z = x.clone()
    z[::2] = 0.0
    assert_right([t.to(target.device) for t in (x, y, z)], target)


@pytest.mark.parametrize(("dtype", "magnitude"), RANGES, ids=name)
def test_a_large_element_in_the_last_of_many_small_chunks(target: Target, dtype: torch.dtype, magnitude: float) -> None:
    largest = MAGNITUDES[dtype][-1]
    x = noise(33_000, dtype, magnitude)
    x[-3] = largest
    assert_right([x.to(target.device)], target)


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-3, 7e4])
def test_constant_inputs_that_always_round_the_same_way(target: Target, dtype: torch.dtype, value: float) -> None:
    value = min(value, 0.93 * torch.finfo(dtype).max)
    x = torch.full((60_003,), value, dtype=dtype, device=target.device)
    assert_right([x, x[:5000]], target)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("small", [0.99 * 2.0**-24, 0.99**0.5 * 2.0**-12], ids=["sum-abs", "sum-sq"])
def test_small_elements_that_vanish_beside_a_large_one(target: Target, small: float, dtype: torch.dtype) -> None:
    # In float32, 1 + small (or its square) is 1: an accumulator that adds more than 16 of them is off by 1e-6.
    x = torch.full((4096,), small, dtype=dtype)
    x[:64] = 1.0
    assert_right([x.to(target.device)], target)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_random_sum_is_small_against_its_standard_deviation(target: Target, seed: int) -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed))
    want = truth(x)
    rows, _ = measure([x.to(target.device)], target)
    # The sum of n elements of mean zero has the standard deviation sqrt(n) * rms, the norm.
    assert abs(rows[0, 0].item() - want.sum) <= 3e-7 * want.norm
    assert abs(rows[0, 1].item() - want.sum_abs) <= 1e-7 * want.sum_abs


BOUNDARIES = sorted(
    {0, 1, *range(2, 140), *(b + d for b in (256, 512, 768, 832, 1536, 2048, 4096) for d in (-1, 0, 1))}
)
CHUNK_BOUNDARIES = [b + d for b in (32768, 65536) for d in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_sizes_around_every_boundary_and_any_alignment(target: Target, dtype: torch.dtype) -> None:
    base = noise(5000, dtype).to(target.device)
    assert_right([base[n % 7 : n % 7 + n] for n in BOUNDARIES], target)
    base = noise(70_000, dtype).to(target.device)
    assert_right([base[3 : 3 + n] for n in CHUNK_BOUNDARIES], target)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x[:10_080].view(28, 360),
    "scalar": lambda x: x[5],
    "empty": lambda x: x[:0],
    "empty-2d": lambda x: x[:0].view(0, 7),
    "transposed": lambda x: x[:10_080].view(28, 360).t(),
    "channels-last": lambda x: x[:10_080].view(4, 7, 12, 30).to(memory_format=torch.channels_last),
    "permuted-5d": lambda x: x[:10_080].view(2, 14, 6, 10, 6).permute(3, 0, 4, 1, 2),
    "sizes-of-one": lambda x: x[:360].view(1, 360, 1).as_strided((1, 360, 1), (7, 1, 99)),
    "columns": lambda x: x[:10_080].view(28, 360)[:, 3:200],
    "every-third": lambda x: x[1::3],
    "inner-strided": lambda x: x[:10_080].view(12, 14, 60)[:, ::2, ::7],
    "narrowed": lambda x: x[:10_080].view(20, 21, 24).narrow(1, 3, 11).narrow(2, 1, 20),
    "narrowed-transposed": lambda x: x[:10_080].view(20, 21, 24).narrow(1, 3, 11).transpose(0, 2),
    "expanded": lambda x: x[:100].view(1, 100, 1).expand(30, 100, 5),
    "expanded-scalar": lambda x: x[3].expand(70_001),
    "overlapping": lambda x: x.as_strided((500, 40), (3, 1)),
    "diagonal": lambda x: x[:10_000].view(100, 100).diagonal(),
    "strided-over-chunks": lambda x: x.repeat(20)[::3],
    "negative-bit": lambda x: torch._neg_view(x[:500]),
    "of-a-graph": lambda x: x[:500].clone().requires_grad_().view(20, 25),
    "leaf": lambda x: x[:500].clone().requires_grad_(),
}


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(target: Target, layout: str, dtype: torch.dtype) -> None:
    if layout == "negative-bit" and dtype in FLOAT8:
        pytest.skip("torch cannot negate float8")
    x = noise(20_000, dtype, 0.01).to(target.device)
    tensor = LAYOUTS[layout](x)
    rows = ops.grad_stats([tensor], backend=target.backend).cpu()
    twin = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    want = ops.grad_stats([twin], backend=target.backend).cpu()
    assert_right([twin], target)
    assert ((rows - want)[:, :3].abs() <= 1e-6 * want[:, 1:2]).all()
    assert torch.equal(rows[:, 3:], want[:, 3:])


@st.composite
def strided_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draws a shape and strides over one storage, and elements from the dtype's whole range, with zeros."""
    dtype = draw(st.sampled_from(MEASURED))
    shape = draw(st.lists(st.integers(1, 9), max_size=5).filter(lambda sizes: np.prod(sizes, dtype=int) <= 4000))
    strides = [draw(st.integers(0, 40)) for _ in shape]
    offset = draw(st.integers(0, 5))
    needed = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    picked = draw(st.lists(st.sampled_from((0.0, *MAGNITUDES[dtype])), min_size=1, max_size=4))
    values = rng.choice(picked, needed) * rng.uniform(0.5, 1.2, needed) * rng.choice([-1.0, 1.0], needed)
    return torch.from_numpy(values).to(dtype).as_strided(shape, strides, offset)


@given(tensors=st.lists(strided_tensors(), max_size=4))
def test_any_shape_stride_dtype_and_magnitude(target: Target, tensors: list[torch.Tensor]) -> None:
    if target.device != "cpu":  # a copy to another device loses the strides
        tensors = [t.as_strided(t.shape, t.stride()) for t in (t.contiguous().to(target.device) for t in tensors)]
    assert_right(tensors, target)


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf], ids=str)
def test_a_special_value_at_any_position(target: Target, special: float, dtype: torch.dtype) -> None:
    sizes = (1, 17, 64, 200, 4096, 4099, 33_000)
    tensors = []
    for n in sizes:
        for place in sorted({0, n // 2, n - 1, min(16, n - 1), min(63, n - 1)}):
            x = noise(n, dtype)
            x[place] = special
            tensors.append(x.to(target.device))
    assert_right(tensors, target)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2], ids=name)
def test_infinity_among_numbers_whose_sum_overflows(target: Target, dtype: torch.dtype) -> None:
    # Added naively, the finite numbers overflow to -inf, and +inf turns that into NaN.
    x = torch.full((9000,), -torch.finfo(dtype).max, dtype=dtype)
    x[8000] = torch.inf
    y = x.clone()
    y[3] = -torch.inf
    z = x.clone()
    z[10] = torch.nan
    assert_right([t.to(target.device) for t in (x, y, z)], target)
    rows, _ = measure([t.to(target.device) for t in (x, y, z)], target)
    assert rows[0, 0] == torch.inf
    assert rows[1, 0].isnan()
    assert rows[2, :4].isnan().all()


@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_zeros_of_both_signs_are_counted(target: Target, dtype: torch.dtype) -> None:
    x = noise(10_000, dtype)
    x[::3] = 0.0
    x[1::7] = -0.0
    assert_right([x.to(target.device), torch.zeros(5000, dtype=dtype, device=target.device)], target)


def test_three_thousand_tensors_of_mixed_dtypes(target: Target) -> None:
    rng = np.random.default_rng(3)
    tensors = [
        noise(int(n), MEASURED[k % 6], 10.0 ** rng.uniform(-4, 2), seed=k).to(target.device)
        for k, n in enumerate(rng.integers(0, 300, 3000))
    ]
    assert_right(tensors, target)


def test_no_tensors(target: Target) -> None:
    rows, norms = measure([], target)
    assert rows.shape == (0, 6)
    assert norms.shape == (0,)
    assert ops.grad_stats([], backend=target.backend).shape == (0, 6)


def test_rows_are_written_to_a_view_and_nowhere_else(target: Target) -> None:
    ring = torch.full((5, 3, 6), -7.0, dtype=torch.float64, device=target.device)
    version = ring._version
    tensors = [noise(100, torch.float32, seed=k).to(target.device) for k in range(3)]
    ops.grad_stats_into(tensors, ring[2], ops.resolve(target.backend, torch.device(target.device)))
    assert torch.equal(ops.true_rows(ring[2]), ops.grad_stats(tensors, backend=target.backend))
    assert (ring[[0, 1, 3, 4]] == -7.0).all()
    assert ring._version > version


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_complex_and_sparse(target: Target) -> None:
    z = torch.complex(noise(500, torch.float32), noise(500, torch.float32, seed=1)).to(target.device)
    index = torch.tensor([[0, 3, 3]], device=target.device)
    values = torch.tensor([1.0, 2.0, -5.0], device=target.device)
    sparse = torch.sparse_coo_tensor(index, values, (9,), check_invariants=True)
    compressed = torch.tensor([[0.0, 2.0], [0.0, -1.0]], device=target.device).to_sparse_csr()
    rows = ops.grad_stats([z, z.conj(), sparse, compressed], backend=target.backend).cpu()
    assert rows[0].tolist() == pytest.approx(ops.grad_stats([z.abs()], backend="reference")[0].tolist(), rel=1e-6)
    assert torch.equal(rows[0], rows[1])
    assert rows[2].tolist() == [-2.0, 4.0, 10.0, 3.0, 0.0, 0.0]
    assert rows[3].tolist() == [1.0, 3.0, 5.0, 2.0, 0.0, 0.0]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", MEASURED, ids=name)
def test_same_bits_for_any_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    if target.backend == "reference":
        pytest.skip("torch's sums depend on the number of threads")
    sizes = [7, 3_000_001, 100, 32_768, 65_537, *([50] * 500), 400_000, 1]
    tensors = [noise(n, dtype, 10.0 ** (k % 5 - 3), seed=k).to(target.device) for k, n in enumerate(sizes)]
    tensors.append(tensors[1][:3_000_000].view(1000, 3000)[:, ::3])
    seen = []
    for n_threads in (1, 2, 3, 2, 1, 8):
        torch.set_num_threads(n_threads)
        out = torch.empty(len(tensors), 6, dtype=torch.float64, device=target.device)
        ops.grad_stats_into(tensors, out, ops.resolve(target.backend, torch.device(target.device)))
        seen.append(out.view(torch.int64))
    assert all(torch.equal(bits, seen[0]) for bits in seen)


@pytest.mark.parametrize("n", [100, 300_000])
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(d, m) for d, m in RANGES if m < max(1e-5, torch.finfo(d).tiny)], ids=name
)
def test_subnormal_numbers_count_while_torch_flushes_them(
    target: Target, dtype: torch.dtype, magnitude: float, n: int, request: pytest.FixtureRequest
) -> None:
    x = noise(n, dtype, magnitude)
    x[::5] = 0.0
    x[n // 2] = magnitude
    want = truth(x)
    x = x.to(target.device)
    request.getfixturevalue("flush_denormal")
    backend = ops.resolve(target.backend, torch.device(target.device))
    out = torch.empty(1, 6, dtype=torch.float64, device=target.device)
    ops.grad_stats_into([x], out, backend)
    still_flushing = not (torch.tensor([1e-40]) * 1.0).any()
    torch.set_flush_denormal(False)
    rows, norms = ops.true_rows(out).cpu(), ops.norms(out).cpu()
    assert still_flushing
    assert norms[0].item() == pytest.approx(want.norm, rel=1e-6, abs=0)
    assert rows[0, 1].item() == pytest.approx(want.sum_abs, rel=1e-6, abs=0)
    assert rows[0, 3].item() == want.abs_max
    assert rows[0, 4:].tolist() == [want.n_zero, 0]


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "n", [pytest.param(2**26 + 7, id="64M"), pytest.param(2**28, id="256M", marks=pytest.mark.soak)]
)
def test_an_expanded_tensor_is_read_in_bounded_memory(target: Target, n: int) -> None:
    if target.backend == "reference" and n < 2**28:
        pytest.skip("the reference works in pieces of 32 MiB: only the soak test can tell")
    x = torch.full((1,), 0.5, device=target.device).expand(n)
    measure([x[:1000]], target)
    before = peak_memory_bytes()
    rows, norms = measure([x], target)
    if target.device == "cpu":
        assert peak_memory_bytes() - before < n  # bytes; a copy takes 4 * n
    assert rows[0].tolist() == pytest.approx([0.5 * n, 0.5 * n, 0.25 * n, 0.5, 0, 0], rel=1e-6)
    assert norms[0].item() == pytest.approx(0.5 * n**0.5, rel=1e-6)


@pytest.mark.soak
def test_more_elements_than_32_bits_can_count(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference takes minutes")
    n = 2**31 + 7
    rows, norms = measure([torch.zeros(1, device=target.device).expand(n)], target)
    assert rows[0].tolist() == [0, 0, 0, 0, n, 0]
    x = torch.ones(1, dtype=torch.bfloat16, device=target.device).expand(n)
    rows, norms = measure([x], target)
    assert rows[0].tolist() == [n, n, n, 1, 0, 0]
    assert norms[0].item() == pytest.approx(n**0.5, rel=1e-12)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_dense_memory_beyond_32_bits(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference takes minutes")
    n = 2**31 + 7
    x = torch.zeros(n, dtype=torch.bfloat16, device=target.device)
    x[-1], x[2**31 - 1] = 3.0, -4.0
    rows, norms = measure([x], target)
    assert rows[0].tolist() == [-1, 7, 25, 4, n - 2, 0]
    assert norms[0].item() == 5.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], r"tensors\[1\]: .*dtype of float16.*got int64"),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.bool)], r"tensors\[1\]: .*got bool"),
        ([torch.zeros(2), torch.zeros(2).to(torch.float8_e5m2fnuz)], r"tensors\[1\]: .*got float8_e5m2fnuz"),
        ([torch.zeros(2), 3.0], r"tensors\[1\]: needed a Tensor, got float"),
        (torch.zeros(2), r"tensors: needed a sequence of tensors, got one Tensor"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], r"tensors\[1\]: needed device .*, got meta"),
    ],
    ids=["int64", "bool", "float8", "number", "one-tensor", "device"],
)
def test_anything_but_a_list_of_float_tensors_is_refused(target: Target, tensors: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ops.grad_stats(tensors, backend=target.backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 6, dtype=torch.float64), r"out: needed .*shape \[1, 6\].* got .*\[2, 6\]"),
        (torch.empty(1, 5, dtype=torch.float64), r"out: needed .*shape \[1, 6\].* got .*\[1, 5\]"),
        (torch.empty(6, dtype=torch.float64), r"out: needed .*shape \[1, 6\]"),
        (torch.empty(1, 6), r"out: needed .*float64.* got .*(float32|Float)"),
        (torch.empty(1, 12, dtype=torch.float64)[:, ::2], r"out: needed contiguous.*strides \[12, 2\]"),
    ],
    ids=["rows", "columns", "dimensions", "dtype", "strides"],
)
def test_a_wrong_out_is_refused(target: Target, out: torch.Tensor, message: str) -> None:
    backend = ops.resolve(target.backend, torch.device(target.device))
    x = torch.zeros(2, device=target.device)
    moved = out.to(target.device) if out.is_contiguous() else out
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        backend.grad_stats_into([x], moved)


def test_the_hot_path_names_the_refused_tensor(target: Target) -> None:
    backend = ops.resolve(target.backend, torch.device(target.device))
    x = torch.zeros(2, device=target.device)
    out = torch.empty(2, 6, dtype=torch.float64, device=target.device)
    with pytest.raises((ArgumentError, RuntimeError), match=r"tensors\[1\]: needed a dtype of float16"):
        backend.grad_stats_into([x, x.to(torch.int32)], out)
