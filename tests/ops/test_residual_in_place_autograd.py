"""Residual adds in place under autograd, function transforms and compilers: the same rules as in torch."""

import shutil
from collections.abc import Callable

import pytest
import torch
from helpers.residual_cases import (
    NAMESPACES,
    RELU,
    TRANSFORMS,
    Join,
    assert_like_torch_in_place,
    in_place_by_torch,
    operators,
)
from torch import Tensor

from gradprobe.errors import ArgumentError
from gradprobe.ops.residual import residual_add_


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


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.randn(3)


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
    for join in (residual_add_, in_place_by_torch):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            join(inference_tensor(), torch.ones(3), True)


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


@pytest.mark.parametrize("how", ["retained", "hooked"])
def test_retained_gradients_and_hooks_see_what_torch_shows(how: str) -> None:
    def of(join: Join) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaf, seen = torch.randn(4, requires_grad=True), []
        x = leaf * 1
        if how == "retained":
            x.retain_grad()
        else:
            x.register_hook(lambda grad: seen.append(grad.clone()))
        (join(x, torch.randn(4), True) * 3).sum().backward()
        return leaf.grad, *([x.grad] if how == "retained" else seen)

    assert len(of(residual_add_)) == 2
    assert_like_torch_in_place(of)


@RELU
def test_derivatives_of_first_and_second_order(relu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in "xf")

    def join(x: Tensor, f: Tensor) -> Tensor:
        return residual_add_(x * 1, f, relu)

    assert torch.autograd.gradcheck(join, (x, f), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(join, (x, f))


SAMPLES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "nothing-recorded": lambda: (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)),
    "of-the-addend": lambda: (torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)),
    "of-the-target": lambda: (torch.randn(2, 3, requires_grad=True) * 1, torch.randn(2, 3)),
    "mixed-layouts": lambda: (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)),
}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(namespace: str, sample: str) -> None:
    for relu in (False, True):
        torch.library.opcheck(operators(namespace).residual_add_.default, (*SAMPLES[sample](), relu))


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
    with pytest.raises(ArgumentError, match=r"x: needed a tensor batched by the same torch\.vmap as f"):
        torch.vmap(lambda x, f: residual_add_(x, f), in_dims=(None, 0))(x, f)


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
