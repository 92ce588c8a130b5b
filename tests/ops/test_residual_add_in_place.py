"""`residual_add_`: torch's add_ and relu_, after checks that name a wrong argument."""

import shutil
from collections.abc import Callable

import pytest
import torch
from helpers.ops_truth import DTYPES
from helpers.residual_cases import (
    LAYOUTS,
    RELU,
    SHAPES,
    TRANSFORMS,
    Block,
    Join,
    assert_like_torch_in_place,
    bits,
    by_torch,
    every_kind,
    in_place_by_torch,
    name,
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
def test_every_pair_of_layouts(of_x: str, of_f: str, relu: bool) -> None:
    for shape in SHAPES:
        x, f = (LAYOUTS[key](torch.randn(shape)) for key in (of_x, of_f))
        expected, strides, version = by_torch(x, f, relu), x.stride(), x._version
        residual_add_(x, f, relu)
        assert torch.equal(x, expected)
        assert x.stride() == strides
        assert x._version > version


def test_memory_between_the_elements_is_not_written() -> None:
    whole = torch.arange(60.0).view(3, 20)
    residual_add_(whole[:, 5:15:2], torch.full((3, 5), -100.0), True)
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
    "halves of rows": lambda whole: whole.chunk(2, dim=1),
    "halves of columns": lambda whole: whole.chunk(2, dim=0),
    "every second": lambda whole: (whole.view(-1)[::2], whole.view(-1)[1::2]),
}
OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "one element on": lambda whole: (whole.view(-1)[1:], whole.view(-1)[:-1]),
    "one element back": lambda whole: (whole.view(-1)[:-1], whole.view(-1)[1:]),
    "transposed": lambda whole: (whole, whole.t()),
}


@pytest.mark.parametrize("sharing", SHARING)
def test_operands_may_share_memory_element_for_element(sharing: str) -> None:
    for size in (4, 300):
        x, f = SHARING[sharing](torch.randn(size, size))
        expected = torch.relu(x + f)
        residual_add_(x, f, True)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_operands_that_overlap_in_part_are_refused_by_torch(overlap: str) -> None:
    whole = torch.randn(4, 4)
    before = whole.clone()
    with pytest.raises(RuntimeError, match="written-to tensor refer to a single memory location"):
        residual_add_(*OVERLAPS[overlap](whole), True)
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    "fold",
    [lambda x: x[:1].expand(3, 4), lambda x: x.view(-1).as_strided((3, 4), (2, 1))],
    ids=["expanded", "windows"],
)
def test_a_target_with_overlapping_elements_is_refused(fold: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ArgumentError, match="x: needed elements that do not overlap in memory, got shape"):
        residual_add_(fold(x), torch.ones(3, 4))
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


# ---- Autograd


def refused(join: Join, x: Tensor) -> str:
    """Returns the error message, and checks that nothing was written."""
    before = x.detach().clone()
    with pytest.raises(RuntimeError) as error:
        join(x, torch.ones_like(x).requires_grad_(), True)
    assert torch.equal(x, before)
    return str(error.value).partition(" For example")[0].partition("http")[0]


def view_under_no_grad() -> Tensor:
    made = torch.randn(3, requires_grad=True) * 1
    with torch.no_grad():
        return made[1:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, requires_grad=True),
        lambda: torch.nn.Parameter(torch.randn(3)),
        lambda: torch.randn(3, requires_grad=True)[1:],
        lambda: (torch.randn(2, 3, requires_grad=True) * 1).unbind(0)[0],
        view_under_no_grad,
    ],
    ids=["leaf", "parameter", "view-of-leaf", "one-of-several-views", "view-under-no-grad"],
)
def test_autograd_refuses_with_its_own_message(make: Callable[[], Tensor]) -> None:
    assert refused(residual_add_, make()) == refused(in_place_by_torch, make())


