"""What every test shares: settings of hypothesis, tests for a device only where there is one, both kinds of hooks."""

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.rows import make_device_rows
from hypothesis import settings

import gradprobe
from gradprobe.cli import commands
from gradprobe.observers import event_rows, signal_buffer
from gradprobe.ops import libraries
from gradprobe.probe import step_gradients

# A shared runner stalls now and then: time limits belong to benchmarks.
settings.register_profile("gradprobe", deadline=None, print_blob=True)
settings.load_profile("gradprobe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(params=["native", "python"])
def any_hooks(request: pytest.FixtureRequest) -> str:
    """Runs a test with the C++ hooks and with their Python twin."""
    if request.param == "native" and libraries.native_hooks()[0] is None:
        pytest.skip(f"C++ hooks: {libraries.native_hooks()[1]}")
    if request.param == "python":
        request.getfixturevalue("python_hooks")
    return str(request.param)


@pytest.fixture(params=["native", "device", "python"])
def any_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the C++ hooks, with those that observe outputs on a GPU, here on the CPU, and in Python."""
    if request.param != "python" and libraries.native_hooks()[0] is None:
        pytest.skip(f"C++ hooks: {libraries.native_hooks()[1]}")
    if request.param == "python":
        request.getfixturevalue("python_hooks")
    if request.param == "device":
        for module in (event_rows, signal_buffer):
            monkeypatch.setattr(module, "make_rows", make_device_rows)
    return str(request.param)


@pytest.fixture
def python_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the C++ hooks off."""
    monkeypatch.setattr(libraries, "native_hooks", lambda: (None, "switched off by a test"))


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    """Lets the processor turn subnormal numbers into zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(name="gradprobe")
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process as the installed script does; returns its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprobe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forgets what was compiled, before a test and after it, and counts anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def scalers() -> Iterator[weakref.WeakSet[torch.amp.GradScaler]]:
    """All gradient scalers. A probe searches the objects of the process for them, which takes 0.1 s in a test run."""
    made: weakref.WeakSet[torch.amp.GradScaler] = weakref.WeakSet()

    def new(cls: type[torch.amp.GradScaler], *_: object, **__: object) -> torch.amp.GradScaler:
        scaler = object.__new__(cls)
        made.add(scaler)
        return scaler

    def any_in_use() -> bool:
        return any(scaler.is_enabled() and scaler._scale is not None for scaler in made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "__new__", staticmethod(new))
        patch.setattr(step_gradients, "any_in_use", any_in_use)
        yield made


@pytest.fixture
def probe_warnings_are_errors(
    caplog: pytest.LogCaptureFixture, scalers: weakref.WeakSet[torch.amp.GradScaler]
) -> Iterator[None]:
    """Fails a test in which the probe warns unexpectedly; a warning that is an error is logged, never raised."""
    if len(scalers) > 0:
        gc.collect()  # one that is left from an earlier test could be in use
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradprobe.GradprobeWarning)
        yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "gradprobe"] == []
