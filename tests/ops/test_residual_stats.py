"""Statistics of residual adds: exact over the full range, bit-equal for any number of threads."""

import math

import pytest
import torch
from helpers.ops_truth import DTYPES, truth
from helpers.residual_cases import LAYOUTS, NAMESPACES, bits, every_kind, name, operators
from torch import Tensor

from gradprobe import ops
from gradprobe.ops import reference


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1.0, 1e30], ids=lambda m: f"{m:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_statistics_over_the_full_range(namespace: str, magnitude: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for n in (0, 1, 15, 4097, 33_001) if namespace == "gradprobe" else (0, 1, 1000):
        x, f, grad = ((torch.randn(n, generator=generator, dtype=torch.float64) * magnitude).to(dtype) for _ in "xfg")
        y, rows = operators(namespace).residual_add_stats(x, f, True)
        assert_rows([y], rows)
        assert torch.equal(bits(y), bits(torch.relu(x + f)))
        grad_x, rows = operators(namespace).residual_add_backward_stats(grad, y)
        assert_rows([grad, grad_x], rows)
        assert torch.equal(bits(grad_x), bits(torch.where(y <= 0, torch.zeros_like(grad), grad)))
        copy, rows = operators(namespace).residual_add_backward_stats(grad, None)
        assert_rows([grad, grad], rows)
        assert torch.equal(bits(copy), bits(grad))
        assert n == 0 or copy.data_ptr() != grad.data_ptr()


def assert_rows(tensors: list[Tensor], rows: Tensor) -> None:
    """Checks raw rows against exact sums: sums and norm to 1e-6, maximum and counts exactly."""
    true, norms = ops.true_rows(rows), ops.norms(rows)
    for k, tensor in enumerate(tensors):
        want = truth(tensor)
        total, sum_abs, _, abs_max, n_zero, n_nonfinite = true[k].tolist()
        assert total == pytest.approx(want.sum, rel=0, abs=1e-6 * want.sum_abs, nan_ok=True)
        assert sum_abs == pytest.approx(want.sum_abs, rel=1e-6, abs=0, nan_ok=True)
        assert norms[k].item() == pytest.approx(want.norm, rel=1e-6, abs=0, nan_ok=True)
        assert abs_max == pytest.approx(want.abs_max, rel=0, abs=0, nan_ok=True)
        assert (n_zero, n_nonfinite) == (want.n_zero, want.n_nonfinite)


def sum_of_products(row: Tensor) -> float:
    """Returns the sum that the second row of `residual_branch_stats` stands for, if float64 can hold it."""
    assert row[:2].tolist() == row[4:].tolist() == [0.0, 0.0]
    return ops.true_rows(row)[2].item()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_branch_statistics_of_every_layout(namespace: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    for shape in ((2, 3, 4, 5), (3, 33, 32, 31)):
        shortcut = LAYOUTS[layout](torch.randn(shape).to(dtype))
        branch = LAYOUTS["channels-last"](torch.randn(shape).to(dtype))
        rows = operators(namespace).residual_branch_stats(branch, shortcut)
        assert_rows([branch], rows[:1])
        assert_sum_of_products(namespace, branch, shortcut, rows[1])


def assert_sum_of_products(
    namespace: str, branch: Tensor, shortcut: Tensor, row: Tensor, in_float: float = 1e-7
) -> None:
    """Checks the sum to `in_float` of the sum of magnitudes if it is added in float32, else to float64 rounding."""
    products = branch.double() * shortcut.double()
    is_double = branch.dtype == torch.float64 or namespace != "gradprobe"
    error = (1e-13 if is_double else in_float) * products.abs().sum().item()
    assert sum_of_products(row) == pytest.approx(products.sum().item(), rel=0, abs=error)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_products_that_always_round_the_same_way(namespace: str, dtype: torch.dtype) -> None:
    branch, shortcut = torch.full((100_003,), 1 / 3, dtype=dtype), torch.full((100_003,), 0.7, dtype=dtype)
    rows = operators(namespace).residual_branch_stats(branch, shortcut)
    assert_rows([branch], rows[:1])
    assert_sum_of_products(namespace, branch, shortcut, rows[1], in_float=1.8e-6)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("scale", [1e35, 1e-42, 1e-36], ids=lambda m: f"{m:g}")
def test_products_beyond_the_range_of_float32(namespace: str, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    branch, shortcut = (torch.randn(20_001, generator=generator) for _ in range(2))
    branch, shortcut = (branch * (1e10 if scale > 1 else 1.0)).to(dtype), shortcut.double()
    shortcut[:9000] *= scale  # groups of this magnitude, of the usual one, and of both
    shortcut = shortcut.to(dtype)
    (row,) = operators(namespace).residual_branch_stats(branch, shortcut)[1:]
    assert_sum_of_products(namespace, branch, shortcut, row)
    for sign in (1, -1):  # all products of one sign: an overflow gives infinity, not NaN
        of_one_sign = branch[:8000].abs(), shortcut[:8000].abs() * sign
        (row,) = operators(namespace).residual_branch_stats(*of_one_sign)[1:]
        products = of_one_sign[0].double() * of_one_sign[1].double()
        assert sum_of_products(row) == pytest.approx(products.sum().item(), rel=1e-12, abs=0)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_products_with_nan_and_infinity(namespace: str) -> None:
    shortcut = torch.ones(5000)
    for odd, want in ((torch.inf, math.inf), (-torch.inf, -math.inf), (torch.nan, math.nan)):
        shortcut[4998] = odd
        rows = operators(namespace).residual_branch_stats(torch.ones(5000), shortcut)
        assert rows[0].tolist() == [5000.0, 5000.0, 5000.0, 1.0, 0.0, 0.0]
        assert sum_of_products(rows[1]) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 31, 33, 2047, 2048, 2049, 65_537])
