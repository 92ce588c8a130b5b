"""One table of tensors: dtype x layout x class x creation, measured in every mode.

For each cell `grad_stats` returns the right numbers or raises a clear error of gradprobe. Nothing else.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from helpers.modes import MODES, default_dtype
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import gradprobe
from gradprobe import ops
from gradprobe.errors import ArgumentError
from gradprobe.observers.observable import is_measurable
from gradprobe.ops.statistics import raw_rows

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGER = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)
QUANTIZED = (torch.quint8, torch.qint8, torch.qint32)
MEASURED = REAL + FLOAT8 + COMPLEX
SMALL = tuple(
    value for name, value in vars(torch).items() if name.startswith(("float8", "float4")) and value not in FLOAT8
)
DTYPES = MEASURED + SMALL + INTEGER + QUANTIZED

NUMBERS = [[1.5, -2.0, 0.0, 4.0, -0.5, 3.0], [0.0, 2.5, -1.0, 0.25, 8.0, -6.0]]


def dense(dtype: torch.dtype) -> Tensor:
    """Returns a matrix [2, 6] of numbers that most dtypes hold exactly."""
    numbers = torch.tensor(NUMBERS, dtype=torch.float64, device="cpu")
    if dtype.is_complex:
        return torch.complex(numbers, numbers.flip(1)).to(dtype)
    if dtype in QUANTIZED:
        return torch.quantize_per_tensor(numbers.float(), 0.25, 0, dtype)
    if dtype == torch.float4_e2m1fn_x2:
        return torch.zeros(2, 6, dtype=torch.uint8, device="cpu").view(dtype)
    return numbers.to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "with gaps": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, 3:4].expand(2, 5),
    "overlapping": lambda x: x.as_strided((3, 2), (1, 1)),
    "no dimension": lambda x: x[0, 3],
    "empty": lambda x: x[:0],
    "channels last": lambda x: x.view(1, 2, 3, 2).to(memory_format=torch.channels_last),
    "negated view": torch._neg_view,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
    "conjugate view": lambda x: x.conj() if x.is_complex() else x,
    "imaginary part": lambda x: x.conj().imag if x.is_complex() else x,
    "coo": lambda x: x.to_sparse_coo(),
    "coo with duplicates": lambda x: torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 2, 0, 1, 1]], device="cpu"), x[0], (5,), check_invariants=True
    ),
    "hybrid coo": lambda x: torch.sparse_coo_tensor(
        torch.tensor([[1, 1]], device="cpu"), x, (3, 6), check_invariants=True
    ),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((1, 2)),
    "bsc": lambda x: x.to_sparse_bsc((1, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :4]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1, :4]], layout=torch.jagged),
    "semi-structured": lambda x: torch.sparse.to_sparse_semi_structured(x.new_zeros(32, 64)),
    "meta": lambda x: x.to("meta"),
}


# torch cannot sum duplicates of these
SUMMED_AS = {torch.complex32: torch.complex64, torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}

REFUSED_LAYOUTS = ("mkldnn", "nested", "jagged", "semi-structured", "meta")


def truth(x: Tensor) -> list[float]:
    """Returns the six statistics of a plain tensor, computed by torch in float64."""
    if x.layout == torch.sparse_coo:
        x = x.to(SUMMED_AS.get(x.dtype, x.dtype)).coalesce().values()
    elif x.layout != torch.strided:
        x = x.values()
    x = x.resolve_conj().resolve_neg()
    y = x.to(torch.complex128).abs() if x.is_complex() else x.double()
    largest = y.abs().max().item() if y.numel() else 0.0
    return [y.sum().item(), y.abs().sum().item(), y.square().sum().item(), largest, (y == 0).sum().item(), 0.0]


class Silent(torch.Tensor):
    """Calls on it skip its class."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Plain(torch.Tensor):
    """Results of calls on it are of its class."""


class Loud(torch.Tensor):
    """Changes what calls on it return."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.mul(2) if isinstance(result, Tensor) and result.is_floating_point() else result


class Wrapper(torch.Tensor):
    """Holds another tensor and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        unwrap = partial(tree_map_only, Wrapper, lambda wrapper: wrapper.inner)
        result = func(*unwrap(args), **unwrap(kwargs or {}))
        wrapped = tree_map_only(Tensor, Wrapper, result)
        return return_and_correct_aliasing(func, args, kwargs or {}, wrapped)


