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
from gradprobe.diagnosis.run_history import Columns, RunHistory, gradient_columns, update_columns
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.snapshot.signals import Signals
from gradprobe.snapshot.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class _Kept:
    """A finding of earlier steps.

    Attributes:
        finding: With the range of all its steps.
        newest_from: First step of the newest finding alone, which the message is about.
        loss: Mean of the newest losses when it was made.
        is_gone: The rule has been applied since and found nothing.
    """

    finding: Finding
    newest_from: int
    loss: float
    is_gone: bool = False


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
        self._columns: deque[Columns] = deque(maxlen=limits.n_recent)  # of the recent steps
        self._update_columns: deque[Columns] = deque(maxlen=limits.n_recent)  # of those with updates
        self._n_new = 0
        self._is_stopped = False

    def take(self, snapshot: Snapshot) -> None:
        """Takes the next step of the run, as it will stay; does nothing after `stop`.

        A step with other parameters or residual adds than the one before starts new windows; findings and losses are
        kept.

        Args:
            snapshot: The step.
        """
        if self._is_stopped:
            return
        if self._has_other_parameters(snapshot):
            self._judge()
            self._clear()
        elif self._has_other_residual_adds(snapshot):
            self._judge()
            self._observed.clear()
        self._append(snapshot)
        if self._n_new >= self._stride:
            self._judge()

    def stop(self) -> None:
        """Takes no more steps; what was found stays."""
        self._is_stopped = True
        self._clear()

    def forget(self, step: int) -> None:
        """Drops the steps from this number on that were not judged yet: they turned out to be parts of another one.

        Args:
            step: Number of the first.
        """
        while self._n_new > 0 and self._recent[-1].step >= step:
            dropped = self._recent.pop()
            self._columns.pop()
            self._n_new -= 1
            if dropped.signals is not None:
                self._observed.pop()
            if dropped.parameter_updates is not None:
                self._updated.pop()
                self._update_columns.pop()

    def read(self, newest: Snapshot | None = None) -> Diagnosis:
        """Returns the diagnosis of all steps taken so far.

        Args:
            newest: One more step, which may still change; it is judged now but not taken.
        """
        twin = RunningDiagnosis(self._limits)
        twin._state = _State(self._state.course.copy(), dict(self._state.found), set(self._state.judged))
        twin._recent, twin._n_new = self._recent.copy(), self._n_new
        twin._observed, twin._updated = self._observed.copy(), self._updated.copy()
        twin._columns, twin._update_columns = self._columns.copy(), self._update_columns.copy()
        if newest is not None and not self._is_stopped:
            if twin._has_other_parameters(newest) or twin._has_other_residual_adds(newest):
                twin.take(newest)
            else:
                twin._append(newest)
        return twin._judge()

    def _has_other_parameters(self, snapshot: Snapshot) -> bool:
        """Returns whether a step has other parameters than the one before."""
        return len(self._recent) > 0 and self._recent[-1].table.names != snapshot.table.names

    def _has_other_residual_adds(self, snapshot: Snapshot) -> bool:
        """Returns whether a step has other residual adds than the one before."""
        if snapshot.signals is None or not self._observed:
            return False
        before, table = self._observed[-1][1].table, snapshot.signals.table
        return before is not table and before.junctions != table.junctions

    def _clear(self) -> None:
        for steps in (self._recent, self._observed, self._updated, self._columns, self._update_columns):
            steps.clear()
        self._n_new = 0

    def _append(self, snapshot: Snapshot) -> None:
        self._recent.append(snapshot)
        self._columns.append(gradient_columns(snapshot))
        self._n_new += 1
        if snapshot.signals is not None:
            self._observed.append((snapshot.step, snapshot.signals))
        if snapshot.parameter_updates is not None:
            self._updated.append(snapshot)
            self._update_columns.append(update_columns(snapshot))

    def _judge(self) -> Diagnosis:
        """Applies the rules to the newest steps."""
        state, course = self._state, self._state.course
        with np.errstate(all="ignore"):  # the norms may have any magnitude that a dtype can hold
            unjudged = self._apply_rules() if self._recent else {}
        findings = tuple(self._told(rule) for rule in RULES if rule.title in state.found)
        judged = tuple(rule.title for rule in RULES if rule.title in state.judged)
        is_known = course.n_steps >= self._limits.window  # the rules on gradients that need some steps were judged
        healthy = False if findings else (True if is_known else None)
        return Diagnosis(causes_first(findings, self._limits), course.n_steps, judged, unjudged, healthy)

    def _apply_rules(self) -> dict[str, str]:
        """Updates the findings; returns the titles of the rules that were never judged, with what they lack."""
        state, limits = self._state, self._limits
        history = RunHistory(
            tuple(self._recent),
            limits,
            tuple(self._observed),
            tuple(self._updated),
            tuple(self._columns),
            tuple(self._update_columns),
            state.course,
            self._n_new,
        )
        self._n_new = 0
        losses = [loss for _, loss in list(state.course.losses)[-limits.window :]]
        loss = float(np.mean(losses)) if losses else np.nan
        is_broken = bool((history.column("nonfinite")[-1] * history.present[-1]).any())
        unjudged: dict[str, str] = {}
        for rule in RULES:
            lacks = rule.lacks(history)
            if lacks is None:
                state.judged.add(rule.title)
            elif rule.title not in state.judged and rule is not REPLICAS_DIFFER:  # most runs have no copies
                unjudged[rule.title] = lacks
            is_excused = history.is_converging and not rule.judges_converging
            if is_excused:
                self._excuse(rule, loss)
            elif lacks is None:
                self._keep(rule, rule.check(history), loss, is_broken)
        return unjudged

    def _excuse(self, rule: Rule, loss: float) -> None:
        """Drops a finding if the loss has clearly fallen since; it is unknown if it was not finite or not given."""
        kept = self._state.found.get(rule.title)
        if kept is not None and loss < self._limits.converging * kept.loss:
            del self._state.found[rule.title]

    def _keep(self, rule: Rule, found: Finding | None, loss: float, is_broken: bool) -> None:
        kept = self._state.found
        before = kept.get(rule.title)
        if found is None:
            # Gradients that are not finite hide most faults.
            if before is not None and not rule.is_event and not is_broken:
                kept[rule.title] = replace(before, is_gone=True)
            return
        newest_from = found.steps[0]
        if before is not None:
            newer = before.finding if rule.is_event else found
            first, last = before.finding.steps[0], max(before.finding.steps[1], found.steps[1])
            found = replace(newer, steps=(min(first, found.steps[0]), last))
            if before.finding.cause != rule.cause:  # known only from the step at which the fault began
                found = replace(found, cause=before.finding.cause, remedies=before.finding.remedies)
        kept[rule.title] = _Kept(found, newest_from, loss)

    def _told(self, rule: Rule) -> Finding:
        """Returns a finding; of a lasting fault with the step since which it is there or is gone."""
        kept = self._state.found[rule.title]
        finding = kept.finding
        first, last = finding.steps
        since = f"; first found in step {first}" if not rule.is_event and first < kept.newest_from else ""
        until = f"; not found any more after step {last}" if kept.is_gone else ""
        return replace(finding, message=finding.message + since + until)
