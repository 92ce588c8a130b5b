"""Hands finished steps to a run folder, to sinks and to a callback, in a thread of its own.

The training's thread does nothing for it: the stream reads the ring buffer as `Probe.drain` does, with a cursor of its
own. What leaves the ring buffer before it is read is lost, and counted.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import warn_user
from gradprobe.log.writer import RunWriter
from gradprobe.probe.history import History, Newest
from gradprobe.sinks.feed import Feed, close_all
from gradprobe.sinks.sink import Sink
from gradprobe.snapshot.snapshot import Snapshot

LEAST_CAPACITY = 256  # of the ring buffer: a smaller one would lose steps between two looks at it
CLOSE_TIMEOUT_S = 10.0

_SHORTEST_S, _LONGEST_S = 0.005, 0.25  # between two looks at the ring buffer
_STORE_EVERY_S, _STORE_AT_LEAST_EVERY_S = 2.0, 5.0
_MOST_PENDING = 256  # steps in memory that are not stored yet
_AT_ONCE = 32  # steps taken under one lock
_JUDGE_EVERY_S = 2.0
_IDLE = 100  # times as long as storing takes
_IDLE_JUDGING = 500  # the same for judging, which holds the interpreter's lock

_live: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
    """Takes the steps of one probe to where they are wanted.

    It does not keep its owner alive: when the owner is collected, the stream writes the last steps and ends, as it does
    when the interpreter exits. In a forked process it does nothing.

    Attributes:
        stored_step: Number of the newest step in the run folder, None if there is none.

    Args:
        owner: The probe.
        history: Its steps.
        writer: Writes the run folder, None if there is none to write.
        sinks: Where steps and findings go.
        about: What the sinks are told of the run.
        tell: A method of the owner that takes new findings. Called in the stream's thread.
    """

    def __init__(
        self,
        owner: object,
        history: History,
        writer: RunWriter | None,
        sinks: Sequence[Sink],
        about: Mapping[str, object],
        tell: Callable[[Finding], None],
    ) -> None:
        self.stored_step: int | None = None
        self._owner = weakref.ref(owner)
        self._tell_owner = weakref.WeakMethod(tell)
        self._history, self._cursor = history, history.reader()
        self._writer = writer
        self._folder = None if writer is None else writer.folder
        self._feeds = [Feed(sink, about, opened=_close_all_at_exit) for sink in sinks]
        self._history.is_judged_elsewhere = True
        self._told: set[str] = set()  # titles of findings
        self._pending: list[Snapshot] = []  # for the writer
        self._newest = -1
        self._is_judging = True
        self._is_unjudged = self._has_warned_of_loss = self._is_callback_off = False
        self._next_store = self._next_judging = 0.0
        self._wake = threading.Event()
        self._requests: deque[threading.Event] = deque()  # of those that wait until everything is stored
        self._deadline: float | None = None  # of closing
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="gradprobe stream", daemon=True)
        self._thread.start()
        _watch(self)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs in the stream's thread, as a callback does."""
        return threading.current_thread() is self._thread

    def flush(self, timeout_s: float) -> None:
        """Waits until the steps finished so far are stored and handed to the sinks.

        Args:
            timeout_s: How long to wait at most.
        """
        if self.is_own_thread or self._pid != os.getpid() or not self._thread.is_alive():
            return
        done = threading.Event()
        self._requests.append(done)
        self._wake.set()
        limit = time.monotonic() + timeout_s
        while self._thread.is_alive() and not done.wait(min(0.1, max(0.0, limit - time.monotonic()))):
            if time.monotonic() >= limit:
                return

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stores the last steps and ends.

        Args:
            timeout_s: How long to wait at most; the rest is then left to the thread.
        """
        if self._pid != os.getpid():
            return
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        if self.is_own_thread:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            warn_user(
                f"the last steps are still being written after {timeout_s:g} s; they are lost if the process ends"
            )

    def leave_to_parent(self) -> None:
        """Called in a forked process: its parent goes on writing."""
        self._history.renew_lock()
        self._history.is_judged_elsewhere = False

    def _work(self) -> None:
        try:
            wait_s = _SHORTEST_S
            while True:
                self._wake.wait(wait_s)
                self._wake.clear()
                is_last = self._deadline is not None or self._owner() is None
                requests = [self._requests.popleft() for _ in range(len(self._requests))]
                _relax_capture()
                n_taken = self._take("always" if is_last else "complete" if requests else "never", is_last)
                self._serve(is_last or bool(requests))
                for request in requests:
                    request.set()
                if is_last:
                    return
                capacity = self._history.ring.capacity
                if 4 * n_taken > capacity:
                    wait_s = max(_SHORTEST_S, wait_s / 2)
                elif 16 * n_taken < capacity:
                    wait_s = min(_LONGEST_S, wait_s * 1.5)
        except BaseException as error:  # noqa: BLE001, nothing above it would tell
            warn_user(f"handing on the steps failed and is switched off; the training goes on. {_described(error)}")
        finally:
            self._end()

    def _take(self, newest: Newest, is_last: bool) -> int:
        """Takes the steps that have arrived; returns how many."""
        n_taken = 0
        while True:
            batch = self._history.drain(self._cursor, newest=newest, wait=newest != "never", most=_AT_ONCE)
            for snapshot in batch:
                self._take_one(snapshot)
            n_taken += len(batch)
            self._judge()
            if self._cursor.n_lost > 0 and not self._has_warned_of_loss:
                self._has_warned_of_loss = True
                warn_user(
                    f"the training is faster than its log: {self._cursor.n_lost} steps before step {self._newest} left "
                    "the history unread, and later ones may too; about.json has their number at the end. With a larger "
                    "every or capacity, none is lost"
                )
            if len(batch) < _AT_ONCE:
                return n_taken

    def _take_one(self, snapshot: Snapshot) -> None:
        self._newest = snapshot.step
        for feed in self._feeds:
            feed.put(snapshot.step, snapshot)
        if self._writer is not None:
            self._pending.append(snapshot)
            if len(self._pending) >= _MOST_PENDING:
                self._store()
        self._is_unjudged = self._is_judging

    def _serve(self, is_wanted: bool) -> None:
        """Stores and judges what was taken, if it is time or it is wanted now."""
        if self._pending and (is_wanted or time.monotonic() >= self._next_store):
            self._store()
        if self._is_unjudged and (is_wanted or time.monotonic() >= self._next_judging):
            self._look_for_findings(is_wanted)

    def _store(self) -> None:
        pending, self._pending = self._pending, []
        start = time.monotonic()
        if self._writer is None:
            return
        try:
            self._writer.write(pending)
            self.stored_step = pending[-1].step
        except Exception as error:  # noqa: BLE001
            self._stop_writing(
                error, f"steps {pending[0].step} to {pending[-1].step} are not stored, nor are later ones"
            )
        end = time.monotonic()
        self._next_store = end + min(max(_STORE_EVERY_S, _IDLE * (end - start)), _STORE_AT_LEAST_EVERY_S)

    def _judge(self) -> None:
        if not self._is_judging:
            return
        try:
            self._history.judge()
        except Exception as error:  # noqa: BLE001, only with strict=True
            self._stop_judging(error)

    def _look_for_findings(self, is_wanted: bool) -> None:
        self._is_unjudged = False
        start = time.monotonic()
        try:
            found = self._history.diagnosis(wait=is_wanted)
        except Exception as error:  # noqa: BLE001
            self._stop_judging(error)
            return
        for finding in found:
            if finding.title not in self._told:
                self._told.add(finding.title)
                self._tell(finding)
        end = time.monotonic()
        self._next_judging = end + max(_JUDGE_EVERY_S, _IDLE_JUDGING * (end - start))

    def _tell(self, finding: Finding) -> None:
        for feed in self._feeds:
            feed.tell(self._newest, finding)
        if self._writer is not None:
            try:
                self._writer.tell(finding)
            except Exception as error:  # noqa: BLE001
                self._stop_writing(error, f"the finding {finding.title!r} is not stored, nor are later steps")
        tell = self._tell_owner()
        if tell is not None and not self._is_callback_off:
            try:
                tell(finding)
            except BaseException as error:  # noqa: BLE001, also SystemExit
                self._is_callback_off = True
                warn_user(f"on_finding failed and is no longer called; the training goes on. {_described(error)}")

    def _stop_writing(self, error: Exception, what: str) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(_described(error))
        warn_user(
            f"the log in {self._folder} is switched off; the training goes on. {_described(error)}. In this run, {what}"
        )

    def _stop_judging(self, error: Exception) -> None:
        self._is_judging = self._history.is_judged_elsewhere = False
        warn_user(f"findings are no longer looked for; the training goes on. {_described(error)}")

    def _end(self) -> None:
        self._history.forget_reader(self._cursor)
        self._history.is_judged_elsewhere = False
        if self._writer is not None:
            try:
                if self._cursor.n_lost > 0:
                    self._writer.describe({"lost_steps": self._cursor.n_lost})
                self._writer.close()
            except Exception as error:  # noqa: BLE001
                self._stop_writing(error, "the number of lost steps is not stored")
        deadline = self._deadline if self._deadline is not None else time.monotonic() + CLOSE_TIMEOUT_S
        close_all(self._feeds, max(0.1, min(deadline - time.monotonic() - 0.2, CLOSE_TIMEOUT_S / 2)))
        _live.discard(self)
        while self._requests:
            self._requests.popleft().set()


def _watch(stream: Stream) -> None:
    global _is_watching_forks
    _live.add(stream)
    _close_all_at_exit()
    if not _is_watching_forks and hasattr(os, "register_at_fork"):
        _is_watching_forks = True
        os.register_at_fork(after_in_child=_leave_to_parent)


_is_watching_forks = False


def _close_all_at_exit() -> None:
    """Closes the streams before what pyarrow and trackers have registered so far: the last is called first."""
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    for stream in list(_live):
        stream.close()


def _leave_to_parent() -> None:
    for stream in list(_live):
        stream.leave_to_parent()


_relaxed = threading.local()
_RELAXED = 2  # cudaStreamCaptureModeRelaxed


def _relax_capture() -> None:
    """Lets this thread ask for events while another captures a CUDA graph; otherwise that would break the capture."""
    if getattr(_relaxed, "is_done", False) or not torch.cuda.is_initialized():
        return
    _relaxed.is_done = True
    runtime = ctypes.CDLL(None)  # with the libraries that torch has loaded
    for name in ("cudaThreadExchangeStreamCaptureMode", "hipThreadExchangeStreamCaptureMode"):
        exchange = getattr(runtime, name, None)  # torch is built for one of the two
        if exchange is not None:
            exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
