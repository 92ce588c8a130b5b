"""Residual adds: values and gradients bit-equal to torch's add and relu."""

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
from helpers.ops_truth import DTYPES
from helpers.residual_cases import (
    LAYOUTS,
    NAMESPACES,
    RELU,
    SHAPES,
    TRANSFORMS,
    bits,
    by_torch,
    every_kind,
    name,
    operators,
    specials,
    weights_after_training,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradprobe
from gradprobe import ops
from gradprobe.errors import ArgumentError
from gradprobe.nn import ResidualAdd
from gradprobe.ops import libraries, schemas
from gradprobe.ops.residual import residual_add

with_any_hooks = pytest.mark.usefixtures("any_hooks")  # the public function takes the C++ path if it can


def test_every_operator_has_a_compiled_kernel() -> None:
    if libraries.parts()["cpu"] != "ready":
        pytest.skip(libraries.parts()["cpu"])
    for name_of_operator in {schema.partition("(")[0] for schema in schemas.SCHEMAS} - {"count_if"}:
        operator = f"gradprobe::{name_of_operator}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"), operator


def both_ways(
    join: Callable[[Tensor, Tensor, bool], Tensor], x: Tensor, f: Tensor, relu: bool, grad: Tensor
) -> tuple[Tensor, ...]:
    """Returns the result and the gradients of both operands."""
    x, f = x.detach().requires_grad_(), f.detach().requires_grad_()
    y = join(x, f, relu)
    return y.detach(), *torch.autograd.grad(y, (x, f), grad)


def assert_like_torch(x: Tensor, f: Tensor, relu: bool, grad: Tensor | None = None) -> None:
    """Checks that values, gradients and the strides of the result equal torch's, bit for bit."""
    grad = torch.randn(x.shape).to(x.dtype) if grad is None else grad
    actual = both_ways(residual_add, x, f, relu, grad)
    expected = both_ways(by_torch, x, f, relu, grad)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
        assert ours.dtype == theirs.dtype
    assert actual[0].stride() == expected[0].stride()


@with_any_hooks
@RELU
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_torch(dtype: torch.dtype, relu: bool) -> None:
    for n in (1, 2, 7, 8, 9, 31, 64, 1000, 32767, 32769, 100_003):
        assert_like_torch(every_kind(dtype, n, seed=1), every_kind(dtype, n, seed=2), relu)
    x, f = specials(dtype)
    assert_like_torch(x, f, relu, grad=f)


@given(x=st.floats(width=32), f=st.floats(width=32))
def test_any_pair_of_numbers(x: float, f: float) -> None:
    for dtype in DTYPES:
        a, b = torch.full((9,), x, dtype=torch.float64).to(dtype), torch.full((9,), f, dtype=torch.float64).to(dtype)
        assert_like_torch(a, b, True, grad=a)


