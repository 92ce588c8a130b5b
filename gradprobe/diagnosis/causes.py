"""Which finding explains which, so that a diagnosis names a cause before its symptoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gradprobe.diagnosis.finding import Finding

# Titles of rules, causes first: a finding may explain those that stand behind its name and also come later in the list.
_EXPLAINS: dict[str, tuple[str, ...]] = {
    "gradients not cleared": (
        "updates too large",
        "saturation",
        "dead ReLU",
        "exploding (forward)",
        "exploding (backward)",
        "non-finite",
        "loss blow-up",
        "vanishing (backward)",
        "dying",
        "silent parameter",
        "layer drift",
        "unstable loss",
        "spike",
        "not learning",
    ),
    "exploding (forward)": (
        "poor initialisation",
        "updates too large",
        "saturation",
        "dead ReLU",
        "exploding (backward)",
        "non-finite",
        "loss blow-up",
        "dying",
        "silent parameter",
        "updates too small",
        "unstable loss",
        "spike",
        "not learning",
    ),
    "poor initialisation": (
        "saturation",
        "exploding (backward)",
        "vanishing (backward)",
        "precision loss",
        "updates too small",
        "not learning",
    ),
    "exploding (backward)": (
        "updates too large",
        "saturation",
        "dead ReLU",
        "non-finite",
        "loss blow-up",
        "dying",
        "silent parameter",
        "layer drift",
        "unstable loss",
        "spike",
        "not learning",
    ),
    "updates too large": (
        "saturation",
        "dead ReLU",
        "non-finite",
        "loss blow-up",
        "vanishing (backward)",
        "dying",
        "silent parameter",
        "layer drift",
        "unstable loss",
        "spike",
        "not learning",
    ),
    "saturation": (
        "vanishing (backward)",
        "precision loss",
        "dying",
        "silent parameter",
        "layer drift",
        "updates too small",
        "not learning",
    ),
    "dead ReLU": (
        "vanishing (backward)",
        "precision loss",
        "dying",
        "silent parameter",
        "layer drift",
        "updates too small",
        "not learning",
    ),
    "non-finite": ("loss blow-up", "silent parameter", "not learning"),
    "loss blow-up": (
        "non-finite",
        "dying",
        "silent parameter",
        "layer drift",
        "unstable loss",
        "spike",
        "not learning",
    ),
    "precision loss": ("vanishing (backward)", "silent parameter", "dying", "updates too small", "not learning"),
    "vanishing (backward)": ("updates too small", "not learning"),
    "dying": ("silent parameter", "layer drift", "not learning"),
    "silent parameter": ("layer drift", "not learning"),
    "updates too small": ("not learning",),
    "unstable loss": ("spike", "not learning"),
    "spike": ("not learning",),
}


def causes_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Names for each finding the one that explains it, and puts it behind that one.

    Args:
        findings: At most one per rule, the most severe first.

    Returns:
        The same, each with `follows` set. Those that nothing explains keep their order; each is followed by those that
        it explains.
    """
    by_title = {finding.title: finding for finding in findings}
    root = {title: _root(title, by_title) for title in by_title}
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


def _root(title: str, found: dict[str, Finding]) -> str:
    for cause, symptoms in _EXPLAINS.items():
        if cause in found and title in symptoms and _is_in_time(found[cause], found[title]):
            return _root(cause, found)
    return title


def _is_in_time(cause: Finding, symptom: Finding) -> bool:
    """A loss that blows up makes gradients infinite and the reverse: the first of the two is the cause."""
    if cause.steps[0] > symptom.steps[1]:
        return False
    if cause.title == "loss blow-up" and symptom.title == "non-finite":
        return cause.steps[0] < symptom.steps[0]
    return cause.title != "non-finite" or cause.steps[0] <= symptom.steps[0]