def test_inference_tensors_are_refused_outside_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(3)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        residual_add_(x, torch.ones(3), True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaves_may_be_written_while_nothing_is_recorded(mode: Callable[[], torch.no_grad]) -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    with mode():
        assert residual_add_(x, torch.ones(2), True) is x
    assert x.tolist() == [2.0, 0.0]
    assert x.requires_grad
    assert x.is_leaf
    assert x._version > 0


def test_a_target_without_gradient_requires_it_like_the_addend() -> None:
    x, f = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0], requires_grad=True)
    residual_add_(x, f, True).backward(torch.tensor([3.0, 4.0]))
    assert x.requires_grad
    assert f.grad.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("what", ["target", "result"])
def test_overwriting_a_saved_tensor_is_detected(what: str) -> None:
    x = torch.randn(3, requires_grad=True) * 1
    square = x.square()
    y = residual_add_(x, torch.randn(3), relu=True)
    if what == "result":
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square if what == "target" else y).sum().backward()


def test_without_relu_nothing_is_saved() -> None:
    leaf = torch.randn(3, requires_grad=True)
    residual_add_(leaf * 1, torch.randn(3)).mul_(2).sum().backward()
    assert leaf.grad.tolist() == [2.0, 2.0, 2.0]


HISTORIES: dict[str, Callable[[Join, Tensor, Tensor], list[Tensor]]] = {
    "a view of the target": lambda join, x, f: [join(x[1:], f[1:], True), x],
    "a target with a view": lambda join, x, f: (lambda view: [join(x, f, True), view])(x.view(-1)),
    "the target twice": lambda join, x, f: [join(x, x, True)],
    "two in a row": lambda join, x, f: [join(join(x, f, False), f, True)],
    "the other way round": lambda join, x, f: [join(f * 2, join(x, f, True), True)],
    "checkpointed": lambda join, x, f: [
        torch.utils.checkpoint.checkpoint(lambda x: join(x * 2, f, True).square(), x, use_reentrant=False)
    ],
}


@pytest.mark.parametrize("history", HISTORIES)
def test_gradients_through_operations_before_and_after(history: str) -> None:
    def of(join: Join) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = [torch.randn(3, 4, requires_grad=True) for _ in "xf"]
        outputs = HISTORIES[history](join, leaves[0] * 1, leaves[1])
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return *(output.detach() for output in outputs), *(g for g in gradients if g is not None)

    assert_like_torch_in_place(of)


@RELU
def test_derivatives_of_first_and_second_order(relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in "xf")

    def join(x: Tensor, f: Tensor) -> Tensor:
        return residual_add_(x * 1, f, relu)

    assert torch.autograd.gradcheck(join, (x, f), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(join, (x, f))


# ---- Function transforms and compilers


def loss(x: Tensor, f: Tensor) -> Tensor:
    return residual_add_(x * 2, f, relu=True).square().sum()


def loss_by_torch(x: Tensor, f: Tensor) -> Tensor:
    return torch.relu(x * 2 + f).square().sum()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform: str) -> None:
    x, f = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(TRANSFORMS[transform](loss)(x, f), TRANSFORMS[transform](loss_by_torch)(x, f))


def test_one_target_cannot_hold_a_result_per_sample() -> None:
    x, f = torch.zeros(4), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"output with shape \[4\]|vmap: inplace arithmetic"):
        torch.vmap(lambda x, f: residual_add_(x, f), in_dims=(None, 0))(x, f)
    assert x.tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    x, f = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    actual = torch.autograd.grad(compiled(x, f), (x, f))
    torch.testing.assert_close(actual, torch.autograd.grad(loss_by_torch(x, f), (x, f)))


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_a_compiled_function_overwrites_its_argument(recorded: bool) -> None:
    torch._dynamo.reset()
    leaf, f = torch.randn(3, 4, requires_grad=recorded), torch.randn(3, 4).half()
    x = leaf * 1
    y = torch.compile(lambda x, f: residual_add_(x, f, relu=True), backend="aot_eager", fullgraph=True)(x, f)
    expected = torch.relu(leaf + f)
    assert y is x
    assert torch.equal(x, expected)
    if recorded:
        torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), leaf)[0] for z in (x, expected)))


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which inductor needs")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    x, f = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, f), x)
    torch.testing.assert_close(actual, torch.autograd.grad(loss_by_torch(x, f), x))


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
