"""One process at a time writes the file of a sweep."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.store_cases import CELLS, CONFIG, names_beside, write

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import open_run, start_run


def test_a_second_writer_is_rejected_until_the_first_closes(path):
    with start_run(path, CONFIG, {}), pytest.raises(StoreError, match="another sweep is writing this file"):
        start_run(path, CONFIG, {})
    start_run(path, CONFIG, {}).close()
    assert names_beside(path) == [path.name, f"{path.name}.lock"]


def take_and_release(path, start, taken, double):
    """Takes the lock again and again, 30 times together with others; a marker file shows two holders at once."""
    marker = path.with_name("held")
    start.wait()
    end = time.monotonic() + 60.0
    while taken.value < 30 and time.monotonic() < end:
        try:
            run = start_run(path, CONFIG, {})
        except StoreError:
            continue
        with taken:
            taken.value += 1
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            with double:
                double.value += 1
        else:
            time.sleep(0.0005)
            marker.unlink()
        run.close()


def test_the_lock_has_one_holder_at_a_time_under_contention(path):
    write(path)
    context = multiprocessing.get_context("spawn")
    start, taken, double = context.Barrier(3), context.Value("i", 0), context.Value("i", 0)
    processes = [context.Process(target=take_and_release, args=(path, start, taken, double)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert taken.value >= 30
    assert double.value == 0


def test_a_link_to_the_file_does_not_open_a_second_writer(path):
    write(path)
    (path.parent / "link.sqlite").symlink_to(path.name)
    with start_run(path, CONFIG, {}), pytest.raises(StoreError, match="another sweep is writing this file"):
        start_run(path.parent / "link.sqlite", CONFIG, {})


def test_the_lock_is_released_when_its_holder_is_killed(path):
    script = (
        "import sys, time; from gradprobe.experiments.sweep.store import start_run;"
        f"run = start_run({str(path)!r}, {CONFIG!r}, {{}}); run.add_cells({CELLS!r});"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="another sweep"):
            start_run(path, CONFIG, {})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run(path) as run:
        assert len(run.cells()) == 2
    start_run(path, CONFIG, {}).close()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder that nobody can write to")
def test_an_unwritable_folder_is_rejected():
    with pytest.raises(StoreError, match=r"/proc/run\.sqlite: cannot write in its folder"):
        start_run("/proc/run.sqlite", CONFIG, {})


def test_a_read_only_file_is_rejected_for_writing_and_still_read(path):
    write(path)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    if os.access(path.parent, os.W_OK):
        pytest.skip("this user can write everywhere")
    try:
        with pytest.raises(StoreError, match="cannot write in its folder"):
            start_run(path, CONFIG, {})
        with open_run(path) as run:
            assert len(run.cells()) == 2
    finally:
        path.parent.chmod(0o755)
