"""Fused batch normalisation: as exact as float32 allows, bit-equal to its parts, and the same for any thread count."""

import itertools

import pytest
import torch
from helpers.residual_cases import LAYOUTS, NAMESPACES, bits, name, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gradprobe.errors import ArgumentError
from gradprobe.ops.batch_norm import batch_norm_relu
from gradprobe.ops.residual import residual_add

KINDS = list(itertools.product((False, True), repeat=2))  # with a shortcut, with a ReLU
EACH_KIND = pytest.mark.parametrize(("adds", "relu"), KINDS, ids=["norm", "norm-relu", "norm-add", "norm-add-relu"])
with_any_hooks = pytest.mark.usefixtures("any_hooks")  # the public function takes the C++ path if it can
EACH_NAMESPACE = pytest.mark.parametrize("namespace", NAMESPACES)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def drawn(shape: tuple[int, ...], adds: bool, dtype: torch.dtype = torch.float32, offset: float = 1.0) -> list[Tensor]:
    """Returns x, shortcut, weight, bias and an incoming gradient; the first dimension of a shape is the batch."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(sum(shape))
    x, shortcut, grad = (torch.randn(shape, generator=generator, dtype=wide) for _ in range(3))
    x, shortcut, grad = ((3 * x + offset).to(dtype), shortcut.to(dtype), grad.to(dtype))
    weight = torch.linspace(0.5, 1.5, shape[1], dtype=wide)
    return [x, shortcut if adds else None, weight, weight - 1, grad]


def ours(x, shortcut, weight, bias, mean, var, relu):
    return batch_norm_relu(x, weight, bias, mean, var, shortcut=shortcut, relu=relu)


def by_torch(x, shortcut, weight, bias, mean, var, relu):
    y = F.batch_norm(x, mean, var, weight, bias, True)
    y = y if shortcut is None else shortcut + y
    return torch.relu(y) if relu else y


def results(of, tensors: list[Tensor], relu: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns y, the running statistics after two passes, and all gradients; computes in another dtype if asked."""
    *operands, grad = [t if t is None or dtype is None else t.to(dtype) for t in tensors]
    operands = [None if t is None else t.detach().requires_grad_() for t in operands]
    mean, var = torch.zeros_like(operands[2]).detach(), torch.ones_like(operands[2]).detach()
    of(*operands, mean, var, relu)
    y = of(*operands, mean, var, relu)
    wanted = [t for t in operands if t is not None]
    return [y.detach(), mean, var, *torch.autograd.grad(y, wanted, grad)]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest error, relative to the largest element of its tensor."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs)


