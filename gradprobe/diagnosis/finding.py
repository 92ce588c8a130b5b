"""A finding: one fault of a run, with its evidence and its remedies."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gradprobe.text.markup import escape, marked, paragraph, points
from gradprobe.text.words import steps

Where = Literal["", "forward", "backward"]

NOTE_WIDTH = 100
"""Longest line of a note, in characters."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of a run, with its evidence. Prints as a note.

    Attributes:
        rule: Name of the rule.
        where: The pass that the rule is about, or "" if it is about neither in particular.
        sites: Names of the parameters or modules concerned, the first to fail first; empty if all are.
        steps: First and last step concerned.
        evidence: The numbers that the rule compared.
        message: One sentence for a person.
        formula: When the rule fires, in terms of `Thresholds`.
        source: Origin of the rule and its threshold.
        cause: The usual cause.
        remedies: What to do, the most likely to help first.
        meaning: What the rule says is wrong, in a few words.
        follows: Title of the finding that explains this one, "" if none does.
    """

    rule: str
    where: Where
    sites: tuple[str, ...]
    steps: tuple[int, int]
    evidence: dict[str, float]
    message: str
    formula: str
    source: str
    cause: str
    remedies: tuple[str, ...]
    meaning: str = ""
    follows: str = ""

    @property
    def title(self) -> str:
        """The rule's name, followed by the pass in brackets if there is one."""
        return title(self.rule, self.where)

    @property
    def sentence(self) -> str:
        """The message as a sentence of its own."""
        return f"{self.message[:1].upper()}{self.message[1:]}."

    @property
    def explain_command(self) -> str:
        """The command that says more about the rule."""
        topic = f"'{self.rule}'" if " " in self.rule else self.rule
        return f"gradprobe explain {topic}"

    def __repr__(self) -> str:
        return f"Finding({self.title}, {self.message})"

    def __str__(self) -> str:
        return "\n".join(note(self))

    def _repr_html_(self) -> str:
        return card(self)


def title(rule: str, where: Where) -> str:
    """Returns a rule's name, followed by the pass in brackets if there is one: "exploding (forward)"."""
    return f"{rule} ({where})" if where else rule


def note(finding: Finding, place: str = "", symptoms: Sequence[Finding] = (), hint: str = "") -> Iterator[str]:
    """Yields the lines of a note on a finding.

    Args:
        finding: The finding.
        place: What stands in front of its title, such as "1. ".
        symptoms: The findings that it explains.
        hint: What to observe to learn why it is there, "" to leave that out.
    """
    yield f"{place}{finding.title}: {finding.meaning}"
    yield from _wrapped(finding.sentence)
    yield from _wrapped(f"Usual cause: {finding.cause}.")
    yield from _wrapped(f"Try first: {finding.remedies[0]}.")
    if hint:
        yield from _wrapped(f"To learn why: {hint}.")
    if symptoms:
        yield "   It explains:"
    for symptom in symptoms:
        yield from textwrap.wrap(f"- {_told(symptom)}", NOTE_WIDTH, initial_indent="   ", subsequent_indent="     ")
    yield from _wrapped(f"More: {finding.explain_command}")


def card(finding: Finding, place: str = "", symptoms: Sequence[Finding] = (), hint: str = "") -> str:
    """Returns the same as `note`, as HTML for a notebook."""
    parts = [
        paragraph("", f"{place}{finding.title}: {finding.meaning}"),
        paragraph(finding.sentence),
        paragraph(f"{finding.cause}.", "Usual cause:"),
        paragraph(f"{finding.remedies[0]}.", "Try first:"),
    ]
    if hint:
        parts.append(paragraph(f"{hint}.", "To learn why:"))
    if symptoms:
        parts += [paragraph("", "It explains:"), points(map(_told, symptoms))]
    parts.append(f"<div>More: <code>{escape(finding.explain_command)}</code></div>")
    return marked(parts)


def _told(symptom: Finding) -> str:
    return f"{symptom.title}, {steps(*symptom.steps)}: {symptom.meaning}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, NOTE_WIDTH, initial_indent="   ", subsequent_indent="   ")
