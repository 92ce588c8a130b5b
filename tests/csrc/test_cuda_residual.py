"""The residual operators on the CPU, with emulated CUDA kernels, and on a GPU if there is one."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation.building import compiler
from emulation.operators import emulated_operators
from torch import Tensor

from gradprobe.ops.residual import residual_add

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Target:
    """The operators of one library, and their device."""

    operators: Any
    device: torch.device


@pytest.fixture
def emulated() -> Target:
    if compiler() is None or sys.platform != "linux":
        pytest.skip("the emulation needs g++ on Linux")
    return Target(emulated_operators(), torch.device("cpu"))


@pytest.fixture(params=["plain", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return Target(torch.ops.gradprobe, torch.device("cuda" if request.param == "cuda" else "cpu"))


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x, f = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return x, f


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda x, f: (x, f),
    "channels-last": lambda x, f: (
        x.to(memory_format=torch.channels_last),
        f.to(memory_format=torch.channels_last),
    ),
    "mixed": lambda x, f: (x.to(memory_format=torch.channels_last), f),
    "gaps": lambda x, f: (x[:, ::2], f[:, ::2]),
    "expanded": lambda x, f: (x[:1].expand_as(x), f),
    "empty": lambda x, f: (x[:0], f[:0]),
}


@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_matches_torch(target: Target, dtype: torch.dtype, layout: str, relu: bool) -> None:
    x, f = LAYOUTS[layout](*operands((3, 4, 7, 9), dtype, target.device))
    y, row = target.operators.residual_add_stats(x, f, relu)
    needed = (x + f).relu() if relu else x + f
    torch.testing.assert_close(y, needed, rtol=0, atol=0)
    assert y.stride() == needed.stride()
    assert torch.equal(y, target.operators.residual_add(x, f, relu))
    values = needed.double()
    torch.testing.assert_close(row[0, 1], values.abs().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(row[0, 2], values.square().sum(), rtol=1e-6, atol=0)
    assert row[0, 4].item() == (values == 0).sum().item()
    if layout == "channels-last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("numel", [1, 40_000], ids=["one", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_masks_the_gradient(target: Target, dtype: torch.dtype, numel: int) -> None:
    grad_y, y = operands((numel,), dtype, target.device)
    y = y.relu()
    grad_x, rows = target.operators.residual_add_backward_stats(grad_y, y)
    assert torch.equal(grad_x, grad_y * (y > 0))
    assert torch.equal(grad_x, target.operators.residual_add_backward(grad_y, y))
    for row, values in zip(rows, (grad_y.double(), grad_x.double()), strict=True):
        torch.testing.assert_close(row[2], values.square().sum(), rtol=1e-6, atol=0)
        assert row[3].item() == values.abs().max().item()


def test_nan_is_handled_like_torch(target: Target) -> None:
    nan = torch.nan
    x = torch.tensor([nan, 1.0, -1.0, torch.inf], device=target.device, requires_grad=True)
    f = torch.tensor([1.0, nan, -1.0, -torch.inf], device=target.device)
    y, _ = target.operators.residual_add_stats(x, f, True)
    needed = (x + f).relu()
    assert torch.equal(y.isnan(), needed.isnan())
    weight = torch.arange(1.0, 5.0, device=target.device)
    (grad,) = torch.autograd.grad((y * weight).nansum(), x)
    (needed_grad,) = torch.autograd.grad((needed * weight).nansum(), x)
    torch.testing.assert_close(grad, needed_grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
def test_derivatives_of_first_and_second_order(target: Target, relu: bool) -> None:
    x, f = (t.requires_grad_() for t in operands((2, 3, 4, 4), torch.float64, target.device))

    def function(x: Tensor, f: Tensor) -> Tensor:
        y: Tensor = target.operators.residual_add_stats(x, f, relu)[0]
        return y

    torch.autograd.gradcheck(function, (x, f))
    torch.autograd.gradgradcheck(function, (x, f))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_parts_of_a_gradient(
    request: pytest.FixtureRequest, target: Target, dtype: torch.dtype, layout: str
) -> None:
    branch, shortcut = LAYOUTS[layout](*operands((3, 4, 67, 90), dtype, target.device))
    rows = target.operators.residual_branch_stats(branch, shortcut)
    a, b = branch.double(), shortcut.double()
    torch.testing.assert_close(rows[0, 2], a.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[0, 0], a.sum(), rtol=0, atol=1e-6 * a.abs().sum().item())
    in_float = request.node.callspec.params["target"] == "plain" and dtype != torch.float64  # like csrc/cpu
    error = 1e-7 * (a * b).abs().sum().item() if in_float else 1e-12 * a.numel()
    torch.testing.assert_close(rows[1, 2], (a * b).sum(), rtol=0, atol=error)
    assert rows[1, [0, 1, 4, 5]].tolist() == [0.0] * 4
    torch.library.opcheck(target.operators.residual_branch_stats.default, (branch, shortcut))


@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
def test_opcheck_passes(target: Target, relu: bool) -> None:
    x, f = operands((2, 3, 4, 4), torch.float32, target.device)
    y = f.detach().relu()
    f.requires_grad_()
    torch.library.opcheck(target.operators.residual_add.default, (x, f, relu))
    torch.library.opcheck(target.operators.residual_add_stats.default, (x, f, relu))
    torch.library.opcheck(target.operators.residual_add_backward.default, (x.requires_grad_(), y))
    torch.library.opcheck(target.operators.residual_add_backward_stats.default, (x, y if relu else None))


def test_under_compile() -> None:
    x, f = (t.requires_grad_() for t in operands((2, 3, 4, 4), torch.float32, torch.device("cpu")))
    compiled = torch.compile(lambda x, f: residual_add(x, f, relu=True).sum(), backend="aot_eager", fullgraph=True)
    compiled(x, f).backward()
    assert torch.equal(x.grad, (x + f > 0).float())
    assert torch.equal(x.grad, f.grad)


def test_the_registration_names_bad_arguments(emulated: Target) -> None:
    with pytest.raises(RuntimeError, match="f: needed the shape of x"):
        emulated.operators.residual_add(torch.ones(2), torch.ones(3), False)
    with pytest.raises(RuntimeError, match="f: needed the dtype of x, Float, got Double"):
        emulated.operators.residual_add(torch.ones(2), torch.ones(2).double(), False)
    with pytest.raises(RuntimeError, match="x: needed a dtype of float16"):
        emulated.operators.residual_add(torch.ones(2, dtype=torch.int32), torch.ones(2), False)
    with pytest.raises(RuntimeError, match="shortcut: needed the shape of branch"):
        emulated.operators.residual_branch_stats(torch.ones(2), torch.ones(3))
