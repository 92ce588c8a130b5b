"""What every test shares: settings of hypothesis, tests for a device only where there is one, both kinds of hooks."""

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import gradprobe
from gradprobe.ops import libraries

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


@pytest.fixture
def python_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the C++ hooks off."""
    monkeypatch.setattr(libraries, "native_hooks", lambda: (None, "switched off by a test"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Forgets what was compiled, before a test and after it, and counts anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def probe_warnings_are_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test in which the probe warns unexpectedly; a warning that is an error is logged, never raised."""
    if any(issubclass(type(one), torch.amp.GradScaler) for one in gc.get_objects()):
        gc.collect()  # one that is left from an earlier test could be in use
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradprobe.GradprobeWarning)
        yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "gradprobe"] == []
