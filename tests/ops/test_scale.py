"""Scaling in place: bit-equal to torch's product, rounded once, for every dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from helpers.ops_truth import DTYPES, FLOAT8, TARGETS, Target, scaled_by_torch
from hypothesis import given
from hypothesis import strategies as st

from gradprobe import ops
from gradprobe.errors import ArgumentError

pytestmark = pytest.mark.parametrize("target", TARGETS)


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def every_kind(dtype: torch.dtype, n: int) -> torch.Tensor:
    """Returns numbers from the dtype's whole range, with subnormals, zeros of both signs, infinities and NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(n)
    bits = torch.randint(info.min, info.max, (n,), dtype=torch.int64, generator=generator).to(integer)
    x = bits.view(dtype).clone()
    x[: n // 2] = torch.randn(n // 2, generator=generator).to(dtype)
    specials = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
    specials.append(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    x[3 : 3 + len(specials)] = torch.tensor(specials, dtype=torch.float64).to(dtype)
    return x


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bit patterns, the same for every NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    clean = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return clean.contiguous().view(integer).cpu()


@pytest.mark.parametrize("coefficient_dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("coefficient", [0.5, 0.1, 3.7e-4, 1.0, 0.0, 1e30, -2.5, float("nan"), float("inf")])
def test_same_bits_as_a_product_of_torch(
    target: Target, coefficient: float, dtype: torch.dtype, coefficient_dtype: torch.dtype
) -> None:
    factor = torch.tensor(coefficient, dtype=coefficient_dtype, device=target.device)
    tensors = [every_kind(dtype, n).to(target.device) for n in (20, 31, 64, 1000, 70_001)]
    expected = [bits(scaled_by_torch(x, factor)) for x in tensors]
    ops.scale_(tensors, factor, backend=target.backend)
    for x, want in zip(tensors, expected, strict=True):
        assert torch.equal(bits(x), want)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x[:960].view(24, 40).t(),
    "channels-last": lambda x: x[:960].view(2, 8, 6, 10).to(memory_format=torch.channels_last),
    "every-third": lambda x: x[1::3],
    "columns": lambda x: x[:960].view(24, 40)[:, 3:20],
    "narrowed-transposed": lambda x: x[:960].view(8, 12, 10).narrow(1, 3, 7).transpose(0, 2),
    "scalar": lambda x: x[5],
    "empty": lambda x: x[:0],
    "negative-bit": lambda x: torch._neg_view(x[:100]),
    "leaf": lambda x: x[:100].clone().requires_grad_(),
    "strided-over-chunks": lambda x: x.repeat(200)[::3],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_no_element_in_between(target: Target, layout: str, dtype: torch.dtype) -> None:
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).to(target.device)
    x = LAYOUTS[layout](base)
    storage = torch.empty(0, dtype=dtype, device=target.device).set_(x.untyped_storage())
    factor = torch.tensor(0.3, device=target.device)
    mask = torch.zeros(storage.shape, dtype=torch.bool, device=target.device)
    mask.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    expected = torch.where(mask, scaled_by_torch(storage, factor), storage)
    ops.scale_([x], factor, backend=target.backend)
    assert torch.equal(bits(storage), bits(expected))


def test_the_version_counter_increases(target: Target) -> None:
    tensors = [torch.ones(3, device=target.device) for _ in range(3)]
    for call in (
        lambda: ops.scale_(tensors, torch.tensor(2.0, device=target.device), backend=target.backend),
        lambda: torch.ops.gradprobe.scale_(tensors, torch.tensor(2.0, device=target.device)),
    ):
        before = [t._version for t in tensors]
        call()
        assert all(t._version > version for t, version in zip(tensors, before, strict=True))
    w = torch.ones(3, device=target.device, requires_grad=True)
    square = w * w
    saved = square.exp()
    ops.scale_([saved], torch.tensor(2.0, device=target.device), backend=target.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_complex_and_sparse(target: Target) -> None:
    factor = torch.tensor(0.5, device=target.device)
    z = torch.tensor([1 + 2j, -3 + 4j], device=target.device)
    lazy = torch.tensor([1 + 2j, -3 + 4j], device=target.device).conj()
    index = torch.tensor([[0, 3, 3]], device=target.device)
    values = torch.tensor([1.0, 2.0, -5.0], device=target.device)
    sparse = torch.sparse_coo_tensor(index, values, (4,), check_invariants=True)
    ops.scale_([z, lazy, sparse], factor, backend=target.backend)
    assert z.tolist() == [0.5 + 1j, -1.5 + 2j]
    assert lazy.tolist() == [0.5 - 1j, -1.5 - 2j]
    assert sparse.to_dense().tolist() == [0.5, 0.0, 0.0, -1.5]


def test_mixed_dtypes_and_three_thousand_tensors(target: Target) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(k % 97, generator=generator).to(DTYPES[k % 4]).to(target.device) for k in range(3000)]
    factor = torch.tensor(0.7, dtype=torch.float64, device=target.device)
    expected = [bits(scaled_by_torch(x, factor)) for x in tensors]
    ops.scale_(tensors, factor, backend=target.backend)
    assert all(torch.equal(bits(x), want) for x, want in zip(tensors, expected, strict=True))


@pytest.mark.usefixtures("flush_denormal")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_flushes_when_torch_flushes(target: Target, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    factor = torch.tensor(0.25, device=target.device)
    x = (torch.arange(1, 65, dtype=torch.float64) * tiny).to(dtype).to(target.device)
    expected = scaled_by_torch(x, factor)
    ops.scale_([x], factor, backend=target.backend)
    assert torch.equal(bits(x), bits(expected))


@given(value=st.floats(width=32), coefficient=st.floats(width=32))
def test_any_float16_and_float32_product(target: Target, value: float, coefficient: float) -> None:
    factor = torch.tensor(coefficient, device=target.device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.tensor([value] * 9, device=target.device).to(dtype)
        expected = scaled_by_torch(x, factor)
        ops.scale_([x], factor, backend=target.backend)
        assert torch.equal(bits(x), bits(expected))


@pytest.mark.parametrize(
    ("tensors", "coefficient", "message"),
    [
        ([torch.zeros(2, dtype=torch.int32)], torch.tensor(1.0), r"tensors\[0\]: .*got int32"),
        ([torch.zeros(2)], torch.ones(2), r"coefficient: needed one .*shape \[2\]"),
        ([torch.zeros(2)], torch.tensor(1), r"coefficient: needed one float32 or float64 element, got int64"),
        ([torch.zeros(2)], torch.ones((), device="meta"), r"coefficient: needed device .*, got meta"),
    ],
    ids=["int32", "two-elements", "integer", "device"],
)
def test_bad_arguments(target: Target, tensors: list[torch.Tensor], coefficient: torch.Tensor, message: str) -> None:
    moved = [t.to(target.device) for t in tensors]
    with pytest.raises(ArgumentError, match=message):
        ops.scale_(moved, coefficient, backend=target.backend)


@pytest.mark.parametrize(
    "overlapping",
    [lambda x: x[:1].expand(5), lambda x: x.as_strided((4, 3), (1, 1)), lambda x: x.as_strided((3, 4), (2, 1))],
    ids=["expanded", "folded", "windows"],
)
def test_overlapping_elements_are_refused(target: Target, overlapping: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(12, device=target.device)
    with pytest.raises((ArgumentError, RuntimeError), match=r"overlap|single memory location"):
        ops.scale_([torch.ones(2, device=target.device), overlapping(x)], x[:1], backend=target.backend)


@pytest.mark.parametrize("dtype", FLOAT8, ids=name)
def test_float8_is_only_measured(target: Target, dtype: torch.dtype) -> None:
    x, factor = torch.ones(3, device=target.device).to(dtype), torch.tensor(0.5, device=target.device)
    message = r"tensors\[0\]: needed a dtype of float16, bfloat16, float32, float64.*, got .*"
    with pytest.raises(ArgumentError, match=message):
        ops.scale_([x], factor, backend=target.backend)
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        ops.resolve(target.backend, torch.device(target.device)).scale_([x], factor)
    assert x.float().tolist() == [1.0, 1.0, 1.0]
