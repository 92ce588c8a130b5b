"""The trial of a back end: one that fails or computes wrong numbers on a device is found out before it is used."""

import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe
from gradprobe import ops
from gradprobe.errors import BackendError
from gradprobe.ops import dispatch, libraries, reference

CPU = torch.device("cpu")
NO_IMAGE = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be reported"


@pytest.fixture(autouse=True)
def no_trial_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_tried", {})
    monkeypatch.setattr(dispatch, "_warned", set())


class Fake:
    """A back end that fails in one of its functions; counts its calls."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.n_calls = 0
        self.most_tensors = 0
        self.inference = False

    def grad_stats_into(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        self.n_calls += 1
        self.most_tensors = max(self.most_tensors, len(tensors))
        self.inference = self.inference or torch.is_inference_mode_enabled()
        if self.fault == "statistics raise":
            raise RuntimeError(NO_IMAGE)
        if self.fault == "many tensors raise" and len(tensors) > 128:
            raise RuntimeError("invalid argument")
        reference.grad_stats_into(tensors, out)
        if self.fault == "one row is wrong":
            out[1, 2] += 1
        if self.fault == "a row is missing":
            out[-1] = torch.nan

    def scale_(self, tensors: Sequence[Tensor], coefficient: Tensor) -> None:
        if self.fault == "scaling raises":
            raise NotImplementedError("Could not run 'gradprobe::scale_' with arguments from the 'CUDA' backend")
        if self.fault != "scaling does nothing":
            reference.scale_(tensors, coefficient)


def put(monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> Fake:
    """Puts a fake in the place of a back end that says it is ready."""
    fake = Fake(fault)
    backend = dispatch.Backend(name, fake.grad_stats_into, fake.scale_)
    monkeypatch.setitem(dispatch._CHOICES, name, (backend, lambda device_type: "ready"))
    return fake


FAULTS = {
    "statistics raise": "CUDA error: no kernel image is available for execution on the device$",
    "many tensors raise": "invalid argument",
    "one row is wrong": "it computes wrong numbers: needed a sum_sq of 6, got 7",
    "a row is missing": "it computes wrong numbers: needed a sum of 0, got nan",
    "scaling raises": "Could not run 'gradprobe::scale_'",
    "scaling does nothing": "it computes wrong numbers: needed a sum of -7, got -14",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_named_backend_that_fails_is_refused_with_the_cause(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    fake = put(monkeypatch, "native", fault)
    for _ in range(2):
        with pytest.raises(BackendError, match=f"backend 'native' cannot run on cpu: {FAULTS[fault]}"):
            ops.resolve("native", CPU)
        n_calls = fake.n_calls
    assert fake.n_calls == n_calls <= 2


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_takes_the_next_one_and_says_why_once(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    put(monkeypatch, "native", fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            rows = ops.grad_stats([torch.tensor([3.0, -4.0])])
            assert rows.tolist() == [[-1.0, 7.0, 25.0, 4.0, 0.0, 0.0]]
    (message,) = (str(warning.message) for warning in caught)
    assert "backend 'native' cannot run on cpu: " in message
    assert message.endswith("; using the back end 'reference'")


def test_attach_takes_the_next_one_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "native", "statistics raise")
    model = torch.nn.Linear(3, 1)
    with pytest.warns(gradprobe.GradprobeWarning, match="no kernel image"):
        probe = gradprobe.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 3)).sum().backward()
        probe.step()
    assert probe.latest(wait=True)["weight"].norm == pytest.approx(12**0.5)
    probe.detach()


def test_two_faulty_backends_make_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "native", "statistics raise")
    put(monkeypatch, "triton", "one row is wrong")
    with pytest.warns(gradprobe.GradprobeWarning) as caught:
        assert ops.resolve("auto", CPU).name == "reference"
    (message,) = (str(warning.message) for warning in caught)
    assert "'native' cannot run on cpu: CUDA error" in message
    assert "'triton' cannot run on cpu: it computes wrong numbers" in message


def test_no_backend_at_all_says_why_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("native", "triton", "reference"):
        put(monkeypatch, name, "statistics raise")
    with pytest.raises(BackendError, match=r"'native' cannot .*'triton' cannot .*'reference' cannot run on cpu: CUDA"):
        ops.resolve("auto", CPU)


def test_a_sound_backend_is_tried_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = put(monkeypatch, "native", "none")
    for _ in range(5):
        assert ops.resolve("auto", CPU).name == "native"
    assert fake.n_calls == 2  # before scaling and after it
    assert fake.most_tensors > 128  # the table of the kernels for few tensors


class Nosy(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("saw a call of the trial")


class NosyDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError("saw a call of the trial")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(
    "context",
    [
        nullcontext(),
        torch.inference_mode(),
        torch.device("meta"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        Nosy(),
        NosyDispatch(),
        torch._subclasses.FakeTensorMode(),
    ],
    ids=["none", "inference", "default-device", "autocast", "function-mode", "dispatch-mode", "fake"],
)
@pytest.mark.usefixtures("probe_warnings_are_errors")
def test_the_contexts_of_the_caller_do_not_reach_the_trial(
    monkeypatch: pytest.MonkeyPatch, context: AbstractContextManager[object], dtype: torch.dtype
) -> None:
    fake = put(monkeypatch, "native", "none")
    torch.set_default_dtype(dtype)
    try:
        with context:
            assert ops.resolve("auto", CPU).name == "native"
    finally:
        torch.set_default_dtype(torch.float32)
    assert fake.n_calls == 2
    assert not fake.inference


def test_the_trial_does_not_run_in_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = put(monkeypatch, "native", "none")

    def f(x: Tensor) -> Tensor:
        assert ops.resolve("auto", CPU).name == "native"
        return x.sum()

    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(3, 2))
    assert fake.n_calls == 2


def test_a_device_that_is_not_there_is_not_judged() -> None:
    # Its kernels may be asked for ahead of time: nothing can be tried, and nothing is written down.
    assert ops.resolve("auto", torch.device("xpu")).name == "reference"
    assert not dispatch._tried


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.usefixtures("probe_warnings_are_errors")
def test_a_trial_that_cannot_be_held_is_held_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = put(monkeypatch, "native", "none")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert ops.resolve("auto", CPU).name == "native"
    with monkeypatch.context() as patch:
        patch.setattr(reference, "grad_stats_into", no_memory)
        assert ops.resolve("auto", CPU).name == "native"
    fake.fault = "one row is wrong"
    with pytest.raises(BackendError, match="it computes wrong numbers"):
        ops.resolve("native", CPU)


# Two GPUs, played: the trials of its back ends end as told.
PLAYED = """
import json, sys, warnings, torch
from gradprobe import ops
from gradprobe.ops import dispatch, libraries, schemas
verdicts = dict(part.split("=") for part in sys.argv[1].split(","))
torch.cuda.is_available = lambda: True
dispatch._try = lambda backend, device: verdicts.get(f"{backend.name}@{device.index}", verdicts.get(backend.name))
register, registered = schemas.register_for_cuda, []
schemas.register_for_cuda = lambda backend: (registered.append(backend), register(backend))
chosen = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in sys.argv[2].split(","):
        name, _, index = name.partition("@")
        chosen.append(ops.resolve(name, torch.device("cuda", int(index or 0))).name)
