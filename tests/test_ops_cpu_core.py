"""The CPU kernels of every instruction set, outside torch and under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(
    (path for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if (path := shutil.which(name))), None
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(folder: Path, source: Path, *flags: str) -> Path:
    """Compiles a program of the tests with the kernels; skips where sanitizers cannot be linked."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = folder / source.stem
    sources = [str(source), *map(str, sorted((ROOT / "csrc/cpu").glob("*.cpp")))]
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-g1",
        "-Wall",
        "-Wextra",
        "-Werror",
        *flags,
        f"-I{ROOT / 'csrc'}",
        *sources,
    ]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "asan" in done.stderr and "cannot find" in done.stderr:
        pytest.skip(f"{COMPILER} has no sanitizers: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # Some test environments preload libraries that the address sanitizer has to come before.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run([str(program)], capture_output=True, text=True, check=False, env=environment, timeout=240)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return run(build(tmp_path_factory.mktemp("cpu_core"), ROOT / "tests/cpu_core/check.cpp", *SANITIZERS))


def test_kernels_of_every_instruction_set_are_right_and_read_no_byte_too_many(
    checked: subprocess.CompletedProcess[str],
) -> None:
    assert checked.returncode == 0, (checked.stdout + checked.stderr)[-4000:]
    assert "checked baseline" in checked.stdout
    assert "0 failures" in checked.stdout


def test_the_check_sees_a_read_beyond_the_end(tmp_path: Path, checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0
    source = tmp_path / "beyond.cpp"
    source.write_text(
        "#include <memory>\n"
        '#include "cpu/kernels.h"\n'
        "using namespace gradprobe::cpu;\n"
        "int main() {\n"
        "  std::unique_ptr<float[]> data(new float[100]{});\n"
        "  return chunk_stats({data.get(), Dtype::kFloat32, 101, nullptr}, 0, 101, best_isa()).n_zero == 101 ? 0 : 1;\n"
        "}\n"
    )
    done = run(build(tmp_path, source, *SANITIZERS))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
