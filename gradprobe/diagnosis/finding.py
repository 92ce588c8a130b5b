"""A finding: one fault of a run, with its evidence and its remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Where = Literal["", "forward", "backward"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of a run, with its evidence.

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


def title(rule: str, where: Where) -> str:
    """Returns a rule's name, followed by the pass in brackets if there is one: "exploding (forward)"."""
    return f"{rule} ({where})" if where else rule
