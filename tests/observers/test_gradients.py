"""The C++ hooks' own pass over the gradients equals the operator's, and rejects unsupported gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe import ops
from gradprobe.errors import ArgumentError
from gradprobe.observers import gradient_hooks
from gradprobe.observers.parameters import find_parameters
from gradprobe.ops import libraries

pytestmark = pytest.mark.skipif(libraries.native_hooks()[0] is None, reason=f"C++ hooks: {libraries.native_hooks()[1]}")

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "folded onto itself": lambda x: x.flatten()[:25].as_strided((5, 7), (1, 3)),
}


def with_gradients(gradients: list[torch.Tensor | None]) -> tuple[gradient_hooks.GradientHooks, list[torch.Tensor]]:
    parameters = [
        nn.Parameter(torch.zeros(3) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype))
        for gradient in gradients
    ]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return gradient_hooks.install(find_parameters(nn.ParameterList(parameters))), parameters


def rows_for(gradients: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.full((len(gradients), 6), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_bits_as_the_operator(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradients = [LAYOUTS[layout](torch.randn(5, 7, dtype=dtype)), torch.empty(0, 2, dtype=dtype)]
    gradients.append(LAYOUTS[layout](torch.randn(300, 301).to(dtype)) if layout != "folded onto itself" else None)
    gradients = [gradient for gradient in gradients if gradient is not None]
    hooks, _ = with_gradients(gradients)
    rows, expected = rows_for(gradients), rows_for(gradients)
    assert hooks.measure(rows) == (True, 0, 0)
    ops.resolve("native", torch.device("cpu")).grad_stats_into(gradients, expected)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    "gradient",
    [
        None,
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=["missing", "sparse", "complex"],
)
def test_unsupported_gradients_write_no_rows(gradient: torch.Tensor | None) -> None:
    gradients = [torch.ones(2), gradient]
    hooks, _ = with_gradients(gradients)
    rows = rows_for(gradients)
    assert hooks.measure(rows) == (False, 0, 0)
    assert rows.isnan().all()


@pytest.mark.parametrize(
    ("gradient", "total"),
    [
        (torch.complex(torch.zeros(3), torch.ones(3)).conj().imag, -3.0),
        (torch._efficientzerotensor(3, dtype=torch.float32), 0.0),
    ],
    ids=["negated view", "zero tensor"],
)
def test_lazily_negated_and_zero_gradients(gradient: torch.Tensor, total: float) -> None:
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(3))])
    probe = gradprobe.attach(model)
    model[0].grad = gradient
    with pytest.warns(gradprobe.GradprobeWarning, match="no hook fired"):
        probe.step()
    site = probe.latest()["0"]
    assert site.mean * site.numel == total
    assert site.numel == 3


def test_measure_reports_changes_and_counts() -> None:
    hooks, (first, second) = with_gradients([None, None])
    rows = torch.zeros(2, 6, dtype=torch.float64)
    (first.sum() + second.sum()).backward()
    assert hooks.measure(rows) == (True, 0, 2)
    second.grad.mul_(2).mul_(2)
    assert hooks.n_writes() == 2
    assert hooks.measure(None) == (False, 2, 2)
    first.grad = torch.ones(3)
    assert hooks.measure(rows)[1] > 2  # another tensor stands for any number of writes
    assert hooks.measure(rows) == (True, 0, 2)
    assert rows[:, 0].tolist() == [3.0, 12.0]


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(1, 6, dtype=torch.float64),
        torch.zeros(2, 6),
        torch.zeros(6, 2, dtype=torch.float64).t(),
        torch.zeros(12, dtype=torch.float64),
    ],
    ids=["too few", "float32", "strided", "flat"],
)
def test_wrong_rows_are_rejected(rows: torch.Tensor) -> None:
    hooks, _ = with_gradients([torch.ones(2), torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"rows: needed a contiguous float64 tensor of shape \[2, 6\], got"):
        hooks.measure(rows)


class TestCallWithoutDispatcher:
    """The native back end's direct call for plain CPU tensors."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_same_bits_as_the_operator(self, layout: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        tensors = [
            LAYOUTS[layout](torch.randn(5, 7, dtype=dtype)),
            torch.empty(0, dtype=dtype),
            torch.ones((), dtype=dtype),
        ]
        out, expected = (torch.full((3, 6), torch.nan, dtype=torch.float64) for _ in range(2))
        version = out._version
        ops.resolve("native", out.device).grad_stats_into(tensors, out)
        torch.ops.gradprobe.grad_stats_into(tensors, expected)
        assert torch.equal(out, expected)
        assert out._version > version  # autograd sees that a saved `out` was modified

    @pytest.mark.parametrize(
        ("tensors", "out", "message"),
        [
            (
                [torch.ones(2, dtype=torch.int32)],
                torch.zeros(1, 6, dtype=torch.float64),
                r"tensors\[0\]: needed a dtype",
            ),
            ([torch.ones(2)], torch.zeros(2, 6, dtype=torch.float64), "out: needed"),
            ([torch.ones(2)], torch.zeros(1, 6), "out: needed"),
            ([torch.ones(2).to_sparse()], torch.zeros(1, 6, dtype=torch.float64), "strided|SparseCPU"),
        ],
        ids=["integers", "rows", "float32 rows", "sparse"],
    )
    def test_errors_of_the_operator(self, tensors: list[torch.Tensor], out: torch.Tensor, message: str) -> None:
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.resolve("native", out.device).grad_stats_into(tensors, out)

    def test_dispatch_modes_see_the_operator(self) -> None:
        seen = []

        class See(torch.utils._python_dispatch.TorchDispatchMode):
            """Notes the operators that are called."""

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                seen.append(function)
                return function(*args, **(kwargs or {}))

        out = torch.zeros(1, 6, dtype=torch.float64)
        with See():
            ops.resolve("native", out.device).grad_stats_into([torch.ones(2)], out)
        assert torch.ops.gradprobe.grad_stats_into.default in seen
        assert out[0, 0] == 2

    def test_fake_tensors(self) -> None:
        with torch._subclasses.FakeTensorMode():
            out = torch.zeros(1, 6, dtype=torch.float64)
            ops.resolve("native", out.device).grad_stats_into([torch.ones(2)], out)
            assert isinstance(out, torch._subclasses.FakeTensor)

    def test_in_a_compiled_function(self) -> None:
        compiled = torch.compile(lambda x: gradprobe.grad_stats([x, x * 2]), backend="aot_eager")
        assert compiled(torch.tensor([3.0, -4.0]))[:, 2].tolist() == [25.0, 100.0]

    def test_vmap_is_rejected(self) -> None:
        def total(x: torch.Tensor) -> torch.Tensor:
            return gradprobe.grad_stats([x])[0, 0]

        with pytest.raises(ArgumentError, match=r"needed a tensor outside torch\.func\.vmap"):
            torch.func.vmap(total)(torch.ones(3, 2))
