"""What the rules say of a run, and of how much they could judge. Needs no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

from gradprobe.diagnosis.causes import forward_causes
from gradprobe.diagnosis.finding import NOTE_WIDTH, Finding, card, note
from gradprobe.diagnosis.rules.rule import HOW
from gradprobe.text.markup import BROKEN, HEALTHY, UNKNOWN, folded, form, paragraph, points
from gradprobe.text.words import counted

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, eq=False)
class Diagnosis(Sequence[Finding]):
    """The findings of a run, with what was judged and what was not.

    Causes come before the symptoms that they explain, and the most severe first. Equal to a sequence of the same
    findings; true if there are any.

    Attributes:
        findings: The findings.
        n_steps: Number of steps with gradients that were judged.
        judged: Titles of the rules that could be judged.
        unjudged: Titles of the others, with what they need.
        healthy: False if there are findings. True if there are none and the rules on gradients could be judged. None if
            too little was seen to tell.
        note: What kept the probe from measuring, empty if nothing did.

    Example:
        >>> from gradprobe.diagnosis.diagnose import diagnose
        >>> nothing = diagnose([])
        >>> bool(nothing), nothing.healthy, nothing.n_steps
        (False, None, 0)
        >>> print(nothing)
        No gradient was measured, so nothing is known.
    """

    findings: tuple[Finding, ...]
    n_steps: int
    judged: tuple[str, ...]
    unjudged: Mapping[str, str]
    healthy: bool | None
    note: str = ""

    def __len__(self) -> int:
        return len(self.findings)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return list(self.findings) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(finding.rule for finding in self.findings))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __rich__(self) -> Text:
        from rich.text import Text  # here, so that a training need not load it

        text = Text(str(self))
        text.highlight_regex(r"(?m)^\d+\. .+$", "bold red")
        text.highlight_regex(r"(?m)^   (Usual cause|Try first|To learn why|It explains|More):", "bold")
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as values that JSON can hold, apart from NaN and infinity in the evidence."""
        return {
            "healthy": self.healthy,
            "steps": self.n_steps,
            "findings": [asdict(finding) for finding in self.findings],
            "judged": list(self.judged),
            "unjudged": dict(self.unjudged),
            "note": self.note,
        }

    @property
    def roots(self) -> tuple[Finding, ...]:
        """The findings that no other finding explains."""
        return tuple(finding for finding in self.findings if not finding.follows)

    @property
    def headline(self) -> str:
        """What was found, in how many steps, as one or two sentences."""
        if self.n_steps == 0 and not self.findings:
            return f"No gradient was measured, so nothing is known{f': {self.note}' if self.note else ''}."
        n_rules = len(self.judged) + len(self.unjudged)
        rules = f", {len(self.judged)} of {n_rules} rules judged" if self.unjudged else ""
        seen = f"{counted(self.n_steps, 'step')}{rules}"
        n_faults = len(self.roots)
        if n_faults:
            return f"{counted(n_faults, 'fault')} in {seen}.{' The most severe comes first.' * (n_faults > 1)}"
        if self.healthy:
            return f"No fault in {seen}."
        return f"No fault so far, but too little was seen to call it healthy: {seen}."

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """What the rules that could not be judged need, and their titles."""
        found: dict[str, tuple[str, ...]] = {}
        for rule, need in self.unjudged.items():
            found[need] = (*found.get(need, ()), rule)
        return found

    def symptoms_of(self, finding: Finding) -> tuple[Finding, ...]:
        """Returns the findings that one explains.

        Args:
            finding: The one.
        """
        return tuple(other for other in self.findings if other.follows == finding.title)

    def hint(self, finding: Finding) -> str:
        """Returns what to observe to learn why there is a finding, "" if the rules that could explain it were judged.

        Args:
            finding: One of the findings.
        """
        how = HOW["activations=True"]
        causes = forward_causes(finding.title, self.needs.get(how, ()))
        return f"{how}, which also judges {', '.join(causes)}" if causes else ""

    def __repr__(self) -> str:
        named = f": {', '.join(finding.title for finding in self.roots)}" if self.findings else ""
        state = {True: "healthy", False: counted(len(self.roots), "fault"), None: "not judged"}[self.healthy]
        return f"Diagnosis({state} in {counted(self.n_steps, 'step')}{named})"

    def _repr_html_(self) -> str:
        colour = {True: HEALTHY, False: BROKEN, None: UNKNOWN}[self.healthy]
        parts = [
            card(finding, f"{k}. ", self.symptoms_of(finding), self.hint(finding))
            for k, finding in enumerate(self.roots, start=1)
        ]
        if self.unjudged:
            texts = [f"without {need}: {', '.join(rules)}" for need, rules in self.needs.items()]
            parts.append(folded(f"{counted(len(self.unjudged), 'rule')} not judged", [points(texts)]))
        if self.note and self.n_steps:
            parts.append(paragraph(f"{self.note}.", "Note:"))
        return form(self.headline, parts, colour)

    def _lines(self) -> Iterator[str]:
        yield self.headline
        if self.n_steps == 0 and not self.findings:
            return
        for number, finding in enumerate(self.roots, start=1):
            yield ""
            yield from note(finding, f"{number}. ", self.symptoms_of(finding), self.hint(finding))
        if self.unjudged:
            yield ""
        for need, rules in self.needs.items():
            text = f"Not judged without {need}: {', '.join(rules)}."
            yield from textwrap.wrap(text, NOTE_WIDTH, subsequent_indent="  ")
        if self.note:
            yield from textwrap.wrap(f"Note: {self.note}.", NOTE_WIDTH, subsequent_indent="  ")