dumps = [torch._C._dispatch_dump(f"gradprobe::{name}") for name in ("residual_add_stats", "magnitudes_into")]
active = [next(line for line in dump.splitlines() if line.startswith("CUDA:")) for dump in dumps]
print(json.dumps([chosen, len(caught), registered[-1:], ["schemas.py" in line for line in active], ops.backends()]))
"""


@pytest.mark.parametrize(
    ("verdicts", "asked", "chosen", "n_warnings", "registered"),
    [
        ("native=ready", "auto,native", ["native", "native"], 0, []),
        ("native=no image,triton=ready", "auto,auto", ["triton", "triton"], 1, ["triton"]),
        # Residual adds never name a back end.
        ("native=no image,triton=ready,reference=ready", "reference", ["reference"], 0, ["triton"]),
        ("native=no image,triton=ready,reference=ready", "reference,auto", ["reference", "triton"], 1, ["triton"]),
        ("native=no image,triton=no image,reference=ready", "auto,auto", ["reference"] * 2, 1, ["reference"]),
        # All GPUs share one dispatcher.
        (
            "native@1=no image,native=ready,triton=ready",
            "auto,auto@1,auto",
            ["native", "triton", "triton"],
            1,
            ["triton"],
        ),
    ],
    ids=[
        "sound",
        "native-fails",
        "native-fails-unasked",
        "native-fails-unasked-then-auto",
        "both-fail",
        "one-gpu-fails",
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_dispatcher_never_keeps_kernels_that_cannot_run_on_the_gpu(
    verdicts: str, asked: str, chosen: list[str], n_warnings: int, registered: list[str]
) -> None:
    if libraries.parts()["cuda"] != "ready":
        pytest.skip(libraries.parts()["cuda"])
    done = subprocess.run([sys.executable, "-c", PLAYED, verdicts, asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *found, states = json.loads(done.stdout)
    assert found == [chosen, n_warnings, registered, [bool(registered)] * 2]
    on = "cuda:1" if "@1" in verdicts else "cuda:0"
    assert states["native"] == (f"ready for cpu; cuda: cannot run on {on}: no image" if registered else "ready")
    assert states["triton"] == ("cannot run on cuda:0: no image" if "triton=no image" in verdicts else "ready")
