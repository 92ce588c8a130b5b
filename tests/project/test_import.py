"""Importing gradprobe: how much it loads, its version, and that it works where there is no POSIX (simulated)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradprobe

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_little_to_that_of_torch() -> None:
    script = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import gradprobe
print(time.process_time() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    seconds, *loaded = run(script).split()
    assert loaded == ["gradprobe"]
    assert float(seconds) < 0.05  # CPU time; usually 0.005


def test_attaching_loads_nothing_that_draws_or_prints() -> None:
    script = "import sys, torch, gradprobe; gradprobe.attach(torch.nn.Linear(2, 1)); print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run(script).split()}
    assert (
        loaded & {"altair", "pandas", "pyarrow", "rich", "scipy", "sklearn", "sqlite3", "typer", "vl_convert"} == set()
    )


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [gradprobe.__version__]
    assert run("from gradprobe.cli.commands import main; main()", "--version") == f"gradprobe {gradprobe.__version__}\n"


WINDOWS = r"""
import importlib, multiprocessing, os, pathlib, pkgutil, sys, types
import numpy, rich.console, rich.live, scipy.stats, torch.utils.data, typer
for name in ("altair", "pandas", "PIL", "pyarrow.parquet", "sklearn.datasets"):  # loaded as on Linux, if they are there
    try:
        importlib.import_module(name)
    except ImportError:
        pass

locked = []
sys.platform = "win32"
for name in ("fcntl", "termios", "pwd", "grp", "resource"):
    sys.modules[name] = None  # an import raises
for name in ("fork", "register_at_fork", "killpg", "getuid", "sysconf"):
    delattr(os, name)
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.locking = 2, lambda *arguments: locked.append(arguments)
sys.modules["msvcrt"] = msvcrt

import gradprobe
skipped = ("gradprobe.integrations", "gradprobe._", "gradprobe.cli.__main__")
for module in pkgutil.walk_packages(gradprobe.__path__, "gradprobe."):
    if not module.name.startswith(skipped):
        __import__(module.name)

folder = pathlib.Path(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True, log_dir=folder / "run") as probe:
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        probe.step(loss)
assert len(gradprobe.log.read_run(folder / "run").snapshots()) == 12

from gradprobe.experiments.sweep.store import start_run
with start_run(folder / "run.sqlite", {"data": "digits", "epochs": 1}, {"torch_version": torch.__version__}):
    pass
print(len(probe.history()), probe.findings().healthy, len(locked) > 0)
"""


@pytest.mark.soak
def test_every_module_works_without_posix(tmp_path: Path) -> None:
    assert run(WINDOWS, tmp_path).split() == ["12", "True", "True"]


def test_nothing_native_is_built_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    import toolchain  # type: ignore[import-not-found]

    monkeypatch.setattr(sys, "platform", "win32")
    assert toolchain.find_cxx() == (None, "not built on Windows")
