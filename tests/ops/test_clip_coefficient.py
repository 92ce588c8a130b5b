"""The total norm of many tensors and the factor that clips it: every back end, every range, few launches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe
from gradprobe.errors import ArgumentError
from gradprobe.ops import reference
from gradprobe.ops.schemas import CLIP_COEFFICIENT

LAUNCH_NOTHING = {"aten.view", "aten.detach", "aten.select", "aten.unbind", "aten.empty", "aten.unsqueeze"}

KERNELS = pytest.mark.parametrize(
    "kernel", [CLIP_COEFFICIENT, reference.clip_coefficient], ids=["dispatched", "reference"]
)
Kernel = Callable[[torch.Tensor, float], torch.Tensor]


def rows_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.empty(len(tensors), 6, dtype=torch.float64)
    reference.grad_stats_into(tensors, rows)
    return rows


@KERNELS
@settings(deadline=None, max_examples=100)
@given(
    tensors=st.lists(st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), max_size=4), max_size=6),
    max_norm=st.floats(1e-300, 1e300),
)
def test_any_finite_numbers(kernel: Kernel, tensors: list[list[float]], max_norm: float) -> None:
    total, factor = kernel(rows_of([torch.tensor(values, dtype=torch.float64) for values in tensors]), max_norm)
    needed = math.hypot(*(value for values in tensors for value in values))  # without overflow in between
    if needed == math.inf or needed > 1.7e308:
        return
    assert total.item() == pytest.approx(needed, rel=1e-14, abs=1e-322)
    assert factor.item() == pytest.approx(min(1.0, max_norm / (needed + 1e-6)), rel=1e-13, abs=1e-322)


@KERNELS
@pytest.mark.parametrize(
    ("values", "needed"),
    [([1.0, math.nan], (math.nan, math.nan)), ([math.inf, -math.inf], (math.inf, 0.0)), ([], (0.0, 1.0))],
    ids=["nan", "infinite", "empty"],
)
def test_numbers_that_are_not_finite_and_none(kernel: Kernel, values: list[float], needed: tuple[float, float]) -> None:
    found = kernel(rows_of([torch.tensor(values), torch.tensor([3.0]) * len(values)]), 0.5)
    np.testing.assert_array_equal(found.numpy(), needed)
    np.testing.assert_array_equal(kernel(torch.empty(0, 6, dtype=torch.float64), 0.5).numpy(), (0.0, 1.0))


@KERNELS
def test_subnormal_numbers_count_while_they_are_flushed(kernel: Kernel) -> None:
    rows = rows_of([torch.tensor([3e-310, 4e-310], dtype=torch.float64), torch.tensor([1e-150], dtype=torch.float64)])
    torch.set_flush_denormal(True)
    try:
        total = kernel(rows, 1.0)[0]
    finally:
        torch.set_flush_denormal(False)
    assert total.item() == pytest.approx(1e-150, rel=1e-14)


@KERNELS
@pytest.mark.parametrize(
    ("rows", "needed"),
    [
        (torch.ones(2, 6), "float64"),
        (torch.ones(2, 6, 1, dtype=torch.float64), r"shape \[2, 6\]"),
        (torch.ones((), dtype=torch.float64), r"shape \[0, 6\]"),
        (torch.ones(6, 2, dtype=torch.float64).t(), "contiguous"),
    ],
    ids=["dtype", "dimensions", "number", "strides"],
)
def test_bad_rows_are_named(kernel: Kernel, rows: torch.Tensor, needed: str) -> None:
    with pytest.raises((ArgumentError, RuntimeError), match=f"rows: needed .*{needed}"):
        kernel(rows, 1.0)


def test_opcheck() -> None:
    torch.library.opcheck(CLIP_COEFFICIENT, (rows_of([torch.randn(3), torch.randn(5)]), 0.5))


class Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name not in LAUNCH_NOTHING:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def test_the_probes_clipping_adds_one_launch_to_scaling() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(80)))
    with gradprobe.attach(model) as probe:
        model(torch.randn(2, 4)).square().sum().backward()
        needed = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        with Launches() as launches:
            total = probe.clip_grad_norm_(0.5 * needed)
    assert launches.counts == {"gradprobe.clip_coefficient": 1, "gradprobe.scale_": 1, "aten._to_copy": 1}
    assert total.item() == pytest.approx(needed, rel=1e-6)
    assert total.dtype == torch.float32
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert clipped == pytest.approx(0.5 * needed, rel=1e-5)
