"""Which finding explains which, so that a diagnosis names a cause before its symptoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.thresholds import DEFAULTS, Thresholds

_STUCK = ("saturation", "dead ReLU")  # activations that pass no gradient
_DEAD = ("dying", "silent parameter")
_BROKEN = ("non-finite", "loss blow-up")
_COURSE = ("unstable loss", "spike", "not learning")
_OFTEN_FROM_FORWARD = (*_DEAD, "vanishing (backward)", "exploding (backward)")  # begin in the forward pass

# For each rule, from cause to symptom, the titles of the rules whose findings it may explain.
_EXPLAINS: dict[str, tuple[str, ...]] = {
    "gradients not cleared": (
        *_DEAD,
        *_STUCK,
        *_BROKEN,
        *_COURSE,
        "updates too large",
        "exploding (forward)",
        "exploding (backward)",
        "vanishing (backward)",
        "layer drift",
    ),
    "exploding (forward)": (
        *_DEAD,
        *_STUCK,
        *_BROKEN,
        *_COURSE,
        "poor initialisation",
        "updates too large",
        "exploding (backward)",
        "updates too small",
    ),
    "poor initialisation": (
        "saturation",
        "exploding (backward)",
        "vanishing (backward)",
        "precision loss",
        "updates too small",
        "not learning",
    ),
    "exploding (backward)": (*_DEAD, *_STUCK, *_BROKEN, *_COURSE, "updates too large", "layer drift"),
    "updates too large": (*_DEAD, *_STUCK, *_BROKEN, *_COURSE, "vanishing (backward)", "layer drift"),
    "saturation": (
        *_DEAD,
        "vanishing (backward)",
        "precision loss",
        "layer drift",
        "updates too small",
        "not learning",
    ),
    "dead ReLU": (*_DEAD, "vanishing (backward)", "precision loss", "layer drift", "updates too small", "not learning"),
    "non-finite": ("loss blow-up", "silent parameter", "not learning"),
    "loss blow-up": (*_DEAD, *_COURSE, "non-finite", "layer drift"),
    "precision loss": (*_DEAD, "vanishing (backward)", "updates too small", "not learning"),
    "vanishing (backward)": ("updates too small", "not learning"),
    "dying": ("silent parameter", "layer drift", "not learning"),
    "silent parameter": ("layer drift", "not learning"),
    "updates too small": ("not learning",),
    "unstable loss": ("spike", "not learning"),
    "spike": ("not learning",),
}


def causes_first(findings: Sequence[Finding], limits: Thresholds = DEFAULTS) -> tuple[Finding, ...]:
    """Names for each finding the one that explains it, and puts it behind that one.

    Args:
        findings: At most one per rule, the most severe first.
        limits: Limits that they were found with.

    Returns:
        The same, each with `follows` set. Those that nothing explains keep their order; each is followed by those that
        it explains.
    """
    by_title = {finding.title: finding for finding in findings}
    root = {title: _root(title, by_title, limits) for title in by_title}
    ordered: list[Finding] = []
    for finding in findings:
        if root[finding.title] == finding.title:
            ordered.append(replace(finding, follows=""))
            ordered += [
                replace(other, follows=finding.title)
                for other in findings
                if other is not finding and root[other.title] == finding.title
            ]
    return tuple(ordered)


def forward_causes(title: str, unjudged: Sequence[str]) -> list[str]:
    """Returns which unjudged rules may explain a fault of the gradient that often begins in the forward pass.

    Args:
        title: Title of the fault's rule.
        unjudged: Titles of the rules on the forward pass that were not judged.

    Returns:
        Their titles; none if the fault is another one.

    Example:
        >>> forward_causes("exploding (backward)", ["exploding (forward)", "dead ReLU"])
        ['exploding (forward)']
    """
    if title not in _OFTEN_FROM_FORWARD:
        return []
    return [cause for cause in unjudged if title in _EXPLAINS.get(cause, ())]


def _root(title: str, found: dict[str, Finding], limits: Thresholds) -> str:
    for cause, symptoms in _EXPLAINS.items():
        if cause in found and title in symptoms and _is_in_time(found[cause], found[title], limits):
            return _root(cause, found, limits)
    return title


def _is_in_time(cause: Finding, symptom: Finding, limits: Thresholds) -> bool:
    """Whether a cause may have come before its symptom, given that a lasting fault dates from the start of a window.

    A loss that blows up makes gradients infinite and the reverse: the first of the two is the cause.
    """
    if cause.steps[0] > min(symptom.steps[1], symptom.steps[0] + limits.n_recent):
        return False
    if cause.title == "loss blow-up" and symptom.title == "non-finite":
        return cause.steps[0] < symptom.steps[0]
    return cause.title != "non-finite" or cause.steps[0] <= symptom.steps[0]
