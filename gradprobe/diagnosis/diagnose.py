"""Applies the rules to the history of a run, and names the most severe fault."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules import RULES
from gradprobe.diagnosis.rules.activations import EXPLODING_FORWARD, POOR_INITIALISATION
from gradprobe.diagnosis.rules.loss import LOSS_BLOW_UP
from gradprobe.diagnosis.rules.replicas import REPLICAS_DIFFER
from gradprobe.diagnosis.run_history import RunHistory
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds
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
        At most one finding per rule, the most severe first, with the rules that were judged and those that were not.

    Raises:
        ArgumentError: The snapshots are of different probes.

    Source:
        `Rule.source` of each rule in `gradprobe.diagnosis.rules`.
    """
    history = RunHistory(snapshots, thresholds)
    findings: list[Finding] = []
    judged: list[str] = []
    unjudged: dict[str, str] = {}
    for rule in RULES if snapshots else ():
        lacks = rule.lacks(history)
        if lacks is not None:
            if rule is not REPLICAS_DIFFER:  # most runs have no copies
                unjudged[rule.title] = lacks
            continue
        judged.append(rule.title)
        found = rule.check(history) if rule.judges_converging or not history.is_converging else None
        if found is not None:
            findings.append(found)
    findings = _without_explained(findings, history)
    n_steps = history.count(None) if snapshots else 0
    is_known = n_steps >= thresholds.window  # the rules on gradients that need some steps were judged
    healthy = False if findings else (True if is_known else None)
    return Diagnosis(tuple(findings), n_steps, tuple(judged), unjudged, healthy)


def _without_explained(findings: list[Finding], history: RunHistory) -> list[Finding]:
    """Drops what growth over the forward pass explains: poor initialisation, and a loss that is huge from the start."""
    if EXPLODING_FORWARD.title not in {found.title for found in findings}:
        return findings

    def is_explained(found: Finding) -> bool:
        starts_huge = found.rule == LOSS_BLOW_UP.name and found.steps[0] == history.losses[0][0]
        return starts_huge or found.rule == POOR_INITIALISATION.name

    return [found for found in findings if not is_explained(found)]


def verdict(snapshots: Sequence[Snapshot]) -> Verdict:
    """Returns the rule of the most severe finding in steps in order, or "healthy"."""
    return most_severe({found.rule for found in diagnose(snapshots)})


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
