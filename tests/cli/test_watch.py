"""`gradprobe watch` follows a real training and a sweep, line by line and on the screen of a terminal."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, sgd
from helpers.report_cases import degraded
from rich.cells import cell_len

import gradprobe
from gradprobe.cli import commands
from gradprobe.experiments.sweep.store import RunWriter, start_run

fcntl = pytest.importorskip("fcntl", reason="a pseudo-terminal needs POSIX")
termios = pytest.importorskip("termios")

COMMAND = [sys.executable, "-m", "gradprobe.cli", "watch"]
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"  # another screen, and the one before


@contextmanager
def training(folder: Path, fault: int = -1) -> Iterator[Callable[[int], None]]:
    """Logs a training; gives a function that trains so many steps and stores them. One step can be NaN."""
    model = mlp()
    optimizer = sgd(model)
    n_done = 0
    with gradprobe.attach(model, optimizer=optimizer, updates=True, log_dir=folder) as probe:

        def train(n: int) -> None:
            nonlocal n_done
            for step in range(n_done, n_done + n):
                optimizer.zero_grad()
                loss = loss_of(model) * (float("nan") if step == fault else 1.0)
                loss.backward()
                if step != fault:
                    optimizer.step()
                probe.step(loss)
            n_done += n
            probe.flush()

        yield train


class Started:
    """`gradprobe watch` that writes into a pipe."""

    def __init__(self, *arguments: object) -> None:
        command = [*COMMAND, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self._end = self.process.stdout.fileno()

    def read(self) -> str:
        return what_is_there(self._end)

    def stop_reading(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()

    def rest(self) -> tuple[int, str, str]:
        """Returns the exit status, and everything that is still to be read of stdout and stderr."""
        out, err = self.process.communicate(timeout=250)
        return self.process.returncode, out.decode(), err.decode()


def what_is_there(end: int) -> str:
    """Reads what a process has written, or waits a second for it."""
    if not select.select([end], [], [], 1.0)[0]:
        return ""
    try:
        return os.read(end, 1 << 16).decode("utf-8", "replace")
    except OSError:  # a terminal whose other end is closed
        return ""


def run_once(path: Path) -> tuple[int, str, str]:
    """Runs it with --once; its output says at the end whether torch was loaded."""
    script = (
        "import sys\nfrom gradprobe.cli.commands import main\n"
        "try:\n    main()\nfinally:\n    print('torch:', 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "watch", str(path), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout, done.stderr


def until(read: Callable[[], str], wanted: str) -> str:
    """Reads until a text comes; returns everything up to it."""
    seen, limit = "", time.monotonic() + 60
    while wanted not in seen:
        assert time.monotonic() < limit, f"no {wanted!r} in {seen!r}"
        seen += read()
    return seen


class Terminal:
    """`gradprobe watch` on a terminal of some size."""

    def __init__(self, *arguments: object, rows: int = 24, columns: int = 80) -> None:
        self._end, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdin=inside, stdout=inside, stderr=inside, env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inside)

    def read(self) -> str:
        return what_is_there(self._end)

    def press(self, key: bytes) -> None:
        os.write(self._end, key)

    def rest(self) -> tuple[int, str]:
        """Returns the exit status, and everything that is still to be read."""
        seen = ""
        while self.process.poll() is None:
            seen += self.read()
        while new := self.read():
            seen += new
        os.close(self._end)
        return self.process.returncode, seen


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


def test_a_training_is_followed_from_before_its_first_step_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    watch = Started(folder, "--every", 0.2)
    until(watch.read, f"waiting for {folder}, which does not exist yet")
    with training(folder, fault=65) as train:
        train(50)
        until(watch.read, "step 49,")
        status, out, _ = run_once(folder)
        assert (status, "step 49" in out, "no finding so far" in out) == (0, True, True)
        assert out.endswith("\ntorch: False\n"), "torch was loaded, which takes a second"
        train(50)
        until(watch.read, "finding in step 65: non-finite: a gradient is NaN or infinite")
    status, out, err = watch.rest()
    assert (status, err) == (0, "")
    numbers = r"step 99, .* steps/s, loss .*, total norm .*, update ratio .*"
    assert re.search(f"{numbers}, ended after .*, [1-9] finding", out.splitlines()[-1])


def test_a_screen_shows_the_run_and_gives_the_terminal_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with training(folder) as train:
        train(30)
        terminal = Terminal(folder, "--every", 0.1)
        seen = until(terminal.read, "step 29")
        assert ENTER in seen
        train(30)
        until(terminal.read, "step 59")
    status, out = terminal.rest()
    left = plain(out[out.index(LEAVE) :])
    assert status == 0
    assert "step 59" in left, "the last state stays on the terminal"
    assert "ended after" in left
    assert not re.search(r"Traceback|Error", out)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_screen_that_is_stopped_gives_the_terminal_back(tmp_path: Path, how: str) -> None:
    with training(tmp_path / "run") as train:
        train(10)
        terminal = Terminal(tmp_path / "run")
        until(terminal.read, "0.weight")
        if how == "Ctrl-C":
            terminal.press(b"\x03")
        else:
            terminal.process.send_signal(signal.SIGTERM)
        status, out = terminal.rest()
    assert status == (0 if how == "Ctrl-C" else 128 + signal.SIGTERM)
    assert LEAVE in out
    assert "\x1b[?25h" in out, "the cursor is visible again"
    assert "Traceback" not in out
    assert ("step 9" in plain(out[out.index(LEAVE) :])) == (how == "Ctrl-C")


def test_nothing_wraps_or_is_lost_on_a_small_terminal(tmp_path: Path) -> None:
    name = "a\x1b[31mb" + "long" * 20
    with training(tmp_path / name, fault=20) as train:
        train(40)
    terminal = Terminal(tmp_path / name, rows=11, columns=40)
    seen = until(terminal.read, "2 findings, the newest 1")
    status, rest = terminal.rest()
    out = seen + rest  # it may end while the findings are read
    left = plain(out[out.index(LEAVE) :]).strip("\n").split("\n")
    assert status == 0
    assert left[1].startswith("ended after")
    assert all(cell_len(line) <= 40 for line in left)
    assert "\x1b[31mb" not in out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `gradprobe watch` in this process; returns its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradprobe", "watch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


Command = Callable[..., tuple[int, str, str]]


def test_what_cannot_be_watched_is_named(tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").write_text("of somebody else")
    for arguments, expected in (
        ((tmp_path / "nothing", "--once"), "needed a run folder or the file of a sweep, found nothing there"),
        ((tmp_path / "empty", "--once"), "needed a run folder, found no about.json in it"),
        ((tmp_path / "notes",), "found one that is not an SQLite database"),
        ((tmp_path / "empty", "--every", 0), "--every: needed a number of seconds above 0, got 0"),
        ((tmp_path / "empty", "--every", "nan"), "--every: needed a number of seconds above 0, got nan"),
    ):
        status, out, err = command(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert expected in err


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    with training(tmp_path / "run") as train:
        train(5)
        watch = Started(tmp_path / "run", "--every", 0.05)
        until(watch.read, "step 4,")
        watch.stop_reading()
        limit = time.monotonic() + 60
        while watch.process.poll() is None and time.monotonic() < limit:
            train(1)
        assert watch.process.stderr is not None
        assert (watch.process.poll(), watch.process.stderr.read()) == (0, b"")


def test_a_run_that_starts_again_in_the_same_folder_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = (
        "import os, sys\nfrom gradprobe.log import RunWriter\nfrom helpers.run_cases import run\n"
        f"RunWriter({str(folder)!r}).write(run(30))\nos.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    watch = Started(folder, "--every", 0.1)
    assert "running" in until(watch.read, "step 29,")
    with training(folder) as train:
        train(5)
        until(watch.read, "step 4,")
    status, out, _ = watch.rest()
    assert (status, "step 4," in out.splitlines()[-1]) == (0, True)


def test_a_folder_that_is_removed_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with training(tmp_path / "first") as train:
        train(5)
        (tmp_path / "first").rename(folder)
        watch = Started(folder, "--every", 0.1)
        until(watch.read, "step 4,")
        shutil.rmtree(folder)
        until(watch.read, "waiting for")
    watch.process.send_signal(signal.SIGINT)
    status, _, err = watch.rest()
    assert (status, err) == (0, "")


def record(run: RunWriter, until_epoch: int) -> None:
    """Writes the epochs up to one, of four, of all training runs of `degraded`."""
    source = degraded(seeds=1)
    run.add_cells([(cell.family, cell.depth, cell.seed, cell.parameters) for cell in source.cells()])
    for cell in source.cells():
        for row in source.epochs(cell.id):
            if len(run.epochs(cell.id)) <= row.epoch <= until_epoch:
                layers, junctions = source.layers(cell.id, row.epoch), source.junctions(cell.id, row.epoch)
                run.save(cell.id, [row], layers, junctions, b"state", "done" if row.epoch == 4 else "pending")


def test_a_sweep_is_followed_while_another_process_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    watch = Started(path, "--every", 0.1)
    until(watch.read, "waiting for")
    with start_run(path, {"data": "digits", "epochs": 4}, {"torch_version": torch.__version__}) as run:
        record(run, 2)
        told = until(watch.read, "resnet-56 seed 0: epoch 2/4, training error 1.4 %")
        assert "0 of 4 training runs done, about 3.0 s left" in told
        status, out, _ = run_once(path)
        assert (status, out.count("running"), out.count("2/4")) == (0, 4, 4)
        record(run, 4)
    status, out, err = watch.rest()
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].endswith("4 of 4 training runs done")
    assert {one.name for one in tmp_path.iterdir()} == {"s.sqlite", "s.sqlite.lock"}


def test_a_sweep_whose_file_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with start_run(path, {"data": "digits", "epochs": 4}, {}) as run:
        record(run, 1)
    terminal = Terminal(path, "--every", 0.1)
    until(terminal.read, "1/4")
    with start_run(tmp_path / "other", {"data": "digits", "epochs": 4}, {}) as run:
        record(run, 4)
    (tmp_path / "other").replace(path)
    status, out = terminal.rest()
    assert (status, "4 of 4 training runs done" in plain(out[out.index(LEAVE) :])) == (0, True)
