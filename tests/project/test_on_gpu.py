"""The script that builds, tests and measures on a machine with a GPU, run where its programs are replaced by others."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["build", "doctor", "tests", "native", "steps", "triton", "sweep", "memcheck", "counters"]

# Takes the place of timeout(1): says what each part prints and how it ends, and runs nothing.
ENDS = """#!/bin/sh
case "$*" in
  *"-m pytest"*) echo "1 failed, 11 passed in 3.21s"; exit 1 ;;
  *gpu_steps*) exit 124 ;;
  *"--backend triton"*) exit 0 ;;
  *kernels.py*) cat {records} ;;
  *sweep*) echo "trained 2 networks" ;;
esac
"""
TENSORS = "float32, 1 of 64 MiB"
SPEEDS = {"copy": 1000.0, "grad_stats_into": 900.0, "scale_": 700.0}


def run(folder: Path, gpus: str, seconds: int = 480) -> subprocess.CompletedProcess[str]:
    """Runs the script with an nvidia-smi that lists these GPUs."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    records = folder / "records.jsonl"
    results = [
        {"tensors": TENSORS, "contender": name, "n_bytes": 64 * 2**20, "time_us": 1.0, "gb_per_s": speed}
        for name, speed in SPEEDS.items()
    ]
    records.write_text("\n".join(map(json.dumps, results)) + "\n")
    for name, text in (
        ("nvidia-smi", f"#!/bin/sh\nprintf '%s' '{gpus}'\n"),
        ("timeout", ENDS.format(records=records)),
        ("compute-sanitizer", "#!/bin/sh\n"),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = dict(os.environ, PATH=f"{programs}:/usr/bin:/bin", PYTHON=sys.executable, GPU_SECONDS=str(seconds))
    command = ["bash", str(ROOT / "benchmarks/on_gpu.sh"), str(folder / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def states(folder: Path) -> dict[str, str]:
    lines = (folder / "out/parts.jsonl").read_text().splitlines()
    return {part["part"]: part["state"] for part in map(json.loads, lines)}


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, gpus="")
    (line,) = done.stdout.splitlines()
    assert line.startswith("no GPU on this machine")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "out").exists()


def test_every_part_says_how_it_ended(tmp_path: Path) -> None:
    done = run(tmp_path, gpus="GPU 0: played")
    found = states(tmp_path)
    assert list(found) == PARTS
    assert found["build"] == found["native"] == "done"
    assert found["tests"] == "failed with exit status 1, see tests.log"
    assert found["steps"] == "ran out of its 60 seconds"
    assert found["counters"] == "not run: ncu is not on PATH"
    assert done.returncode == 1
    for part, state in found.items():
        assert any(line.startswith(part) and line.endswith(state) for line in done.stdout.splitlines())


def test_the_table_sets_measured_beside_expected(tmp_path: Path) -> None:
    run(tmp_path, gpus="GPU 0: played")
    rows = {row["what"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]}
    found = {
        what.partition(",")[0]: (row["measured"], row["verdict"])
        for what, row in rows.items()
        if what.startswith(("native: statistics,", "native: scaling", "triton: scaling", "ResNet", "tests", "loads"))
    }
    assert found == {
        "tests that need a GPU": ("1 failed, 11 passed in 3.21s", "missed"),
        "native: statistics": ("90.0%", "as expected"),
        "native: scaling": ("70.0%", "missed"),
        "triton: scaling": ("not in its log", "not measured"),
        "ResNet-50: what parameters' statistics add to a training step": ("ran out of its 60 seconds", "not measured"),
        "loads from local memory": ("not run: ncu is not on PATH", "not measured"),
    }
    table = (tmp_path / "out/table.md").read_text()
    assert all(f"| {row['what']} | {row['expected']} | {row['measured']} |" in table for row in rows.values())


def test_parts_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    run(tmp_path, gpus="GPU 0: played", seconds=0)
    found = states(tmp_path)
    assert list(found) == PARTS
    assert set(found.values()) == {"not run: the 0 seconds are over", "not run: ncu is not on PATH"}