def test_every_pair_of_float16_exponents_rounds_like_torch() -> None:
    values = torch.arange(0, 65536, 61, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x, f = (t.contiguous() for t in torch.broadcast_tensors(values[:, None], values))
    assert torch.equal(bits(residual_add(x, f, True)), bits(torch.relu(x + f)))
    x, f = x.view(torch.bfloat16), f.view(torch.bfloat16)
    assert torch.equal(bits(residual_add(x, f, True)), bits(torch.relu(x + f)))


@with_any_hooks
@pytest.mark.parametrize("of_f", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_every_pair_of_layouts(of_x: str, of_f: str) -> None:
    for shape in SHAPES:
        x, f = (LAYOUTS[key](torch.randn(shape)) for key in (of_x, of_f))
        for relu in (False, True):
            assert_like_torch(x, f, relu)
        y, rows = torch.ops.gradprobe.residual_add_stats(x, f, True)
        assert torch.equal(y, torch.relu(x + f))
        torch.testing.assert_close(ops.true_rows(rows), ops.grad_stats([y]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_gradients_of_every_layout_have_the_strides_of_y(namespace: str, of_grad: str, of_y: str) -> None:
    for shape in SHAPES:
        grad, y = LAYOUTS[of_grad](torch.randn(shape)), LAYOUTS[of_y](torch.randn(shape))
        grad_x = operators(namespace).residual_add_backward(grad, y)
        assert torch.equal(grad_x, torch.where(y > 0, grad, 0.0))
        assert grad_x.stride() == torch.empty_like(y).stride()


@with_any_hooks
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (5, 7), (2, 3, 4, 5, 6), (1,) * 12])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    assert_like_torch(torch.randn(shape), torch.randn(shape), True)


@with_any_hooks
@pytest.mark.parametrize("wanting", ["x", "f"])
def test_one_operand_may_need_no_gradient(wanting: str) -> None:
    x, f = torch.randn(4, 5), torch.randn(4, 5)
    leaf = {"x": x, "f": f}[wanting].requires_grad_()
    residual_add(x, f, relu=True).sum().backward()
    assert torch.equal(leaf.grad, (x + f > 0).float())
    assert {"x": f, "f": x}[wanting].grad is None


@with_any_hooks
def test_an_operand_used_twice_gets_both_gradients() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    residual_add(x, x, relu=True).backward(torch.tensor([3.0, 4.0]))
    assert x.grad.tolist() == [6.0, 0.0]


@with_any_hooks
def test_no_gradient_is_recorded_if_none_is_needed() -> None:
    x = torch.randn(3, requires_grad=True)
    assert not residual_add(torch.randn(3), torch.randn(3)).requires_grad
    with torch.no_grad():
        assert not residual_add(x, x).requires_grad


@with_any_hooks
def test_a_result_modified_in_place_is_detected() -> None:
    x = torch.randn(3, requires_grad=True)
    y = residual_add(x, torch.randn(3), relu=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@with_any_hooks
@pytest.mark.parametrize("dtypes", list(itertools.permutations((*DTYPES, torch.int32, torch.complex64), 2)), ids=name)
def test_dtypes_promote_as_in_torch(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, f = (torch.tensor([3.0, -7.0, 0.1]).to(dtype) for dtype in dtypes)
    relu = not (x.is_complex() or f.is_complex())
    if x.is_floating_point() and f.is_floating_point():
        assert_like_torch(x, f, relu, grad=torch.tensor([1.1, 2.2, 3.3]).to((x + f).dtype))
    actual, expected = residual_add(x, f, relu), by_torch(x, f, relu)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex128], ids=name)
def test_other_dtypes_are_added_by_torch(dtype: torch.dtype) -> None:
    x, f = torch.tensor([1, 0, 200]).to(dtype), torch.tensor([1, 0, 100]).to(dtype)
    assert torch.equal(residual_add(x, f), x + f)
    if dtype in (torch.bool, torch.complex128):
        with pytest.raises(ArgumentError, match=f"relu: needed False for a sum of dtype {name(dtype)}, got True"):
            residual_add(x, f, relu=True)
    else:
        assert torch.equal(residual_add(x, f, relu=True), torch.relu(x + f))


@with_any_hooks
@pytest.mark.parametrize(
    ("x", "f", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"f: needed the shape of x, \[2, 3\], got \[3\]"),
        (torch.ones(2, 1), torch.ones(2, 3), r"f: needed the shape of x, \[2, 1\], got \[2, 3\]"),
        (torch.ones(2), torch.ones(2, device="meta"), r"f: needed the device of x, cpu, got meta"),
        (torch.ones(2).to_sparse(), torch.ones(2), r"x: needed a strided layout, got sparse_coo"),
        (torch.ones(2), 1.0, r"f: needed a Tensor, got float"),
    ],
    ids=["rank", "size-one", "device", "sparse", "number"],
)
def test_wrong_operands_are_named(x: Tensor, f: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        residual_add(x, f, relu=True)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.residual_add(torch.ones(2), torch.ones(3), True), r"f: needed the shape of x, \[2\], got \[3\]"),
        (lambda o: o.residual_add(torch.ones(2), torch.ones(2).half(), True), r"f: needed the dtype of x, "),
        (lambda o: o.residual_add_backward(torch.ones(2), torch.ones(1)), r"y: needed the shape of grad_y, \[2\]"),
        (
            lambda o: o.residual_add_backward(torch.ones(2, requires_grad=True), torch.ones(1)),
            r"y: needed the shape of grad_y, \[2\]",
        ),
        (lambda o: o.residual_add_stats(torch.ones(2).int(), torch.ones(2).int(), True), r"x: needed a dtype of "),
        (lambda o: o.residual_add_backward_stats(torch.ones(2).int(), None), r"grad_y: needed a dtype of "),
    ],
    ids=["shape", "dtype", "mask-shape", "mask-shape-in-second-order", "integers", "integer-gradient"],
)
def test_operators_refuse_wrong_operands(namespace: str, call: Callable[..., object], message: str) -> None:
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        call(operators(namespace))


def test_the_module_and_its_name() -> None:
    x, f = torch.randn(3), torch.randn(3)
    assert torch.equal(ResidualAdd(relu=True)(x, f), torch.relu(x + f))
    assert torch.equal(gradprobe.nn.ResidualAdd()(x, f), gradprobe.residual_add(x, f))
    assert repr(ResidualAdd(relu=True)) == "ResidualAdd(relu=True)"


@with_any_hooks
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=name)
def test_a_network_learns_bit_equal_weights(memory_format: torch.memory_format) -> None:
    joins = (lambda x, f: torch.relu(x + f), lambda x, f: residual_add(x, f, relu=True))
    weights = [weights_after_training(join, memory_format) for join in joins]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# ---- Autograd and compilers


@with_any_hooks
@RELU
def test_derivatives_of_first_and_second_order(relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in "xf")
    for join in (lambda a, b: residual_add(a, b, relu), lambda a, b: first_of_stats(a, b, relu)):
        assert torch.autograd.gradcheck(join, (x, f))
        assert torch.autograd.gradgradcheck(join, (x, f))
    y = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    for mask in (
        torch.ops.gradprobe.residual_add_backward,
        lambda grad, y: torch.ops.gradprobe.residual_add_backward_stats(grad, y if relu else None)[0],
    ):
        assert torch.autograd.gradgradcheck(mask, (x, y))


