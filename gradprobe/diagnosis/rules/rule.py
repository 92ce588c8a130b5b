"""The type of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradprobe.diagnosis.finding import Finding, Where, title
from gradprobe.diagnosis.run_history import Need, RunHistory
from gradprobe.diagnosis.thresholds import Thresholds
from gradprobe.errors import printable

AUTOTRAINER = "AUTOTRAINER (Zhang et al., ICSE 2021)"
SAGEMAKER = "SageMaker Debugger"

CLIP = "clipping: probe.clip_grad_norm_(1.0) before the optimizer's step"
INITIALISE = "an initialisation that suits the activation: He for ReLU, Xavier for tanh"


HOW: dict[Need, str] = {
    "loss": "probe.step(loss)",
    "activations=True": "attach(activations=True)",
    "updates=True": "attach(updates=True)",
    "a loss of its own": "a loss that depends on this model alone; an optimizer of other parameters steps in turn",
    "a number of classes": "a bias in the last layer, behind all other parameters, which tells the number of classes",
}
"""How the user provides what a rule needs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One fault that the diagnosis looks for.

    Attributes:
        name: Name of the rule, which is also that of its `gradprobe explain` topic.
        meaning: What is wrong, in a few words.
        formula: When it fires, in terms of `Thresholds`.
        source: Origin of the rule and its threshold.
        cause: The usual cause.
        remedies: What to do, the most likely to help first.
        check: Looks for the fault in a history that provides what the rule needs.
        where: The pass that the rule is about, or "" if it is about neither in particular.
        needs: What the run must record for the rule to be judged.
        judges_converging: Whether the fault counts in a run that converges, too.
        is_event: Whether one step shows the fault, so that the first finding is kept; otherwise the newest is.
        n_steps: Number of steps needed to judge the rule, of those that provide the first of its needs.
    """

    name: str
    meaning: str
    formula: str
    source: str
    cause: str
    remedies: tuple[str, ...]
    check: Callable[[RunHistory], Finding | None]
    where: Where = ""
    needs: tuple[Need, ...] = ()
    judges_converging: bool = False
    is_event: bool = False
    n_steps: Callable[[Thresholds], int] = lambda _: 1

    @property
    def title(self) -> str:
        """The name, followed by the pass in brackets if there is one."""
        return title(self.name, self.where)

    def lacks(self, history: RunHistory) -> str | None:
        """Returns what a history lacks to judge the rule, None if it can be judged."""
        for need in self.needs:
            if not history.provides(need):
                return HOW.get(need, need)
        needed, seen = self.n_steps(history.limits), history.count(self.needs[0] if self.needs else None)
        steps = "1 step" if needed == 1 else f"{needed} steps"
        return f"{steps} ({seen} so far)" if seen < needed else None

    def finding(
        self,
        sites: tuple[str, ...],
        steps: tuple[int, int],
        evidence: dict[str, float],
        message: str,
        first: int = 0,
        cause: str | None = None,
    ) -> Finding:
        """Makes a finding of this rule.

        The message is made printable, since it is for a person; the names of the sites stay exact.

        Args:
            sites: As in `Finding`.
            steps: As in `Finding`.
            evidence: As in `Finding`.
            message: As in `Finding`.
            first: Position of the remedy that the evidence speaks for.
            cause: The cause that the evidence speaks for, None for the usual one.

        Example:
            >>> from gradprobe.diagnosis.rules import SPIKE
            >>> SPIKE.finding((), (7, 7), {"norm": 90.0}, "step 7: ...").remedies[0]
            'look at the batch of that step'
        """
        remedies = (self.remedies[first], *self.remedies[:first], *self.remedies[first + 1 :])
        texts = (printable(message), self.formula, self.source, cause or self.cause, remedies)
        return Finding(self.name, self.where, sites, steps, evidence, *texts, meaning=self.meaning)
