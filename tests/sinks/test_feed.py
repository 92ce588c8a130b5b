"""A sink that raises, blocks or is slow disturbs neither the training nor other sinks; a warning counts the loss."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.diagnose_cases import snapshot
from helpers.full_disk import full_disk

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import GradprobeWarning
from gradprobe.sinks import CSV, JSONL, Feed
from gradprobe.sinks.feed import close_all
from gradprobe.snapshot.snapshot import Snapshot

FINDING = Finding("vanishing gradients", "", (), (0, 1), {}, "a fault", "", "", "a cause", ("a remedy",))
STEP = snapshot(0, [1.0, 2.0])


class Recorder:
    """A sink that remembers what it was given, and can raise or block."""

    def __init__(self, fails_at: int | str = -1, blocks_at: int | str = -1) -> None:
        self.fails_at, self.blocks_at = fails_at, blocks_at
        self.free = threading.Event()
        self.entered = threading.Event()
        self.calls: list[object] = []
        self.threads: set[int] = set()

    def open(self, about: Mapping[str, object]) -> None:
        self._take(("open", about), "open")

    def write(self, step: int, snapshot: Snapshot) -> None:
        self._take(step, step)

    def tell(self, step: int, finding: Finding) -> None:
        self._take((step, finding.rule), "tell")

    def close(self) -> None:
        self._take("close", "close")

    def _take(self, what: object, key: int | str) -> None:
        self.threads.add(threading.get_ident())
        if key == self.blocks_at:
            self.entered.set()
            self.free.wait()
        if key == self.fails_at:
            raise OSError(28, "No space left on device")
        self.calls.append(what)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The warnings of the block, whichever thread issues them."""
    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: messages.append(str(message))  # type: ignore[assignment]
        yield messages


def wait_for(feed: Feed) -> None:
    """Waits until the sink is switched off."""
    end = time.monotonic() + 10
    while not feed.failure and time.monotonic() < end:
        time.sleep(0.002)


def test_a_sink_gets_everything_in_order_in_one_thread_that_is_not_the_training_s(told: list[str]) -> None:
    sink = Recorder()
    feed = Feed(sink, {"every": 2})
    for step in range(100):
        feed.put(step, STEP)
    feed.tell(99, FINDING)
    feed.close()
    assert sink.calls == [("open", {"every": 2}), *range(100), (99, "vanishing gradients"), "close"]
    assert len(sink.threads) == 1
    assert sink.threads != {threading.get_ident()}
    assert (feed.n_written, feed.n_lost, feed.failure, told) == (101, 0, "", [])


def test_a_sink_without_steps_is_never_opened(told: list[str]) -> None:
    sink = Recorder()
    feed = Feed(sink)
    feed.close()
    feed.close()
    feed.put(0, STEP)
    assert sink.calls == told == []


@pytest.mark.parametrize("fails_at", ["open", 3, "tell"])
def test_a_sink_that_raises_is_switched_off_with_one_warning(told: list[str], fails_at: int | str) -> None:
    sink, other = Recorder(fails_at), Recorder()
    feeds = [Feed(sink), Feed(other)]
    for step in range(10):
        for feed in feeds:
            feed.put(step, STEP)
            feed.tell(step, FINDING)
    wait_for(feeds[0])
    for feed in feeds:
        feed.put(10, STEP)
        feed.close()
    assert sink.calls[-1:] == ["close"]
    assert len(other.calls) == 23
    (message,) = told
    assert "the sink Recorder is switched off; the training goes on. OSError: [Errno 28] No space left" in message
    assert feeds[0].n_lost + feeds[0].n_written == 21
    assert feeds[1].n_written == 21


def test_a_sink_that_fails_to_close_is_told(told: list[str]) -> None:
    feed = Feed(Recorder(fails_at="close"))
    feed.put(0, STEP)
    feed.close()
    (message,) = told
    assert "may not have stored the last" in message


