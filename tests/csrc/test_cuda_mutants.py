"""Plants bugs in the CUDA kernels: the emulation's checks must catch each one."""

import sys
from pathlib import Path

import pytest
from emulation.building import build, compiler, keep_objects, run_sweep, session_build
from emulation.mutants import MUTANTS, Mutant, plant

pytestmark = pytest.mark.skipif(
    compiler() is None or sys.platform != "linux", reason="the emulation needs g++ on Linux"
)

# Some of different kinds always run; the others run with the long tests.
ALWAYS = {"missing_barrier", "tail_off_by_one", "nan_lost_in_max", "scale_rounds_coefficient", "mask_of_wrong_operand"}


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=() if m.name in ALWAYS else pytest.mark.soak) for m in MUTANTS],
)
def test_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    csrc = plant(mutant, tmp_path)
    keep_objects(session_build().parent, tmp_path, "plain", rebuilt=[mutant.kernel])
    done = run_sweep(build(tmp_path, csrc=csrc), "plain", "--only", mutant.caught_by)
    # Negative: killed by a signal, because the bug accessed unmapped memory.
    assert done.returncode < 0 or (done.returncode == 1 and f"FAILED {mutant.caught_by}" in done.stdout), (
        done.stdout + done.stderr
    )


def test_names_of_always_exist() -> None:
    assert {mutant.name for mutant in MUTANTS} >= ALWAYS


def test_a_mutant_that_no_longer_matches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needed once in core/stats\.h, got 0 times"):
        plant(Mutant("stale", "core/stats.h", "no such text", "", "grad_stats"), tmp_path)


def test_a_mutant_of_no_kernel_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such sources: .*flag\.cu"):
        keep_objects(session_build().parent, tmp_path, "plain", rebuilt=["flag.cu"])
