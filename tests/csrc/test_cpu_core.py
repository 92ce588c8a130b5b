"""The CPU kernels of every instruction set, without torch; in the long run under sanitizers."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradprobe.ops.rows import range_exponent

ROOT = Path(__file__).resolve().parents[2]
COMPILER = next(
    (path for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if (path := shutil.which(name))), None
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("-O0",), id="plain"),  # twice as fast to compile and run
        pytest.param(SANITIZERS, id="sanitized", marks=pytest.mark.soak),
    ],
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The check program, compiled with the kernels; skips without a compiler or its sanitizers."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("cpu_core") / "check"
    checks = ROOT / "tests/csrc/cpu_core"
    sources = [*sorted(checks.glob("*.cpp")), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", *request.param, f"-I{ROOT / 'csrc'}", f"-I{checks}"]
    objects = [str(path.with_name(f"{source.parent.name}_{source.stem}.o")) for source in sources]
    compilers = [
        subprocess.Popen([COMPILER, *flags, "-c", str(source), "-o", target], stderr=subprocess.PIPE, text=True)
        for source, target in zip(sources, objects, strict=True)
    ]
    for compiler in compilers:
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
    command = [COMPILER, *request.param, *objects, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "asan" in done.stderr and "cannot find" in done.stderr:
        pytest.skip(f"{COMPILER} has no sanitizers: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # The address sanitizer must be loaded before any preloaded library.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)


def test_kernels_of_every_instruction_set_are_right_and_stay_in_bounds(program: Path) -> None:
    checked = run(str(program))
    assert checked.returncode == 0, (checked.stdout + checked.stderr)[-4000:]
    assert "checked baseline" in checked.stdout
    assert " 0 failures" in checked.stdout


@pytest.mark.soak
@pytest.mark.parametrize("program", [pytest.param(SANITIZERS, id="sanitized")], indirect=True)
def test_the_sanitizer_sees_a_read_beyond_the_end(program: Path) -> None:
    done = run(str(program), "beyond")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_range_exponent_is_the_same_in_python(program: Path) -> None:
    """Zero, subnormal and ordinary magnitudes, both thresholds and their neighbours, infinity and NaN."""
    thresholds = [2.0**-480, 2.0**480]
    neighbours = [math.nextafter(threshold, to) for threshold in thresholds for to in (0.0, math.inf)]
    tiny = [0.0, 5e-324, math.nextafter(sys.float_info.min, 0.0), sys.float_info.min]
    magnitudes = [*tiny, 1e-200, 1.0, 1e200, sys.float_info.max, *thresholds, *neighbours, math.inf, math.nan]
    printed = run(str(program), "range-exponent", *(magnitude.hex() for magnitude in magnitudes))
    exponents = [int(line) for line in printed.stdout.split()]
    assert exponents == range_exponent(np.array(magnitudes)).tolist()
    assert set(exponents) == {-600, 0, 600}