@with_any_hooks
@EACH_KIND
@pytest.mark.parametrize("memory", [last, Tensor.contiguous], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("offset", [1.0, 100.0])
def test_float32_is_as_exact_as_its_dtype_allows(memory, offset: float, adds: bool, relu: bool) -> None:
    for shape in ((16, 16, 8, 8), (7, 48, 5, 5), (3, 10, 3, 3), (5, 300, 3, 3), (64, 3, 1, 1)):
        tensors = [t if t is None or t.dim() < 4 else memory(t) for t in drawn(shape, adds, offset=offset)]
        actual, exact = (results(ours, tensors, relu), results(by_torch, tensors, relu, torch.float64))
        torchs = error(results(by_torch, tensors, relu), exact)
        assert error(actual, exact) < (5e-6 if memory is last else 2 * torchs + 5e-6)
        assert actual[0].stride() == tensors[0].stride()


@with_any_hooks
@EACH_KIND
def test_bfloat16_rounds_like_torch(adds: bool, relu: bool) -> None:
    for shape in ((16, 16, 8, 8), (7, 48, 5, 5), (3, 10, 3, 3)):
        tensors = drawn(shape, adds, torch.bfloat16)
        tensors[:2], tensors[4] = [t if t is None else last(t) for t in tensors[:2]], last(tensors[4])
        actual, expected = results(ours, tensors, relu), results(by_torch, tensors, relu)
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        for a, b in zip(actual, expected, strict=True):
            off = (a.double() - b.double()).abs()
            # The statistics differ in their last bit, which rounds a few elements to the other neighbour.
            assert off.max() <= 0.02 * b.double().abs().max()
            assert (off > 1e-5 * b.double().abs().max()).double().mean() < 0.01


@with_any_hooks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", [(16, 16, 8, 8), (3, 10, 3, 3), (7, 300, 5, 5)])
def test_bit_equal_to_its_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """So an observed residual add, which needs the tensor in between, trains to the same weights."""
    x, shortcut, weight, bias, grad = drawn(shape, True, dtype)
    tensors = [last(x), last(shortcut), weight, bias, last(grad)]

    def in_parts(x, shortcut, weight, bias, mean, var, relu):
        return residual_add(shortcut, ours(x, None, weight, bias, mean, var, False), relu)

    for a, b in zip(results(ours, tensors, True), results(in_parts, tensors, True), strict=True):
        assert torch.equal(bits(a), bits(b))

    def relu_apart(x, shortcut, weight, bias, mean, var, relu):
        return torch.relu(ours(x, None, weight, bias, mean, var, False))

    tensors[1] = None
    for a, b in zip(results(ours, tensors, True), results(relu_apart, tensors, True), strict=True):
        assert torch.equal(a, b)


@with_any_hooks
@pytest.mark.parametrize("shape", [(128, 16, 16, 16), (200, 300, 5, 5), (9, 1000, 3, 3)])
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    tensors = [t if t.dim() < 4 else last(t) for t in drawn(shape, True)]
    found = []
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 7):
            torch.set_num_threads(n_threads)
            found.append(results(ours, tensors, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


SIZES = st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None)
@given(
    shape=SIZES,
    kind=st.sampled_from(KINDS),
    of_x=st.sampled_from(sorted(LAYOUTS)),
    of_z=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape_and_layout(shape: tuple[int, ...], kind: tuple[bool, bool], of_x: str, of_z: str) -> None:
    adds, relu = kind
    x, shortcut, weight, bias, grad = drawn(shape, adds)
    x, shortcut = LAYOUTS[of_x](x), LAYOUTS[of_z](shortcut) if adds else None
    saved_y = []
    for namespace in NAMESPACES:
        operator = operators(namespace)
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y, saved = operator.batch_norm_relu(x, shortcut, weight, bias, mean, var, 0.1, 1e-5, relu)
        masks = y if relu else None
        gradients = operator.batch_norm_relu_backward(grad, masks, x, weight, saved, adds and relu)
        assert y.stride() == gradients[0].stride() == torch.empty_like(x).stride()
        saved_y.append((y, saved, mean, var, *gradients))
    # Few values per channel with nearly the same numbers have an ill-conditioned inverse deviation.
    if x.numel() >= 8 * shape[1] and of_x != "expanded":
        for a, b in zip(*saved_y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


@with_any_hooks
def test_an_empty_batch_leaves_the_running_statistics() -> None:
    for memory in (last, Tensor.contiguous):
        x = memory(torch.ones(0, 16, 3, 3)).requires_grad_()
        weight, mean, var = torch.ones(16, requires_grad=True), torch.zeros(16), torch.ones(16)
        y = batch_norm_relu(x, weight, torch.zeros(16), mean, var, shortcut=x.detach())
        y.sum().backward()
        assert y.shape == x.shape
        assert not weight.grad.any()
        assert (mean.unique().tolist(), var.unique().tolist()) == ([0.0], [1.0])


@with_any_hooks
def test_running_statistics_are_torchs() -> None:
    x, _, weight, bias, _ = drawn((8, 16, 4, 4), False)
    for momentum in (0.1, 0.9, 0.0, 1.0):
        pairs = [(torch.full((16,), 2.0), torch.full((16,), 3.0)) for _ in range(2)]
        batch_norm_relu(last(x), weight, bias, *pairs[0], momentum=momentum)
        F.batch_norm(x, *pairs[1], weight, bias, True, momentum)
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    batch_norm_relu(last(x), weight, bias)  # none are kept


@with_any_hooks
def test_what_is_not_finite_spreads_through_its_channel_only() -> None:
    for value in (torch.nan, torch.inf):
        x, shortcut, weight, bias, grad = [t if t.dim() < 4 else last(t) for t in drawn((4, 18, 3, 3), True)]
        x[1, 17, 2, 0] = value
        y, *_, grad_x, _, _, _ = results(ours, [x, shortcut, weight, bias, grad], True)
        assert y[:, 17].isnan().all()
        assert grad_x[:, 17].isnan().all()
        assert y[:, :17].isfinite().all()
        assert grad_x[:, :17].isfinite().all()


@EACH_NAMESPACE
@pytest.mark.parametrize(
    ("adds", "relu", "memory"), [(False, True, last), (True, True, last), (True, False, Tensor.contiguous)]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck(namespace: str, adds: bool, relu: bool, memory) -> None:
    operator = operators(namespace)
    x, shortcut, weight, bias, grad = [t if t is None or t.dim() < 4 else memory(t) for t in drawn((4, 16, 1, 3), adds)]
    leaves = [None if t is None else t.requires_grad_() for t in (x, shortcut, weight, bias)]
    running = (torch.zeros(16), torch.ones(16))
    torch.library.opcheck(operator.batch_norm_relu.default, (*leaves, *running, 0.1, 1e-5, relu))
    with torch.no_grad():
        y, saved = operator.batch_norm_relu(*leaves, *running, 0.1, 1e-5, relu)
    arguments = (grad, y if relu else None, x.detach(), weight.detach(), saved, adds and relu)
    torch.library.opcheck(operator.batch_norm_relu_backward.default, arguments)


@EACH_KIND
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_gradients_of_any_order(adds: bool, relu: bool) -> None:
    x, shortcut, weight, bias, _ = drawn((3, 2, 2, 2), adds, torch.float64)
    leaves = [t.requires_grad_() for t in (x, shortcut, weight, bias) if t is not None]

    def of(x, *others):
        return batch_norm_relu(x, *others[-2:], shortcut=others[0] if adds else None, relu=relu)

    assert torch.autograd.gradcheck(of, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of, leaves)


@with_any_hooks
def test_second_order_gradients_of_the_kernel_are_torchs() -> None:
    tensors = [last(t) if t.dim() == 4 else t for t in drawn((4, 16, 3, 3), True)]
    *operands, grad = tensors
    found = []
    for of in (ours, by_torch):
        leaves = [t.detach().requires_grad_() for t in operands]
        first = torch.autograd.grad(of(*leaves, None, None, True), leaves, grad, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@with_any_hooks
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself uses it for jvp
def test_transforms_and_compiled_graphs_compute_the_same() -> None:
    x, shortcut, weight, bias, _ = [last(t) if t.dim() == 4 else t for t in drawn((4, 16, 3, 3), True)]
    direction = torch.ones_like(x)

    def of(x):
        return batch_norm_relu(x, weight, bias, shortcut=shortcut).square().sum()

    expected = torch.autograd.grad(of(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(of)(x), expected, rtol=1e-4, atol=1e-4)
    along = torch.func.jvp(of, (x,), (direction,))[1]
    torch.testing.assert_close(along, (expected * direction).sum(), rtol=1e-3, atol=1e-3)
    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@EACH_NAMESPACE
def test_messages_name_the_argument(namespace: str) -> None:
    x, weight = torch.ones(2, 3, 4), torch.ones(3)
    of = operators(namespace).batch_norm_relu
    for arguments, message in [
        ((torch.ones(3), None, weight, weight, None, None), "x: needed at least two dimensions, got shape [3]"),
        ((x.int(), None, weight, weight, None, None), "x: needed a dtype of float16, bfloat16, float32, float64"),
        ((x, x[:1], weight, weight, None, None), "shortcut: needed the shape of x, [2, 3, 4], got [1, 3, 4]"),
        ((x, x.double(), weight, weight, None, None), "shortcut: needed the dtype of x"),
        ((x, None, weight[:2], weight, None, None), "weight: needed shape [3], got [2]"),
        ((x, None, weight, weight.double(), None, None), "bias: needed dtype"),
        ((x, None, weight, weight, weight[:1], None), "running_mean: needed shape [3], got [1]"),
        ((x, None, weight, weight, None, weight.half()), "running_var: needed dtype"),
    ]:
        with pytest.raises((ArgumentError, RuntimeError)) as caught:
            of(*arguments, 0.1, 1e-5, True)
        assert message in str(caught.value)


@with_any_hooks
def test_one_value_per_channel_has_no_variance() -> None:
    with pytest.raises(ArgumentError, match=r"x: needed more than one value per channel, got shape \[1, 3\]"):
        batch_norm_relu(torch.ones(1, 3), torch.ones(3), torch.zeros(3))
    with pytest.raises(ArgumentError, match="weight: needed a Tensor, got float"):
        batch_norm_relu(torch.ones(2, 3), 1.0, torch.zeros(3))
