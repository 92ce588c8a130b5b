"""What the rules say of a run, and of how much they could judge. Needs no torch."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

from gradprobe.diagnosis.finding import Finding

if TYPE_CHECKING:
    from rich.text import Text

_WIDTH = 100  # characters


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
        text.highlight_regex(r"(?m)^   (Usual cause|Try first|It explains|More):", "bold")
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

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _lines(self) -> Iterator[str]:
        if self.n_steps == 0 and not self.findings:
            yield f"No gradient was measured, so nothing is known{f': {self.note}' if self.note else ''}."
            return
        steps = "1 step" if self.n_steps == 1 else f"{self.n_steps} steps"
        n_rules = len(self.judged) + len(self.unjudged)
        rules = f", {len(self.judged)} of {n_rules} rules judged" if self.unjudged else ""
        roots = [finding for finding in self.findings if not finding.follows]
        if roots:
            faults = "1 fault" if len(roots) == 1 else f"{len(roots)} faults, the most severe first"
            yield f"{faults}. {steps}{rules}."
        elif self.healthy:
            yield f"No fault in {steps}{rules}."
        else:
            yield f"No fault so far, but too little was seen to call it healthy: {steps}{rules}."
        for number, finding in enumerate(roots, start=1):
            yield from ("", f"{number}. {finding.title}: {finding.meaning}")
            yield from _wrapped(finding.message[:1].upper() + finding.message[1:] + ".")
            yield from _wrapped(f"Usual cause: {finding.cause}.")
            yield from _wrapped(f"Try first: {finding.remedies[0]}.")
            symptoms = [other for other in self.findings if other.follows == finding.title]
            if symptoms:
                yield "   It explains:"
                for other in symptoms:
                    text = f"- {other.title}, {_steps(other)}: {other.meaning}"
                    yield from textwrap.wrap(text, _WIDTH, initial_indent="   ", subsequent_indent="     ")
            yield from _wrapped(f"More: gradprobe explain {_quoted(finding.rule)}")
        needs: dict[str, list[str]] = {}
        for rule, need in self.unjudged.items():
            needs.setdefault(need, []).append(rule)
        if needs:
            yield ""
        for need, unjudged in needs.items():
            text = f"Not judged without {need}: {', '.join(unjudged)}."
            yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
        if self.note:
            yield from textwrap.wrap(f"Note: {self.note}.", _WIDTH, subsequent_indent="  ")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="   ", subsequent_indent="   ")


def _steps(finding: Finding) -> str:
    first, last = finding.steps
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name