def test_a_sink_that_blocks_stops_neither_the_training_nor_other_sinks(told: list[str]) -> None:
    stuck, other = Recorder(blocks_at=5), Recorder()
    feeds = [Feed(stuck, capacity=8), Feed(other)]
    began = time.monotonic()
    for step in range(100):
        for feed in feeds:
            feed.put(step, STEP)
        if step == 5:
            assert stuck.entered.wait(60)
    close_all(feeds, timeout_s=0.2)
    assert time.monotonic() - began < 3
    assert other.calls == [("open", {}), *range(100), "close"]
    (message,) = told
    assert "It did not finish within 0.2 s. 95 of 100 steps and findings were not written" in message
    stuck.free.set()


def test_a_sink_that_blocks_for_long_is_switched_off_during_the_training(told: list[str]) -> None:
    sink = Recorder(blocks_at=0)
    feed = Feed(sink, capacity=4, patience_s=0.05)
    feed.put(0, STEP)
    assert sink.entered.wait(60)
    time.sleep(0.1)
    for step in range(1, 10):
        feed.put(step, STEP)
    (message,) = told
    assert "has not returned for 0.05 s. 6 of 6 steps and findings were not written, nor are later ones" in message
    sink.free.set()
    feed.close()
    assert (feed.n_written, feed.n_lost, len(told)) == (0, 10, 1)
    assert sink.calls[-1] == "close"


def test_a_sink_that_is_too_slow_loses_the_newest_and_the_end_tells_how_many(told: list[str]) -> None:
    sink = Recorder(blocks_at=0)
    feed = Feed(sink, capacity=4)
    feed.put(0, STEP)
    assert sink.entered.wait(60)
    for step in range(1, 20):
        feed.put(step, STEP)
    sink.free.set()
    feed.close()
    assert sink.calls == [("open", {}), *range(5), "close"]
    (message,) = told
    assert "is slower than the training: 15 of 20 steps and findings were not written" in message


@pytest.mark.parametrize("kind", [JSONL, CSV])
def test_a_full_disk_leaves_whole_lines_and_one_warning(
    told: list[str], tmp_path: Path, kind: type[JSONL] | type[CSV]
) -> None:
    path = tmp_path / "steps"
    feed = Feed(kind(path, profile_every=0))
    with full_disk(5_000):
        for step in range(200):
            feed.put(step, STEP)
        wait_for(feed)
    for step in range(200, 210):
        feed.put(step, STEP)
    feed.close()
    (message,) = told
    assert "StoreError" in message
    assert "steps: cannot write this file: File too large" in message
    assert 0 < feed.n_written < 200
    assert feed.n_written + feed.n_lost == 210
    text = path.read_text()
    assert text.endswith("\n")
    assert f"{feed.n_written - 1}" in text.splitlines()[-1]


def test_a_warning_that_is_an_error_does_not_reach_the_training() -> None:
    sink = Recorder(blocks_at=0)
    feed = Feed(sink, capacity=1, patience_s=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradprobeWarning)
        feed.put(0, STEP)
        assert sink.entered.wait(60)
        for step in range(1, 4):
            feed.put(step, STEP)
    assert feed.failure
    sink.free.set()
    feed.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_write(told: list[str]) -> None:
    sink = Recorder()
    feed = Feed(sink)
    feed.put(0, STEP)
    pid = os.fork()
    if pid == 0:
        feed.put(1, STEP)
        feed.close()
        os._exit(0 if len(sink.calls) <= 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    feed.put(2, STEP)
    feed.close()
    assert sink.calls == [("open", {}), 0, 2, "close"]
    assert told == []


def test_the_owner_is_told_when_the_sink_is_open() -> None:
    sink = Recorder()
    seen: list[list[object]] = []
    feed = Feed(sink, opened=lambda: seen.append(list(sink.calls)))
    feed.put(0, STEP)
    feed.put(1, STEP)
    feed.close()
    assert seen == [[("open", {})]]


def test_the_sinks_are_found_after_a_plain_import_and_load_no_tracker() -> None:
    script = (
        "import sys, gradprobe; gradprobe.sinks.CSV, gradprobe.sinks.WandB; "
        "sys.exit(any(name in sys.modules for name in ('wandb', 'tensorboard', 'mlflow', 'trackio')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
