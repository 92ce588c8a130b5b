"""The networks' 3x3 convolution: torch's numbers, its gradients and its graph, on any number of threads."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gradprobe import networks
from gradprobe.nn.convolution import Conv2d, convolve_3x3
from gradprobe.ops import libraries

pytestmark = pytest.mark.skipif(libraries.native_hooks()[0] is None, reason="needs the C++ hooks")

NODE = "ConvolutionBackward"
SIZES = ((8, 8), (1, 1), (2, 2), (3, 5), (1, 4), (7, 2), (9, 16))  # at most 256 pixels
CHANNELS = ((16, 16), (32, 64), (48, 16), (16, 112), (128, 32))


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def drawn(n: int, in_channels: int, out_channels: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Returns x, weight and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, in_channels, *size), (out_channels, in_channels, 3, 3), (n, out_channels, *size))
    x, weight, grad = (last(torch.randn(shape, generator=generator)) for shape in shapes)
    return x, weight / (9 * in_channels) ** 0.5, grad


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    y = convolve_3x3(x, weight)
    assert y is not None
    return y


def results(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns the result and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = of(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Returns the root mean square error of each tensor over its root mean square."""
    pairs = zip(found, exact, strict=True)
    return [
        float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)) for a, b in pairs
    ]


def check_against_float64(n: int, channels: tuple[int, int], size: tuple[int, int], seed: int = 0) -> None:
    tensors = drawn(n, *channels, size, seed)
    exact = results(by_torch, *(tensor.double() for tensor in tensors))
    found = results(ours, *tensors)
    torchs = errors(results(by_torch, *tensors), exact)
    for error, of_torch in zip(errors(found, exact), torchs, strict=True):
        assert error < max(1e-6, 1.5 * of_torch)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_as_exact_as_float32_allows(channels: tuple[int, int]) -> None:
    for n, size in itertools.product((1, 5), SIZES):
        check_against_float64(n, channels, size)


@pytest.mark.soak
@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 70),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.integers(0, 1000),
)
def test_any_shape(n: int, channels: tuple[int, int], size: tuple[int, int], seed: int) -> None:
    check_against_float64(n, (16 * channels[0], 16 * channels[1]), size, seed)


def test_many_images_are_as_exact() -> None:
    """The gradient of a filter is a sum over all pixels of all images."""
    check_against_float64(700, (16, 32), (8, 8))


@pytest.mark.parametrize("channels", [(16, 16), (64, 32)], ids=str)
def test_same_bits_on_any_number_of_threads(threads: None, channels: tuple[int, int]) -> None:
    tensors = drawn(300, *channels, (7, 8))
    found = []
    for n_threads in (1, 2, 3, 8):
        torch.set_num_threads(n_threads)
        found.append(results(ours, *tensors))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_pixel_reaches_only_its_neighbours() -> None:
    """So a NaN, or rounding, shows where it would with torch."""
    x, weight, _ = drawn(2, 16, 16, (9, 9))
    for value in (1.0, float("nan"), float("inf")):
        for row, column in ((0, 0), (4, 4), (3, 8), (5, 2)):
            x.zero_()
            x[1, 3, row, column] = value
            reached = ours(x, weight).ne(0).any(dim=1)
            expected = by_torch(x, weight).ne(0).any(dim=1)
            assert torch.equal(reached, expected)


@pytest.mark.parametrize("needs", [True, False], ids=["trained", "frozen"])
def test_bias(needs: bool) -> None:
    x, weight, grad = drawn(3, 16, 32, (5, 6))
    bias = torch.linspace(-1, 1, 32).requires_grad_(needs)
    y = convolve_3x3(x, weight, bias)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-5, atol=1e-5)
    if not needs:
        assert not y.requires_grad
        return
    y.backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum(dim=(0, 2, 3)), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(convolve_3x3(x, weight, bias), y)
    assert convolve_3x3(x, weight, bias[:16]) is None


def test_the_networks_take_the_kernel() -> None:
    model = networks.resnet(20).to(memory_format=torch.channels_last)
    x = last(torch.randn(4, 3, 16, 16))
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(
                lambda conv, _, y: found.append((conv.stride, conv.in_channels, y.grad_fn.name()))
            )
    found: list[tuple[tuple[int, int], int, str]] = []
    model(x)
    assert len(found) == 19
    for stride, in_channels, name in found:
        assert (name == NODE) == (stride == (1, 1) and in_channels >= 16)


