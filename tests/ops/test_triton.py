"""The Triton kernels: values in Triton's interpreter (or on a GPU), and machine code for GPUs of several kinds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradprobe import ops
from gradprobe.errors import BackendError
from gradprobe.ops.triton import device as triton_device
from gradprobe.ops.triton import launcher as triton_kernels
from gradprobe.ops.triton import residual_device

HELPERS = Path(__file__).resolve().parents[1] / "helpers"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

Target = tuple[str, int | str, int]
TARGETS: list[Target] = [("cuda", 75, 32), ("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
ALWAYS = {("cuda", 90, 32), ("hip", "gfx942", 64)}  # the others run with the long tests
TABLE = {"addresses": "*i64", "numel": "*i64", "first_chunk": "*i64", "n_tensors": "i32"}


def run_checks(environment: dict[str, str], *options: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *options,
        "triton_checks.py",
    ]
    done = subprocess.run(
        command,
        cwd=HELPERS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            ("-k", "float32 or every_number or scaling_by_one or bad_arguments or beyond or reach or strides"),
            id="float32-and-dispatch",
        ),
        pytest.param((), id="all", marks=pytest.mark.soak),
    ],
)
def test_values_in_the_interpreter(options: tuple[str, ...]) -> None:
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, *options)


@needs_triton
@pytest.mark.gpu
def test_values_on_the_gpu() -> None:
    run_checks({"TRITON_INTERPRET": "0"})


def signature_of(kernel: str, dtype: torch.dtype | None, operation: str) -> tuple[dict[str, str], dict[str, object]]:
    """Returns the types of a kernel's arguments, and its constants."""
    if kernel == "merge_partials":
        indices = dict.fromkeys(("first_partial", "n_partials", "row"), "*i64")
        return {"partials": "*fp64", **indices, "out": "*fp64"}, {"TILE": triton_kernels._MERGE_TILE}
    if kernel == "merge_rows":
        return {"partials": "*fp64", "n_partials": "i32", "out": "*fp64"}, {"TILE": triton_kernels._MERGE_TILE}
    assert dtype is not None
    name, columns, rows = triton_kernels._TILES[dtype]
    constants = {"TYPE": name, "COLUMNS": columns, "ROWS": rows, "TILES": triton_kernels._TILES_IN_CHUNK}
    pointer = f"*{name.replace('f', 'fp') if name != 'bf16' else name}"
    if kernel == "branch_chunks":
        return {"branch": pointer, "shortcut": pointer, "numel": "i64", "partials": "*fp64"}, constants
    if kernel in ("join_chunks", "join_elements"):
        operands = dict.fromkeys(("a", "b", "out"), pointer)
        partials = {"partials": "*fp64"} if kernel == "join_chunks" else {}
        return {**operands, "numel": "i64", **partials}, {**constants, "OPERATION": operation}
    last = {"partials": "*fp64"} if kernel == "sum_chunks" else {"coefficient": "*fp32"}
    return {**TABLE, **last}, {**constants, "ALIGNED": True}


def compile_for(
    target: Target, kernel: str, dtype: torch.dtype | None = None, operation: str = "none"
) -> dict[str, object]:
    """Returns the intermediate and machine code of a kernel, by stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, constants = signature_of(kernel, dtype, operation)
    signature = arguments | dict.fromkeys(constants, "constexpr")
    # The launcher finds that torch's allocations are aligned.
    hints = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(arguments.values()) if kind.startswith("*")}
    module = residual_device if hasattr(residual_device, kernel) else triton_device
    source = ASTSource(getattr(module, kernel), signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": triton_kernels._WARPS}).asm


@needs_triton
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, id=f"{target[0]}-{target[1]}", marks=() if target in ALWAYS else pytest.mark.soak)
        for target in TARGETS
    ],
)
class TestCompilesAheadOfTime:
    @pytest.mark.parametrize(
        ("kernel", "operation", "dtype"),
        [
            pytest.param(kernel, operation, dtype, marks=() if dtype in always else pytest.mark.soak)
            for kernel, operation, always in (
                ("sum_chunks", "none", {torch.float32}),
                ("scale_chunks", "none", {torch.bfloat16}),
                ("join_chunks", "add_relu", {torch.float16}),
                ("join_chunks", "mask", {}),
                ("join_elements", "add_relu", {torch.float32}),
                ("join_elements", "mask", {}),
                ("branch_chunks", "none", {torch.float64}),
            )
            for dtype in (triton_kernels._TILES if kernel == "sum_chunks" else ops.FLOAT_DTYPES)
        ],
    )
    def test_with_16_byte_loads(
        self,
        kernel: str,
        operation: str,
        dtype: torch.dtype,
        target: Target,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        code = compile_for(target, kernel, dtype, operation)
        if target[0] == "cuda":
            wide = re.findall(r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64)", str(code["ptx"]))
            assert code["cubin"]
        else:
            wide = re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", str(code["amdgcn"]))
            assert code["hsaco"]
        assert wide

    @pytest.mark.parametrize("kernel", ["merge_partials", "merge_rows"])
    def test_the_merges(self, kernel: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        assert compile_for(target, kernel)["cubin" if target[0] == "cuda" else "hsaco"]


def test_the_reason_is_given_if_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"'triton' cannot run on cpu: (the Triton kernels run|triton is not)"):
        ops.resolve("triton", torch.device("cpu"))
    if not torch.cuda.is_available() and triton_device.triton is not None:
        assert ops.backends()["triton"] == "torch sees no GPU"


def test_the_reason_is_given_if_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_kernels.unavailable("cuda") == "triton is not installed (GPU builds of torch bring it)"
