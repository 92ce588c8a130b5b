"""A process that ends without closing its run folder, or is killed: what was reported as stored is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradprobe.log import read_run


def steps_in(folder: Path) -> list[int]:
    return [one.step for one in read_run(folder).snapshots()]


SCRIPT = """
import sys, torch, gradprobe
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = gradprobe.attach(model, optimizer=optimizer, log_dir=sys.argv[1], start_step=int(sys.argv[2]))
for step in range(int(sys.argv[2]), int(sys.argv[3])):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    probe.step(loss)
    if step % 20 == 0:
        print(probe.stored_step, flush=True)
"""


def test_a_script_that_ends_without_detach_stores_its_last_steps(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "run"), "0", "100"], check=True, timeout=500)
    assert steps_in(tmp_path / "run") == list(range(100))


KILLER = """
import itertools, os, signal, sys, time
import gradprobe
from gradprobe.probe import stream

SCRIPT, folder = sys.argv[1:]
stream._STORE_EVERY_S, stream._IDLE = 0.02, 0  # the more often it writes, the more kills hit a write
start = 0
for kill in range(10):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        sys.argv = ["train", folder, str(start), "1000000000"]
        exec(SCRIPT)
    os.close(writing)
    reported = set()
    with open(reading) as reports:
        for line in reports:
            reported.add(int(line) if line.strip() != "None" else -1)
            if len(reported) > 4:
                break
        time.sleep(0.013 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported |= {int(line) for line in reports if line.endswith("\\n") and line.strip() != "None"}
    print(max(reported), flush=True)
    start = max(reported) + 1
"""


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_step_that_was_reported_as_stored_is_lost_by_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, SCRIPT, str(tmp_path / "run")]
    killed = subprocess.run(command, check=True, timeout=500, stdout=subprocess.PIPE, text=True)
    reported = [int(line) for line in killed.stdout.split()]
    run = read_run(tmp_path / "run")
    assert len(run.about["sessions"]) == 10
    for session, (first, last) in enumerate(zip([-1, *reported], reported, strict=False)):
        steps = [one.step for one in run.snapshots(session=session)]
        assert steps == list(range(first + 1, first + 1 + len(steps)))
        assert steps[-1] >= last > first
    assert steps_in(tmp_path / "run") == list(range(steps[-1] + 1))
