"""Residual adds in place: bit-equal to torch's add_ and relu_, with the same rules."""

from collections.abc import Callable

import pytest
import torch
from helpers.ops_truth import DTYPES
from helpers.residual_cases import (
    LAYOUTS,
    NAMESPACES,
    RELU,
    SHAPES,
    Block,
    Join,
    assert_like_torch_in_place,
    bits,
    by_torch,
    every_kind,
    in_place_by_torch,
    name,
    operators,
    specials,
    weights_after_training,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradprobe
from gradprobe.errors import ArgumentError
from gradprobe.nn import ResidualAdd
from gradprobe.ops.residual import residual_add_


def through_leaves(join: Join, x: Tensor, f: Tensor, relu: bool, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the result and the gradients of the leaves behind x and f."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, f)]
    overwritten = leaves[0] * 1
    y = join(overwritten, leaves[1], relu)
    assert y is overwritten
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@RELU
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_torch(dtype: torch.dtype, relu: bool) -> None:
    for n in (1, 2, 7, 8, 9, 31, 64, 1000, 32767, 32769, 100_003):
        x, f, grad = (every_kind(dtype, n, seed) for seed in (1, 2, 3))
        assert_like_torch_in_place(lambda join: through_leaves(join, x, f, relu, grad))  # noqa: B023
    x, f = specials(dtype)
    assert_like_torch_in_place(lambda join: through_leaves(join, x, f, relu, f))


@given(x=st.floats(width=32), f=st.floats(width=32))
def test_any_pair_of_numbers(x: float, f: float) -> None:
    for dtype in DTYPES:
        a, b = torch.full((9,), x, dtype=torch.float64).to(dtype), torch.full((9,), f, dtype=torch.float64).to(dtype)
        assert torch.equal(bits(residual_add_(a.clone(), b, True)), bits(by_torch(a, b, True)))


@RELU
@pytest.mark.parametrize("of_f", LAYOUTS)
@pytest.mark.parametrize("of_x", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_pair_of_layouts(namespace: str, of_x: str, of_f: str, relu: bool) -> None:
    for shape in SHAPES:
        x, f = (LAYOUTS[key](torch.randn(shape)) for key in (of_x, of_f))
        before, strides, version = by_torch(x, f, relu), x.stride(), x._version
        operators(namespace).residual_add_(x, f, relu)
        assert torch.equal(x, before)
        assert x.stride() == strides
        assert x._version > version


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_memory_between_the_elements_is_not_written(namespace: str) -> None:
    whole = torch.arange(60.0).view(3, 20)
    operators(namespace).residual_add_(whole[:, 5:15:2], torch.full((3, 5), -100.0), True)
    expected = torch.arange(60.0).view(3, 20)
    expected[:, 5:15:2] = 0.0
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (5, 7), (2, 3, 4, 5, 6), (1,) * 12])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    x, f = torch.randn(shape), torch.randn(shape)
    assert torch.equal(residual_add_(x.clone(), f, True), torch.relu(x + f))


# ---- Shared memory

SHARING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "itself": lambda whole: (whole, whole),
    "a view of all": lambda whole: (whole, whole[:]),
    "one element on": lambda whole: (whole.view(-1)[1:], whole.view(-1)[:-1]),
    "one element back": lambda whole: (whole.view(-1)[:-1], whole.view(-1)[1:]),
    "transposed": lambda whole: (whole, whole.t()),
    "halves of rows": lambda whole: whole.chunk(2, dim=1),
    "halves of columns": lambda whole: whole.chunk(2, dim=0),
    "a row for all": lambda whole: (whole, whole[3:4].expand_as(whole)),
    "every second": lambda whole: (whole.view(-1)[::2], whole.view(-1)[1::2]),
    "every second and the first": lambda whole: (whole.view(-1)[::2], whole.view(-1)[: whole.numel() // 2]),
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_addend_is_read_as_it_was_before_the_call(namespace: str, sharing: str) -> None:
    for size in (4, 300):
        whole = torch.randn(size, size)
        x, f = SHARING[sharing](whole)
        expected = torch.relu(x + f)
        operators(namespace).residual_add_(x, f, True)
        assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "fold",
    [lambda x: x[:1].expand(3, 4), lambda x: x.view(-1).as_strided((3, 4), (2, 1))],
    ids=["expanded", "windows"],
)
def test_a_target_with_overlapping_elements_is_refused(fold: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ArgumentError, match="x: needed elements that do not overlap in memory, got shape"):
        residual_add_(fold(x), torch.ones(3, 4))
    for namespace in NAMESPACES:
        with pytest.raises((ArgumentError, RuntimeError), match="x: needed elements that do not overlap in memory"):
            operators(namespace).residual_add_(fold(x), torch.ones(3, 4), False)
    assert torch.equal(x, torch.ones(3, 4))


# ---- Dtypes

OTHERS = (torch.bool, torch.uint8, torch.int64, torch.complex64)


@pytest.mark.parametrize("of_f", [*DTYPES, *OTHERS], ids=name)
@pytest.mark.parametrize("of_x", [*DTYPES, *OTHERS], ids=name)
def test_the_dtype_is_that_of_the_target(of_x: torch.dtype, of_f: torch.dtype) -> None:
    x, f = torch.tensor([3.0, -7.0, 0.1]).abs().to(of_x), torch.tensor([1.7, 7.1, -0.3]).abs().to(of_f)
    relu = not x.is_complex() and of_x != torch.bool
    try:
        expected = in_place_by_torch(x.clone(), f, relu)
    except RuntimeError:
        with pytest.raises(ArgumentError, match=f"f: needed a dtype .* {name(of_x)} in place, got {name(of_f)}"):
            residual_add_(x, f, relu)
        return
    assert torch.equal(residual_add_(x, f, relu), expected)
    assert x.dtype == of_x


@pytest.mark.parametrize("of_f", [torch.bfloat16, torch.float64], ids=["narrower", "wider"])
def test_gradients_have_the_dtypes_of_the_operands(of_f: torch.dtype) -> None:
    x, f, grad = torch.randn(5, 7), torch.randn(5, 7).to(of_f), torch.randn(5, 7)
    assert_like_torch_in_place(lambda join: through_leaves(join, x, f, True, grad))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex128], ids=name)