REFUSED = {
    "stride": lambda: (Conv2d(16, 16, 3, 2, 1, bias=False), torch.float32),
    "padding": lambda: (Conv2d(16, 16, 3, 1, 0, bias=False), torch.float32),
    "padding by name": lambda: (Conv2d(16, 16, 3, 1, "same", bias=False), torch.float32),
    "circular": lambda: (Conv2d(16, 16, 3, 1, 1, bias=False, padding_mode="circular"), torch.float32),
    "dilation": lambda: (Conv2d(16, 16, 3, 1, 1, dilation=2, bias=False), torch.float32),
    "groups": lambda: (Conv2d(16, 16, 3, 1, 1, groups=2, bias=False), torch.float32),
    "many channels": lambda: (Conv2d(16, 144, 3, 1, 1, bias=False), torch.float32),
    "channels": lambda: (Conv2d(16, 24, 3, 1, 1, bias=False), torch.float32),
    "float64": lambda: (Conv2d(16, 16, 3, 1, 1, bias=False), torch.float64),
    "bfloat16": lambda: (Conv2d(16, 16, 3, 1, 1, bias=False), torch.bfloat16),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_does_not_take_runs_in_torch(make: Callable[[], tuple[nn.Module, torch.dtype]]) -> None:
    torch.manual_seed(0)
    conv, dtype = make()
    conv = conv.to(dtype, memory_format=torch.channels_last)
    x = last(torch.randn(2, 16, 6, 6, dtype=dtype))
    y = conv(x)
    assert y.grad_fn.name() != NODE
    assert torch.equal(y, nn.Conv2d.forward(conv, x))


def test_other_memory_orders_run_in_torch() -> None:
    conv = Conv2d(16, 16, 3, padding=1, bias=False)
    x = torch.randn(2, 16, 6, 6)
    for one in (x, last(x), last(x)[:0]):
        assert conv(one).grad_fn.name() != NODE
    conv = conv.to(memory_format=torch.channels_last)
    for one in (x, last(x)[:, :, ::2], x.double().float()):
        assert conv(one).grad_fn.name() != NODE
    assert conv(last(x)).grad_fn.name() == NODE
    assert conv(x[0]).shape == (16, 6, 6)


def test_autocast_computes_in_bfloat16() -> None:
    conv = Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(last(torch.randn(2, 16, 6, 6))).dtype == torch.bfloat16


def test_gradients_only_of_what_needs_them() -> None:
    x, weight, grad = drawn(3, 16, 32, (5, 6))
    whole = results(ours, x, weight, grad)
    x.requires_grad_()
    y = ours(x, weight)
    y.backward(grad)
    assert torch.equal(x.grad, whole[1])
    assert weight.grad is None
    y = ours(x.detach(), weight.requires_grad_())
    y.backward(grad)
    assert torch.equal(weight.grad, whole[2])
    assert ours(x.detach(), weight.detach()).grad_fn is None
    with torch.no_grad():
        assert not ours(x, weight).requires_grad


def test_gradients_in_another_memory_order() -> None:
    x, weight, grad = drawn(3, 16, 32, (5, 6))
    expected = results(ours, x, weight, grad)
    for other in (grad.contiguous(), grad[:, :1].expand_as(grad)):
        found = results(ours, x, weight, other)
        torch.testing.assert_close(found, results(by_torch, x, weight, other), rtol=1e-4, atol=1e-4)
    assert torch.equal(results(ours, x, weight, grad.contiguous())[1], expected[1])


def test_second_derivatives_are_torchs() -> None:
    x, weight, grad = drawn(2, 16, 16, (4, 4))
    found = []
    for of in (ours, by_torch):
        a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
        gradients = torch.autograd.grad(of(a, b), (a, b), grad, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(penalty, (a, b)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_saved_tensors_are_guarded_and_freed() -> None:
    x, weight, grad = drawn(2, 16, 16, (4, 4))
    y = ours(x, weight.requires_grad_())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)
    y = ours(x, weight)
    y.backward(grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(grad)


@pytest.mark.parametrize("unpack", [Tensor.contiguous, Tensor.clone, Tensor.double], ids=["order", "copy", "dtype"])
def test_hooks_on_saved_tensors_may_return_others(unpack: Callable[[Tensor], Tensor]) -> None:
    x, weight, grad = drawn(2, 16, 32, (4, 4))
    expected = results(by_torch, x, weight, grad)
    x.requires_grad_(), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        y = ours(x, weight)
    if unpack is Tensor.double:
        with pytest.raises(RuntimeError):  # as torch's own convolution
            y.backward(grad)
        return
    y.backward(grad)
    torch.testing.assert_close([x.grad, weight.grad], expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    x, weight, grad = drawn(2, 16, 16, (4, 4))
    expected = results(ours, x, weight, grad)
    x.requires_grad_(), weight.requires_grad_()
    checkpoint(ours, x, weight, use_reentrant=reentrant).backward(grad)
    assert torch.equal(x.grad, expected[1])
    assert torch.equal(weight.grad, expected[2])


def test_transforms_and_modes_see_torchs_convolution() -> None:
    conv = Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x, weight, _ = drawn(2, 16, 16, (4, 4))
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert counter.get_total_flops() == 2 * 2 * 16 * 16 * 9 * 16
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    torch.testing.assert_close(tangent, conv(x), rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(lambda image: conv(image[None])[0])(x)
    torch.testing.assert_close(each, conv(x), rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda w: torch.func.functional_call(conv, {"weight": w}, (x,)).sum())(weight)
    expected = results(by_torch, x, weight, torch.ones(2, 16, 4, 4))[2]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert "aten::_convolution" in str(torch.jit.trace(conv, x).inlined_graph)
    meta = copy.deepcopy(conv).to("meta")
    assert meta(x.to("meta")).shape == (2, 16, 4, 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_graphs_hold_torchs_operators() -> None:
    conv = Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = last(torch.randn(2, 16, 4, 4))
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_autograd_gives_the_same_gradients() -> None:
    x, weight, grad = drawn(2, 16, 16, (4, 4))
    expected = results(ours, x, weight, grad)
    weight.requires_grad_()
    y = ours(x.requires_grad_(), weight)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(grad)
    torch.testing.assert_close([x.grad, weight.grad], expected[1:], rtol=1e-4, atol=1e-4)


def test_copies_keys_and_names_are_torchs() -> None:
    conv, of_torch = Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
    conv.load_state_dict(of_torch.state_dict())
    assert repr(conv) == repr(of_torch)
    conv = conv.to(memory_format=torch.channels_last)
    x = last(torch.randn(2, 16, 4, 4))
    for clone in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(clone(x), conv(x))


def test_subnormals_count_unless_the_caller_flushes_them(request: pytest.FixtureRequest) -> None:
    x, weight, _ = drawn(1, 16, 16, (4, 4))
    x.mul_(2.0**-135)
    assert ours(x, weight).any()
    request.getfixturevalue("flush_denormal")
    assert not ours(x, weight).any()
