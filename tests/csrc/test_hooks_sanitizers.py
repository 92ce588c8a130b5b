"""The C++ hooks under the address and undefined-behaviour sanitizers.

The thread sanitizer has no place here: torch, which is not built with it, reads the place of a hook without a lock, so
each hook that is put on beside a backward pass would be reported.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation.building import compiler
from sanitized_hooks import ROOT, build, run_pytest

from gradprobe.ops import libraries

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="needs g++ on Linux"),
    pytest.mark.skipif(libraries.native_hooks()[0] is None, reason="needs the C++ hooks"),
]

OBSERVERS = ROOT / "tests" / "observers"
CHANGED = "csrc/hooks/gradient_hooks.cpp"
# Parts of names: the Python twin, what spends its time in torch alone, what times, and what asks for too much memory,
# at which the address sanitizer stops.
LEFT_OUT = (
    "python",
    "compile",
    "convert",
    "script",
    "threads_changes",
    "linear_time",
    "memory",
    "either_language",
    "saved",
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"))


def test_no_report(sanitized: Path) -> None:
    names = ("native_hooks", "followed_parameters", "gradient_hooks", "lifetime", "copies", "signal_faults")
    files = [str(OBSERVERS / f"test_{name}.py") for name in (*names, "device_rows", "signals_edges")]
    others = ("nn/test_batch_norm_module.py", "nn/test_convolution_module.py", "ops/test_batch_norm.py")
    files += [str(ROOT / "tests" / path) for path in others]
    done = run_pytest(sanitized, *files, "-k", " and ".join(f"not {part}" for part in LEFT_OUT))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


TAKEN_OFF = "      if (state_->parameter(index_) != parameter_) return;  // taken off: the parameter may be long gone\n"
IS_REPLACED = "      const bool is_replaced = c10::raw::intrusive_ptr::use_count(parameter_) > 0;\n"
# The bug, its text before and after, and the test that runs into it.
PLANTED = {
    "a freed parameter is read": (
        TAKEN_OFF + IS_REPLACED,
        IS_REPLACED + TAKEN_OFF,
        "test_followed_parameters.py::test_removed_hooks_are_freed_after_their_parameters",
    ),
    "hooks are freed at once": (
        "  retired().add(std::move(taken));\n",
        "  taken.clear();\n",
        "test_native_hooks.py::test_users_hook_runs_although_all_around_it_are_removed_meanwhile",
    ),
}


def plant(name: str, folder: Path, sanitized: Path) -> Path:
    old, new, _ = PLANTED[name]
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / Path(CHANGED).relative_to("csrc")
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{name}: needed once in {path.name}, got {source.count(old)} times: {old!r}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    return build(folder / "build", csrc, only=[CHANGED], others=sanitized)


@pytest.fixture(scope="module")
def planted(sanitized: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = [tmp_path_factory.mktemp("planted") for _ in PLANTED]
    with ThreadPoolExecutor() as pool:
        return dict(zip(PLANTED, pool.map(plant, PLANTED, folders, [sanitized] * len(folders)), strict=True))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_reported(name: str, planted: dict[str, Path]) -> None:
    done = run_pytest(planted[name], str(OBSERVERS / PLANTED[name][2]))
    assert done.returncode == 66, done.stdout + done.stderr
    assert "heap-use-after-free" in done.stderr
    assert "gradient_hooks.cpp" in done.stderr
