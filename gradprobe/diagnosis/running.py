"""Judges a run as its steps come, in constant memory and constant time per step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from gradprobe.diagnosis.causes import causes_first
from gradprobe.diagnosis.course import Course
from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules import RULES
from gradprobe.diagnosis.rules.replicas import REPLICAS_DIFFER
from gradprobe.diagnosis.rules.rule import Rule
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.snapshot.signals import Signals
from gradprobe.snapshot.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class _Kept:
    """A finding of earlier steps, and the mean of the newest losses when it was made."""

    finding: Finding
    loss: float


@dataclass(slots=True)
class _State:
    """What is known of the steps judged so far.

    Attributes:
        course: Losses and total norms.
        found: Findings by the title of their rule.
        judged: Titles of the rules that were judged.
    """

    course: Course
    found: dict[str, _Kept] = field(default_factory=dict)
    judged: set[str] = field(default_factory=set)


class RunningDiagnosis:
    """Applies the rules to the newest steps from time to time, and remembers what they found.

    A rule sees the newest `Thresholds.n_recent` steps and the course of the loss. Such windows overlap by as many steps
    as a rule needs to see a change. A finding stays, with the range of its steps, unless its rule excuses a run that
    converges and the loss has clearly fallen since.

    Args:
        limits: Limits of the rules.

    Example:
        >>> running = RunningDiagnosis()
        >>> running.read().n_steps
        0
    """

    def __init__(self, limits: Thresholds = DEFAULTS) -> None:
        self._limits = limits
        self._stride = limits.n_recent - limits.spike_warm_up - limits.window
        self._state = _State(Course.under(limits))
        self._recent: deque[Snapshot] = deque(maxlen=limits.n_recent)
        self._observed: deque[tuple[int, Signals]] = deque(maxlen=limits.n_recent)
        self._updated: deque[Snapshot] = deque(maxlen=limits.n_recent)
        self._n_new = 0

    def take(self, snapshot: Snapshot) -> None:
        """Takes the next step of the run, as it will stay.

        A step with other parameters than the one before starts new windows; findings and losses are kept.

        Args:
            snapshot: The step.
        """
        if self._recent and self._recent[-1].table.names != snapshot.table.names:
            self._judge()
            for steps in (self._recent, self._observed, self._updated):
                steps.clear()
        self._append(snapshot)
        if self._n_new >= self._stride:
            self._judge()

    def forget(self, step: int) -> None:
        """Drops the steps from this number on that were not judged yet: they turned out to be parts of another one.

        Args:
            step: Number of the first.
        """
        while self._n_new > 0 and self._recent[-1].step >= step:
            dropped = self._recent.pop()
            self._n_new -= 1
            if dropped.signals is not None:
                self._observed.pop()
            if dropped.parameter_updates is not None:
                self._updated.pop()

    def read(self, newest: Snapshot | None = None) -> Diagnosis:
        """Returns the diagnosis of all steps taken so far.

        Args:
            newest: One more step, which may still change; it is judged now but not taken.
        """
        twin = RunningDiagnosis(self._limits)
        twin._state = _State(self._state.course.copy(), dict(self._state.found), set(self._state.judged))
        twin._recent, twin._n_new = self._recent.copy(), self._n_new
        twin._observed, twin._updated = self._observed.copy(), self._updated.copy()
        if newest is not None:
            if twin._recent and twin._recent[-1].table.names != newest.table.names:
                twin.take(newest)
            else:
                twin._append(newest)
        return twin._judge()

    def _append(self, snapshot: Snapshot) -> None:
        self._recent.append(snapshot)
        self._n_new += 1
        if snapshot.signals is not None:
            self._observed.append((snapshot.step, snapshot.signals))
        if snapshot.parameter_updates is not None:
            self._updated.append(snapshot)

    def _judge(self) -> Diagnosis:
        """Applies the rules to the newest steps."""
        if not self._recent:
            return Diagnosis((), 0, (), {}, None)
        state, course = self._state, self._state.course
        history = RunHistory(
            tuple(self._recent), self._limits, tuple(self._observed), tuple(self._updated), course, self._n_new
        )
        self._n_new = 0
        losses = [loss for _, loss in list(course.losses)[-self._limits.window :]]
        loss = float(np.mean(losses)) if losses else np.nan
        unjudged: dict[str, str] = {}
        for rule in RULES:
            lacks = rule.lacks(history)
            if lacks is None:
                state.judged.add(rule.title)
            elif rule.title not in state.judged and rule is not REPLICAS_DIFFER:  # most runs have no copies
                unjudged[rule.title] = lacks
            is_excused = history.is_converging and not rule.judges_converging
            found = rule.check(history) if lacks is None and not is_excused else None
            self._keep(rule, found, loss, is_excused)
        findings = tuple(self._told(rule) for rule in RULES if rule.title in state.found)
        judged = tuple(rule.title for rule in RULES if rule.title in state.judged)
        is_known = course.n_steps >= self._limits.window  # the rules on gradients that need some steps were judged
        healthy = False if findings else (True if is_known else None)
        return Diagnosis(causes_first(findings), course.n_steps, judged, unjudged, healthy)

    def _keep(self, rule: Rule, found: Finding | None, loss: float, is_excused: bool) -> None:
        kept = self._state.found
        before = kept.get(rule.title)
        if found is None:
            # the loss at the time is unknown if it was not finite, or if no loss was given
            if before is not None and is_excused and loss < self._limits.converging * before.loss:
                del kept[rule.title]
            return
        if before is not None:
            newer = before.finding if rule.is_event else found
            first, last = before.finding.steps[0], max(before.finding.steps[1], found.steps[1])
            found = replace(newer, steps=(min(first, found.steps[0]), last))
        kept[rule.title] = _Kept(found, loss)

    def _told(self, rule: Rule) -> Finding:
        """Returns a finding, with the step after which a lasting fault was gone."""
        finding = self._state.found[rule.title].finding
        if rule.is_event or finding.steps[1] >= self._recent[0].step:
            return finding
        return replace(finding, message=f"{finding.message}; not found any more after step {finding.steps[1]}")
