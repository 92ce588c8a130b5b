"""Feeds a sink from a thread of its own, so that a sink that blocks or raises touches neither training nor sinks."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gradprobe.errors import warn_user
from gradprobe.sinks.sink import Sink

if TYPE_CHECKING:
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.snapshot.snapshot import Snapshot

CLOSE_TIMEOUT_S = 5.0

_CAPACITY = 512  # steps and findings that wait
_PATIENCE_S = 30.0


class _Step(NamedTuple):
    step: int
    snapshot: Snapshot

    def hand_to(self, sink: Sink) -> None:
        sink.write(self.step, self.snapshot)


class _Told(NamedTuple):
    step: int
    finding: Finding

    def hand_to(self, sink: Sink) -> None:
        sink.tell(self.step, self.finding)


class Feed:
    """Hands steps and findings to one sink, in a thread of its own.

    `put` and `tell` neither wait nor raise. What the sink cannot take in time is lost and counted: the newest, when too
    much waits. A sink that raises, or blocks while others wait, is switched off. Each feed warns at most once, of the
    sink that was switched off or, at the end, of a sink that was too slow.

    The sink is opened before the first step or finding, and only if there is one. In a process forked from this one,
    the feed does nothing.

    Attributes:
        n_written: Number of steps and findings that the sink took.
        n_lost: Number of those that it did not take.
        failure: Why the sink was switched off, "" if it was not.

    Args:
        sink: The sink.
        about: What `Sink.open` gets.
        capacity: Largest number of steps and findings that wait.
        patience_s: How long the sink may block in one call while its queue is full.
        opened: Called in the feed's thread once the sink is open. Whoever closes the feed when the interpreter exits
            can register for that here: what is registered last is called first, and a tracker's library may have
            registered an end of its own.

    Example:
        >>> class Collector:
        ...     steps = []
        ...     def open(self, about): pass
        ...     def write(self, step, snapshot): self.steps.append(step)
        ...     def tell(self, step, finding): pass
        ...     def close(self): self.steps.append("end")
        >>> sink = Collector()
        >>> feed = Feed(sink)
        >>> feed.put(0, "a snapshot")
        >>> feed.close()
        >>> sink.steps, feed.n_written
        ([0, 'end'], 1)
    """

    def __init__(
        self,
        sink: Sink,
        about: Mapping[str, object] | None = None,
        capacity: int = _CAPACITY,
        patience_s: float = _PATIENCE_S,
        opened: Callable[[], object] | None = None,
    ) -> None:
        self.n_written = self.n_lost = 0
        self.failure = ""
        self._sink = sink
        self._about = {} if about is None else about
        self._capacity = capacity
        self._patience_s = patience_s
        self._opened = opened
        self._changed = threading.Condition()  # guards everything below, and the counts
        self._waiting: deque[_Step | _Told] = deque()
        self._busy_since: float | None = None  # when the call that the sink is in began
        self._is_ended = self._is_closed = False
        self._n_in_hand = 0  # steps and findings that the sink is writing
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def name(self) -> str:
        """The sink's class."""
        return type(self._sink).__name__

    def put(self, step: int, snapshot: Snapshot) -> None:
        """Hands over a finished step.

        Args:
            step: Its number as the trainer counts.
            snapshot: The step.
        """
        self._add(_Step(step, snapshot))

    def tell(self, step: int, finding: Finding) -> None:
        """Hands over a finding.

        Args:
            step: Number of the step at which it was found.
            finding: The finding.
        """
        self._add(_Told(step, finding))

    def end(self) -> None:
        """Takes nothing more; the sink writes what waits, and closes. Does not wait for it."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Lets the sink write what waits and close, then warns of what was lost.

        Args:
            timeout_s: How long to wait; then the sink is left to itself, and what still waits is lost.
        """
        if self._pid != os.getpid():
            return
        self.end()
        with self._changed:
            is_first, self._is_closed = not self._is_closed, True
            thread = self._thread
        if not is_first or thread is None or thread is threading.current_thread():
            return
        thread.join(timeout_s)
        if thread.is_alive():
            self._switch_off(f"It did not finish within {timeout_s:.2g} s")
        elif self.n_lost and not self.failure:
            warn_user(
                f"the sink {self.name} is slower than the training: {self.n_lost} of {self.n_written + self.n_lost} "
                "steps and findings were not written. With every=, it writes fewer"
            )

    def _add(self, record: _Step | _Told) -> None:
        if self._pid != os.getpid():  # the lock may have been held when the process was forked
            return
        failure = ""
        with self._changed:
            if self._is_ended or self.failure:
                self.n_lost += 1
            elif len(self._waiting) >= self._capacity:
                self.n_lost += 1
                if self._busy_since is not None and time.monotonic() - self._busy_since > self._patience_s:
                    failure = f"A call of it has not returned for {self._patience_s:g} s"
            else:
                self._waiting.append(record)
                self._changed.notify_all()
                if self._thread is None:
                    failure = self._start()
        if failure:
            self._switch_off(failure)

    def _start(self) -> str:
        """Starts the thread; returns why it could not, or ""."""
        self._thread = threading.Thread(target=self._work, name=f"gradprobe {self.name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter is about to exit
            self._thread = None
            return _described(error)
        return ""

    def _work(self) -> None:
        try:
            self._busy_since = time.monotonic()
            self._sink.open(self._about)
            if self._opened is not None:
                self._opened()
            while (record := self._next()) is not None:
                record.hand_to(self._sink)
                self._took()
        except BaseException as error:  # noqa: BLE001, also SystemExit: the thread serves the sink alone
            self._switch_off(_described(error))
        try:
            self._sink.close()
        except BaseException as error:  # noqa: BLE001
            self._switch_off(_described(error))

    def _next(self) -> _Step | _Told | None:
        """Waits for what to hand over next; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_ended or self.failure)
            if not self._waiting:
                return None
            self._busy_since = time.monotonic()
            self._n_in_hand = 1
            return self._waiting.popleft()

    def _took(self) -> None:
        with self._changed:
            self._busy_since = None
            self._n_in_hand = 0
            self.n_written += not self.failure

    def _switch_off(self, failure: str) -> None:
        with self._changed:
            if self.failure:
                return
            self.failure = failure
            self.n_lost += len(self._waiting) + self._n_in_hand
            self._waiting.clear()
            self._changed.notify_all()
            lost = f"{self.n_lost} of {self.n_written + self.n_lost} steps and findings were not written"
            if not self._is_ended:
                lost += ", nor are later ones"
            elif not self.n_lost:
                lost = "It took all steps and findings, but may not have stored the last"
        warn_user(f"the sink {self.name} is switched off; the training goes on. {failure}. {lost}")


def close_all(feeds: Sequence[Feed], timeout_s: float = CLOSE_TIMEOUT_S) -> None:
    """Closes several feeds, which finish side by side.

    Args:
        feeds: The feeds.
        timeout_s: How long to wait for all of them together, as for `Feed.close`.
    """
    limit = time.monotonic() + timeout_s
    for feed in feeds:
        feed.end()
    for feed in feeds:
        feed.close(max(0.0, limit - time.monotonic()))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")
