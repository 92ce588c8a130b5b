"""Applies the rules to the history of a run, and names the most severe fault."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.rules import RULES
from gradprobe.diagnosis.running import RunningDiagnosis
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
from gradprobe.errors import ArgumentError
from gradprobe.snapshot.snapshot import Snapshot

Verdict: TypeAlias = str  # the name of a rule, or "healthy"


def diagnose(snapshots: Sequence[Snapshot], thresholds: Thresholds = DEFAULTS) -> Diagnosis:
    """Applies the rules to the steps of a run.

    A single non-finite element, huge loss or spike is enough for a finding; most other faults must persist. Most count
    only in a run whose loss does not fall clearly. A rule is skipped if the run did not record what it needs: the loss,
    activations or residual adds, or updates.

    Args:
        snapshots: Steps in order, of one probe.
        thresholds: Limits of the rules.

    Returns:
        At most one finding per rule, causes before the symptoms that they explain and otherwise the most severe first,
        with the rules that were judged and those that were not.

    Raises:
        ArgumentError: The snapshots are of different probes.

    Source:
        `Rule.source` of each rule in `gradprobe.diagnosis.rules`.
    """
    running = RunningDiagnosis(thresholds)
    for snapshot in snapshots:
        if snapshot.table.names != snapshots[0].table.names:
            raise ArgumentError("snapshots: needed the history of one probe, got snapshots with different parameters")
        running.take(snapshot)
    return running.read()


def verdict(snapshots: Sequence[Snapshot]) -> Verdict:
    """Returns the rule of the most severe finding that no other explains in steps in order, or "healthy"."""
    return most_severe({found.rule for found in diagnose(snapshots) if not found.follows})


def most_severe(verdicts: Collection[Verdict]) -> Verdict:
    """Returns the most severe of several verdicts.

    Args:
        verdicts: Verdicts in any order; none at all is "healthy".

    Returns:
        The one that comes first in `gradprobe.diagnosis.rules.RULES`.

    Example:
        >>> most_severe(["healthy", "spike", "exploding"])
        'exploding'
    """
    return next((rule.name for rule in RULES if rule.name in verdicts), "healthy")