def first_of_stats(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    y, rows = torch.ops.gradprobe.residual_add_stats(x, f, relu)
    assert not rows.requires_grad
    return y


@with_any_hooks
def test_backward_through_a_backward() -> None:
    x = torch.tensor([2.0, -3.0], requires_grad=True)
    (grad,) = torch.autograd.grad(residual_add(x, torch.ones(2), relu=True).pow(3).sum(), x, create_graph=True)
    assert grad.tolist() == [27.0, 0.0]
    grad.sum().backward()
    assert x.grad.tolist() == [18.0, 0.0]


SAMPLES: dict[str, tuple[str, Callable[[Tensor, Tensor], tuple[object, ...]]]] = {
    "sum": ("residual_add", lambda a, b: (a, b, False)),
    "relu": ("residual_add", lambda a, b: (a, b, True)),
    "backward": ("residual_add_backward", lambda a, b: (a, b.detach())),
    "stats": ("residual_add_stats", lambda a, b: (a, b, True)),
    "backward-stats": ("residual_add_backward_stats", lambda a, b: (a, b.detach())),
    "backward-stats-without-relu": ("residual_add_backward_stats", lambda a, b: (a, None)),
    "branch-stats": ("residual_branch_stats", lambda a, b: (a, b)),
}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(namespace: str, sample: str) -> None:
    operator, arguments = SAMPLES[sample]
    for of_a, of_b in (("contiguous", "channels-last"), ("expanded", "narrowed")):
        a, b = (LAYOUTS[key](torch.randn(2, 3, 4, 5)).detach().requires_grad_() for key in (of_a, of_b))
        torch.library.opcheck(getattr(operators(namespace), operator).default, arguments(a, b))


def loss(x: Tensor, f: Tensor) -> Tensor:
    return residual_add(x * 2, f, relu=True).square().sum()


def loss_by_torch(x: Tensor, f: Tensor) -> Tensor:
    return torch.relu(x * 2 + f).square().sum()


@with_any_hooks
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    join = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module = ResidualAdd(relu=True)

    def step(x: Tensor) -> Tensor:
        return module(join(x), x).square().sum()

    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(join(x) + x).square().sum(), x)
    (actual,) = torch.autograd.grad(torch.compile(step, backend=backend, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which inductor needs")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    x, f = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, f), x)
    torch.testing.assert_close(actual, torch.autograd.grad(loss_by_torch(x, f), x))


@with_any_hooks
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(transform: str) -> None:
    x, f = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(TRANSFORMS[transform](loss)(x, f), TRANSFORMS[transform](loss_by_torch)(x, f))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap-of-grad"])
def test_function_transforms_under_compile(transform: str) -> None:
    torch._dynamo.reset()
    x, f = torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(TRANSFORMS[transform](loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, f), TRANSFORMS[transform](loss_by_torch)(x, f))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_operator_run_torch_instead(transform: str, namespace: str) -> None:
    def of(x: Tensor, f: Tensor) -> Tensor:
        return operators(namespace).residual_add(x * 2, f, True).square().sum()

    x, f = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(TRANSFORMS[transform](of)(x, f), TRANSFORMS[transform](loss_by_torch)(x, f))


@with_any_hooks
@pytest.mark.parametrize("join", ["residual_add", "first_of_stats"])
def test_a_recorded_sum_has_batched_gradients(join: str) -> None:
    x, f, grads = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(2, 3, 4)
    y = {"residual_add": residual_add, "first_of_stats": first_of_stats}[join](x, f, True)
    expected = torch.where(x + f > 0, grads, 0.0)
    batched = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    mapped = torch.vmap(lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0])(grads)
    assert torch.equal(batched, expected)
    assert torch.equal(mapped, expected)


@with_any_hooks
@RELU
def test_forward_mode_without_a_transform(relu: bool) -> None:
    x, f, tangent = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(3, 4)
    with torch.autograd.forward_ad.dual_level():
        y = residual_add(torch.autograd.forward_ad.make_dual(x, tangent), f, relu)
        actual = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.equal(actual, torch.where((x + f > 0) | (not relu), tangent, 0.0))


def test_statistics_refuse_vmap_and_forward_mode() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=r"do not work under torch\.vmap or in forward mode"):
        torch.vmap(lambda a: first_of_stats(a, a, True))(x)
    with pytest.raises(NotImplementedError, match=r"do not work under torch\.vmap or in forward mode"):
        torch.func.jvp(lambda a: first_of_stats(a, a, True), (x,), (x,))


@with_any_hooks
def test_checkpointing() -> None:
    x, f = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    again = torch.utils.checkpoint.checkpoint(loss, x, f, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in (again, loss_by_torch(x, f))))