def test_relu_is_refused_for_dtypes_without_one(dtype: torch.dtype) -> None:
    x = torch.ones(3).to(dtype)
    with pytest.raises(ArgumentError, match=f"relu: needed False for a sum of dtype {name(dtype)}, got True"):
        residual_add_(x, x.clone(), relu=True)
    assert torch.equal(x, torch.ones(3).to(dtype))


@pytest.mark.parametrize(
    ("x", "f", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"f: needed the shape of x, \[2, 3\], got \[3\]"),
        (torch.ones(2), torch.ones(2, device="meta"), r"f: needed the device of x, cpu, got meta"),
        (torch.ones(2).to_sparse(), torch.ones(2), r"x: needed a strided layout, got sparse_coo"),
        (torch.ones(2), 1.0, r"f: needed a Tensor, got float"),
    ],
    ids=["rank", "device", "sparse", "number"],
)
def test_wrong_operands_are_named(x: Tensor, f: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        residual_add_(x, f, relu=True)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("x", "f", "message"),
    [
        (torch.ones(2), torch.ones(3), r"f: needed the shape of x, \[2\], got \[3\]"),
        (torch.ones(2), torch.ones(2).half(), r"f: needed the dtype of x, "),
        (torch.ones(2).int(), torch.ones(2).int(), r"x: needed a dtype of "),
    ],
    ids=["shape", "dtype", "integers"],
)
def test_the_operator_refuses_wrong_operands(namespace: str, x: Tensor, f: Tensor, message: str) -> None:
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        operators(namespace).residual_add_(x, f, True)


# ---- In a network


def test_the_module_overwrites_the_branch() -> None:
    join = ResidualAdd(relu=True, inplace=True)
    x, f = torch.randn(3), torch.randn(3)
    shortcut, expected = x.clone(), torch.relu(x + f)
    assert join(x, f) is f
    assert torch.equal(f, expected)
    assert torch.equal(x, shortcut)
    assert repr(join) == "ResidualAdd(relu=True, inplace=True)"
    assert gradprobe.residual_add_ is residual_add_


def test_a_network_learns_bit_equal_weights() -> None:
    joins = (lambda x, f: torch.relu(x + f), ResidualAdd(relu=True, inplace=True))
    weights = [weights_after_training(join) for join in joins]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_overwriting_a_shortcut_that_the_branch_needs_is_detected() -> None:
    block = Block(lambda x, f: residual_add_(x, f, relu=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(torch.randn(2, 4, 8, 8, requires_grad=True) * 1).sum().backward()
