"""The operators inside torch's modes and on tensors made inside them: as torch's own operators."""

import re
from collections.abc import Callable

import pytest
import torch
from helpers.modes import MODES
from torch import Tensor

import gradprobe
from gradprobe import ops
from gradprobe.errors import ArgumentError
from gradprobe.nn import ResidualAdd
from gradprobe.ops import schemas
from gradprobe.ops.residual import residual_add_

REAL_MODES = [mode for mode in MODES if mode != "fake mode"]


class Plain(torch.Tensor):
    """Results of calls on it are of its class."""


def operands(creation: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(creation == "inference"):
        x = torch.tensor([1.0, -3.0, 2.0, 0.5], device="cpu", dtype=torch.float32)
        f = torch.tensor([1.0, 2.0, -2.0, 0.25], device="cpu", dtype=torch.float32)
        if creation == "leaf":
            x.requires_grad_()
        return (x.as_subclass(Plain), f) if creation == "subclass" else (x, f)


def described(result: Tensor) -> tuple[object, ...]:
    values = result.detach().as_subclass(Tensor)
    return type(result), result.dtype, result.device, result.requires_grad, result.is_inference(), values.tolist()


@pytest.mark.parametrize("mode", REAL_MODES)
@pytest.mark.parametrize("creation", ["eager", "inference", "leaf", "subclass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residual_adds_are_as_those_of_torch(creation: str, mode: str, dtype: torch.dtype) -> None:
    x, f = operands(creation)
    with MODES[mode]():
        wide = x.to(dtype)
        assert described(gradprobe.residual_add(wide, f)) == described(wide + f)
        assert described(gradprobe.residual_add(wide, f, relu=True)) == described(torch.relu(wide + f))
        assert described(ResidualAdd()(wide, f)) == described(wide + f)
        y = torch.zeros(4, device="cpu", dtype=torch.float32)
        residual_add_(y, f)
        assert y.tolist() == f.tolist()


@pytest.mark.parametrize("mode", REAL_MODES)
@pytest.mark.parametrize("creation", ["eager", "inference", "leaf"])
def test_rows(creation: str, mode: str) -> None:
    x, f = operands(creation)
    with MODES[mode]():
        assert ops.grad_stats([]).device.type == "cpu"
        y, rows = schemas.RESIDUAL_ADD_STATS(x, f, True)
        _, both = schemas.RESIDUAL_ADD_BACKWARD_STATS(f, y.detach())
        branch = schemas.RESIDUAL_BRANCH_STATS(x, f)
        merged = ops.merge_rows(ops.grad_stats([x, f]).unsqueeze(0))
        norms = ops.norms(ops.grad_stats([x, f]))
    assert rows.tolist() == [[2.75, 2.75, 4.5625, 2.0, 2.0, 0.0]]
    assert both.tolist() == [[1.25, 5.25, 9.0625, 2.0, 0.0, 0.0], [1.25, 1.25, 1.0625, 1.0, 2.0, 0.0]]
    assert branch.tolist() == [[0.5, 6.5, 14.25, 3.0, 0.0, 0.0], [0.0, 0.0, -8.875, 1.0, 0.0, 0.0]]
    assert merged.tolist() == [[1.75, 11.75, 23.3125, 3.0, 0.0, 0.0]]
    assert norms.tolist() == pytest.approx([14.25**0.5, 9.0625**0.5], rel=1e-12)
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in (rows, both, branch, merged, norms))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("mode", REAL_MODES)
@pytest.mark.parametrize("creation", ["eager", "inference", "leaf", "subclass"])
def test_scaling(creation: str, mode: str, backend: str) -> None:
    if not ops.backends()[backend].startswith("ready"):
        pytest.skip(ops.backends()[backend])
    x, _ = operands(creation)
    kind = type(x)
    with MODES[mode]():
        ops.scale_([x], torch.tensor(0.5, device="cpu", dtype=torch.float64), backend=backend)
    assert type(x) is kind
    assert x.detach().tolist() == [0.5, -1.5, 1.0, 0.25]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ArgumentError) as caught:
        call()
    return str(caught.value)


def test_without_numbers_nothing_is_measured_or_scaled() -> None:
    x = torch.ones(3)
    for call in (lambda: gradprobe.grad_stats([x]), lambda: ops.scale_([x], torch.ones(()))):
        with MODES["fake mode"]():
            assert "got one of FakeTensors" in refused(call)
    assert x.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself uses it for jvp
def test_transforms_that_keep_tensors_whole() -> None:
    rows = []

    def f(x: Tensor) -> Tensor:
        rows.append(gradprobe.grad_stats([x * 2]))
        return x.sum()

    torch.func.grad(f)(torch.tensor([3.0, -4.0]))
    torch.func.jvp(f, (torch.tensor([3.0, -4.0]),), (torch.ones(2),))
    for row in rows:
        numbers = re.findall(r"-?\d+\.", str(row).partition("[[")[2])
        assert numbers == ["-2.", "14.", "100.", "8.", "0.", "0."]


@pytest.mark.parametrize(
    "transform",
    [torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f)), torch.func.functionalize],
    ids=["vmap", "vmap of grad", "functionalize"],
)
def test_transforms_that_hide_data(transform: Callable[..., Callable[[Tensor], object]]) -> None:
    def f(x: Tensor) -> Tensor:
        gradprobe.grad_stats([x])
        return x.sum()

    assert refused(lambda: transform(f)(torch.ones(2, 3))).startswith("tensors[0]: needed a tensor outside torch.func.")


def test_batched_gradients_are_refused() -> None:
    messages = []

    def on_gradient(gradient: Tensor) -> None:
        messages.append(refused(lambda: gradprobe.grad_stats([gradient])))

    x = torch.ones(3, requires_grad=True)
    y = x**2
    y.register_hook(on_gradient)
    torch.autograd.grad(y * 1, x, torch.eye(3), is_grads_batched=True)
    assert messages
    assert messages[0].startswith("tensors[0]: needed a tensor outside torch.func.")