def test_branch_statistics_at_odd_sizes_and_tiny_magnitudes(namespace: str, n: int) -> None:
    branch, shortcut = (torch.randn(n, generator=torch.Generator().manual_seed(k)) * 1e-30 for k in (1, 2))
    branch[::3] = 0.0
    rows = operators(namespace).residual_branch_stats(branch, shortcut)
    assert_rows([branch], rows[:1])
    dot = (branch.double() * shortcut.double()).sum().item()
    assert sum_of_products(rows[1]) == pytest.approx(dot, rel=1e-9, abs=0)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("exponents", [(-900, -900), (900, 900), (-900, 100), (-900, 900), (-490, -490)], ids=str)
def test_products_beyond_the_range_of_float64(namespace: str, exponents: tuple[int, int]) -> None:
    branch, shortcut = (torch.rand(70_001, dtype=torch.float64) for _ in range(2))
    (unscaled,) = operators(namespace).residual_branch_stats(branch, shortcut)[1:]
    scaled = (torch.ldexp(tensor, torch.tensor(e)) for tensor, e in zip((branch, shortcut), exponents, strict=True))
    (row,) = operators(namespace).residual_branch_stats(*scaled)[1:]
    seen = math.log2(row[2]) + 2 * reference.range_exponent(row[3]).item()
    assert seen == pytest.approx(math.log2(unscaled[2]) + sum(exponents), abs=1e-9)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_statistics_count_nan_and_infinity(namespace: str) -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, -2.0])
    y, rows = operators(namespace).residual_add_stats(x, torch.ones(5), True)
    assert rows[0, 4:].tolist() == [2.0, 2.0]
    assert rows[0, 3].isnan()
    grad_x, rows = operators(namespace).residual_add_backward_stats(torch.full((5,), torch.inf), y)
    assert grad_x.tolist() == [torch.inf, torch.inf, torch.inf, 0.0, 0.0]
    assert rows[:, 4:].tolist() == [[0.0, 5.0], [2.0, 3.0]]


def test_same_bits_for_any_number_of_threads() -> None:
    x, f, grad = (every_kind(torch.float32, 300_001, seed).nan_to_num(0.0, 0.0, 0.0) for seed in (1, 2, 3))
    threads = torch.get_num_threads()
    seen = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            y, row = torch.ops.gradprobe.residual_add_stats(x, f, True)
            grad_x, rows = torch.ops.gradprobe.residual_add_backward_stats(grad, y)
            seen.append([bits(t) for t in (y, row, grad_x, rows)])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.usefixtures("any_hooks")
@pytest.mark.usefixtures("flush_denormal")
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_values_are_flushed_like_torch_while_statistics_count_subnormals(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    subnormal = torch.arange(1, 5001, dtype=torch.int64).remainder(int(1 / info.eps)).to(integer).view(dtype)
    normal = torch.full_like(subnormal, info.tiny * 4)
    for x, f in ((subnormal, subnormal), (normal, -normal + normal / 2), (subnormal, normal)):
        y, rows = torch.ops.gradprobe.residual_add_stats(x, f, True)
        assert torch.equal(bits(y), bits(torch.relu(x + f)))
        assert torch.equal(ops.true_rows(rows)[0, 3:], ops.grad_stats([y])[0, 3:])
        grad_x = torch.ops.gradprobe.residual_add_backward(normal, subnormal)
        assert torch.equal(bits(grad_x), bits(torch.ops.aten.threshold_backward(normal, subnormal, 0)))
    # Every element of the incoming gradient is subnormal, and each is counted.
    _, rows = torch.ops.gradprobe.residual_add_backward_stats(subnormal, normal)
    torch.set_flush_denormal(False)
    assert_rows([subnormal], rows[:1])