class Refusing(Wrapper):
    """Knows no operator."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"no {func}")


def of_a_graph(x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x.detach().requires_grad_().alias()


def fake(x: Tensor) -> Tensor:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(x)


CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: x,
    "parameter": lambda x: nn.Parameter(x, requires_grad=x.is_floating_point() or x.is_complex()),
    "buffer": nn.Buffer,
    "requires grad": lambda x: x.detach().requires_grad_(),
    "of a graph": of_a_graph,
    "silent subclass": lambda x: x.as_subclass(Silent),
    "plain subclass": lambda x: x.as_subclass(Plain),
    "loud subclass": lambda x: x.as_subclass(Loud),
    "wrapper": Wrapper,
    "refusing wrapper": Refusing,
    "fake": fake,
}


REFUSED_CLASSES = ("wrapper", "refusing wrapper", "fake")


CREATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "eager": nullcontext,
    "in inference mode": torch.inference_mode,
    "under another default dtype": lambda: default_dtype(torch.float64),
}


@dataclass(frozen=True)
class Cell:
    """One tensor of the table.

    Attributes:
        name: Its dtype, layout, class and creation.
        kind: Its class.
        tensor: The tensor.
        statistics: What is to be measured, None if the tensor must be refused.
    """

    name: str
    kind: str
    tensor: Tensor
    statistics: list[float] | None


@pytest.fixture(scope="module")
def table() -> list[Cell]:
    """Every tensor that torch can make."""
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of layouts
        for dtype, layout, creation in product(DTYPES, LAYOUTS, CREATIONS):
            with CREATIONS[creation](), torch.no_grad():
                try:
                    plain = LAYOUTS[layout](dense(dtype))
                    statistics = truth(plain) if dtype in MEASURED and layout not in REFUSED_LAYOUTS else None
                except (RuntimeError, TypeError, AttributeError):
                    continue  # torch has no such tensor
                for kind, convert in CLASSES.items():
                    try:
                        tensor = convert(plain)
                    except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError):
                        continue
                    is_known = statistics is not None and kind not in REFUSED_CLASSES
                    name = f"{dtype}, {layout}, {kind}, {creation}"
                    made.append(Cell(name, kind, tensor, statistics if is_known else None))
    return made


def outcome(cell: Cell, rows: Callable[[], Tensor]) -> str:
    """Returns "right", "refused", or what is wrong."""
    try:
        got = rows()
    except ArgumentError as error:
        return "refused" if re.match(r"tensors(\[0\])?: needed .* got ", str(error)) else f"unclear: {error}"
    except Exception as error:  # noqa: BLE001
        return f"raised {type(error).__name__}: {error}"
    if type(got) is not Tensor or got.device.type != "cpu" or got.dtype != torch.float64:
        return f"returned {type(got).__name__} of {got.dtype} on {got.device}"
    if cell.statistics is None:
        return f"was measured: {got.tolist()}"
    return "right" if got[0].tolist() == pytest.approx(cell.statistics, rel=1e-6) else f"is wrong: {got.tolist()}"


def check(cells: list[Cell], mode: str, measure: Callable[[Tensor], Tensor]) -> None:
    wrong = []
    for cell in cells:
        with MODES[mode]():
            found = outcome(cell, partial(measure, cell.tensor))
        if found != ("refused" if cell.statistics is None or mode == "fake mode" else "right"):
            wrong.append(f"{cell.name}: {found}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cells)} cells", *wrong[:20]])


@pytest.mark.parametrize("mode", MODES)
def test_every_cell_is_right_or_refused(table: list[Cell], mode: str) -> None:
    assert sum(cell.statistics is not None for cell in table) > 2000
    check(table, mode, lambda tensor: gradprobe.grad_stats([tensor]))


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_computes_in_every_mode(table: list[Cell], mode: str) -> None:
    # It gets the tensors without their class: one class is enough.
    plain = [cell for cell in table if cell.kind == "tensor" and cell.statistics is not None]
    check(plain, mode, lambda tensor: gradprobe.grad_stats([tensor], backend="reference"))


@pytest.mark.parametrize("mode", MODES)
def test_hooks_get_the_values_in_every_mode(table: list[Cell], mode: str) -> None:
    kinds = ("tensor", "of a graph", "plain subclass")
    plain = [cell for cell in table if cell.kind in kinds and cell.statistics is not None]

    def measure(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return ops.true_rows(raw_rows([ops.dense_values(tensor)]))

    check(plain, mode, measure)


def test_observers_measure_what_the_operators_accept(table: list[Cell]) -> None:
    # A hook runs no code of the user's class, so the observers leave subclasses out.
    wrong = [
        cell.name
        for cell in table
        if is_measurable(cell.tensor) != (cell.statistics is not None and not cell.kind.endswith("subclass"))
    ]
    assert not wrong
