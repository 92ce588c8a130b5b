"""The choice of a back end, and the operators' registrations with torch."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.ops_truth import TARGETS, Target
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe
from gradprobe import ops
from gradprobe.errors import ArgumentError, BackendError
from gradprobe.ops import libraries, reference, schemas
from gradprobe.ops.rows import N_MAGNITUDES

CPU = torch.device("cpu")


def test_every_backend_says_ready_or_why_not() -> None:
    states = ops.backends()
    assert list(states) == ["native", "triton", "reference"]
    assert all(isinstance(state, str) and state for state in states.values())
    assert states["reference"] == "ready"


@pytest.mark.parametrize("target", TARGETS)
def test_a_named_backend_is_never_replaced(target: Target) -> None:
    assert ops.resolve(target.backend, torch.device(target.device)).name == target.backend


def test_auto_chooses_native_if_it_is_ready() -> None:
    ready = libraries.parts()["cpu"] == "ready"
    assert ops.resolve("auto", CPU).name == ("native" if ready else "reference")


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ArgumentError, match="backend: needed one of auto, native, triton, reference, got 'cudnn'"):
        ops.resolve("cudnn", CPU)
    with pytest.raises(ArgumentError, match="got 'cudnn'"):
        ops.grad_stats([torch.ones(2)], backend="cudnn")


def test_a_backend_that_is_not_ready_says_why() -> None:
    with pytest.raises(BackendError, match=r"'triton' cannot run on cpu: .+"):
        ops.resolve("triton", CPU)
    with pytest.raises(BackendError, match="'native' cannot run on xpu: has no kernels for xpu"):
        ops.resolve("native", torch.device("xpu"))


def test_auto_chooses_the_reference_on_a_device_without_kernels() -> None:
    assert ops.resolve("auto", torch.device("xpu")).name == "reference"


SCRIPT = """
import json, torch
from gradprobe import ops
from gradprobe.errors import BackendError
from gradprobe.ops.schemas import SCHEMAS
try:
    ops.resolve("native", torch.device("cpu"))
except BackendError as error:
    refused = str(error)
rows = ops.grad_stats([torch.tensor([3.0, -4.0])]).tolist()
has_cuda_kernel = [
    torch._C._dispatch_has_kernel_for_dispatch_key("gradprobe::" + schema.partition("(")[0], "CUDA")
    # torch's operators do for the others on a GPU
    for schema in SCHEMAS if not schema.startswith(("count_if", "batch_norm_relu", "magnitudes"))
]
auto = ops.resolve("auto", torch.device("cpu")).name
print(json.dumps([ops.backends()["native"], refused, auto, rows, has_cuda_kernel]))
"""


@pytest.mark.parametrize(
    ("info", "library", "reason"),
    [
        (None, None, "no build of gradprobe._C has run"),
        (
            {"native": "no C++ compiler was found", "cuda": "no C++ compiler was found"},
            None,
            "no C++ compiler was found",
        ),
        ({"native": "built", "cuda": "built"}, None, "gradprobe._C is missing"),
        ({"native": "built", "cuda": "built"}, b"not a library", "does not load with torch"),
    ],
    ids=["no-build", "no-compiler", "lost", "broken"],
)
def test_without_the_compiled_library_the_package_works_and_says_what_is_missing(
    tmp_path: Path, info: dict[str, str] | None, library: bytes | None, reason: str
) -> None:
    shutil.copytree(
        Path(gradprobe.__file__).parent,
        tmp_path / "gradprobe",
        ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"),
    )
    if info is not None:
        (tmp_path / "gradprobe/_build_info.json").write_text(json.dumps(info))
    if library is not None:
        (tmp_path / "gradprobe/_C.so").write_bytes(library)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state, refused, auto, rows, has_cuda_kernel = json.loads(done.stdout)
    assert reason in state
    assert reason in refused
    assert auto == "reference"
    assert rows == [[-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]]
    assert set(has_cuda_kernel) == {importlib.util.find_spec("triton") is not None}


def test_triton_kernels_never_replace_compiled_ones_that_can_run() -> None:
    if libraries.parts()["cuda"] != "ready":
        pytest.skip(libraries.parts()["cuda"])
    assert not any(key.endswith("/CUDA") for key in schemas._library._op_impls)


OLD_DRIVER = """
import torch
from gradprobe.ops import libraries
torch.cuda.is_available = lambda: True
libraries.cuda_refusal = lambda device=None: "update the driver"
import gradprobe.ops.schemas
dump = torch._C._dispatch_dump("gradprobe::residual_add_stats")
active = next(line for line in dump.splitlines() if line.startswith("CUDA:"))
assert "schemas.py" in active, active
assert libraries.parts()["cuda"] == "update the driver"
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_replace_compiled_ones_that_cannot_run() -> None:
    if libraries.parts()["cuda"] != "ready":
        pytest.skip(libraries.parts()["cuda"])
    done = subprocess.run([sys.executable, "-c", OLD_DRIVER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Overriding" not in done.stderr


@pytest.fixture(scope="module")
def twin() -> torch.library.Library:
    """Defines the operators in another namespace, where they always run the reference."""
    library = torch.library.Library("gradprobe_twin", "DEF")
    schemas.define_operators(library)
    return library


@pytest.mark.parametrize("namespace", ["gradprobe", "gradprobe_twin"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(twin: torch.library.Library, namespace: str, requires_grad: bool) -> None:
    namespace_ops = getattr(torch.ops, namespace)
    tensors = [torch.randn(3, 4), torch.randn(7).half(), torch.randn(5, 6).t(), torch.randn(0)]
    wanting = [t.clone().requires_grad_(requires_grad) for t in tensors]
    out = torch.empty(4, 6, dtype=torch.float64)
    torch.library.opcheck(namespace_ops.grad_stats_into.default, (wanting, out))
    counts = torch.empty(3, N_MAGNITUDES, dtype=torch.float64)
    torch.library.opcheck(namespace_ops.magnitudes_into.default, (wanting[:3], counts))
    torch.library.opcheck(namespace_ops.scale_.default, (tensors, torch.tensor(0.5)))


def test_the_operators_go_through_torch_compile() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        out = torch.empty(1, 6, dtype=torch.float64)
        torch.ops.gradprobe.grad_stats_into([y], out)
        torch.ops.gradprobe.scale_([y], torch.tensor(0.5))
        return torch.cat((out.flatten(), y.double()))

    x = torch.tensor([1.5, -2.0])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))
    assert step(x).tolist() == [-1.0, 7.0, 25.0, 4.0, 0.0, 0.0, 1.5, -2.0]


def test_fakes_refuse_a_wrong_shape() -> None:
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"out: needed shape \[1, 6\], got \[2, 6\]"),
    ):
        torch.ops.gradprobe.grad_stats_into([torch.empty(3)], torch.empty(2, 6, dtype=torch.float64))


class _CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n_calls += 1
        return func(*args, **(kwargs or {}))


def test_the_reference_measures_small_tensors_together() -> None:
    # Each torch call costs microseconds. Measured one by one, each tensor would need about 90 calls.
    tensors = [torch.ones(16 + k % 241) for k in range(1000)]
    out = torch.empty(1000, 6, dtype=torch.float64)
    with _CountCalls() as calls:
        reference.grad_stats_into(tensors, out)
    assert calls.n_calls < 10 * len(tensors)
    assert out[:, 0].tolist() == [t.numel() for t in tensors]
