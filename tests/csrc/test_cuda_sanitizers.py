"""The emulated CUDA kernels under sanitizers: memory errors, undefined behaviour, races within a block."""

import sys
from pathlib import Path

import pytest
from emulation.building import build, compiler, keep_objects, run_sweep, session_build
from emulation.mutants import Mutant, plant

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="the emulation needs g++ on Linux"),
]

SHORT = ("--short", "--exact-ends")


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_no_report_in_all_checks(mode: str) -> None:
    done = run_sweep(session_build(mode), mode, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr


READS_PAST_THE_END = Mutant(
    "tail_reads_past_the_end",
    "cuda/grad_stats.cu",
    "thread < split.tail",
    "thread < split.tail + 1",
    "grad_stats/boundaries/f16",
)
MISSING_BARRIER = Mutant(
    "missing_barrier", "cuda/device.cuh", "  __syncthreads();\n  Stats all", "  Stats all", "grad_stats/misaligned/f32"
)


@pytest.mark.parametrize(
    ("mode", "mutant", "report"),
    [
        pytest.param("address", READS_PAST_THE_END, "heap-buffer-overflow", id="address"),
        pytest.param("thread", MISSING_BARRIER, "data race", id="thread"),
    ],
)
def test_a_planted_bug_is_reported(mode: str, mutant: Mutant, report: str, tmp_path: Path) -> None:
    csrc = plant(mutant, tmp_path)
    keep_objects(session_build(mode).parent, tmp_path, mode, rebuilt=[mutant.kernel])
    done = run_sweep(build(tmp_path, mode, csrc), mode, *SHORT, "--only", mutant.caught_by)
    assert done.returncode == 66, done.stdout + done.stderr
    assert report in done.stderr
