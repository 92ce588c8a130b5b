"""What can be wrong with a run: the rules' limits, and what a person is told when one fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradprobe.errors import ArgumentError

Rule = Literal[
    "non-finite", "loss blow-up", "exploding", "vanishing", "dying", "silent site", "not learning", "spike"
]  # the gravest first

AUTOTRAINER = "AUTOTRAINER (Zhang et al., ICSE 2021)"
SAGEMAKER = "SageMaker Debugger"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        vanishing_ratio: beta1: first over last norm below which a gradient may be vanishing.
        vanishing_norm: beta2: norm of the first layer below which it then is.
        exploding_ratio: beta3: first over last norm above which a gradient is exploding.
        loss_limit: Loss from which on training has blown up.
        dying_share: gamma: share of gradient elements that are exactly zero from which on a layer is dying.
        dying_sites: Share of the weights that must be dying, and two at least.
        spike_sigmas: Standard deviations from the mean of the steps before.
        spike_jump: Multiple of the largest of the last `window` steps that a spike reaches too; a slow rise does not.
        spike_window: Number of steps before that are looked at.
        spike_warm_up: Number of steps before that are needed.
        window: Number of losses that are compared at the start and at the end; number of steps in which something must
            persist.
        converging: Share of the loss at the start below which training converges: the layers' ratios are then no fault.
        drop_errors: Standard errors by which the loss must have dropped for the model to learn at all; noise alone
            does that in one of 260 runs (Student's t, 18 degrees of freedom).

    Raises:
        ArgumentError: A number of steps is too small.
    """

    vanishing_ratio: float = 1e-3
    vanishing_norm: float = 1e-4
    exploding_ratio: float = 70.0
    loss_limit: float = 1e3
    dying_share: float = 0.7
    dying_sites: float = 0.25
    spike_sigmas: float = 7.0
    spike_jump: float = 2.0
    spike_window: int = 1000
    spike_warm_up: int = 20
    window: int = 10
    converging: float = 0.8
    drop_errors: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("spike_warm_up", 1), ("spike_window", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: needed at least {least}, got {getattr(self, name)}")


DEFAULTS = Thresholds()


@dataclass(frozen=True, slots=True)
class RuleText:
    """What is the same in every finding of a rule.

    Attributes:
        formula: When it fires, with the names of `Thresholds`.
        source: Where the rule and its threshold are from.
        cause: The usual cause.
        remedies: What to do, the likeliest to help first.
    """

    formula: str
    source: str
    cause: str
    remedies: tuple[str, ...]


RULES: dict[Rule, RuleText] = {
    "non-finite": RuleText(
        "a NaN or an infinity in any gradient of any step",
        f"{SAGEMAKER}, rule ExplodingTensor",
        "an overflow, a division by zero, a logarithm or root of nothing, or bad values in the data",
        ("look up the first site with probe.first_nonfinite()", "check the data", "a lower learning rate", "clipping"),
    ),
    "loss blow-up": RuleText(
        "loss NaN or infinite, or >= loss_limit and either the first or above spike_jump times that, in a run that "
        "does not converge; the comparison with the first is ours",
        AUTOTRAINER,
        "a learning rate that is too high, or activations that grow from layer to layer",
        ("a lower learning rate or a warm-up", "clipping", "normalisation", "an initialisation to suit the activation"),
    ),
    "exploding": RuleText(
        "norm(first) / norm(last) > exploding_ratio in more than half of the steps, in a run that does not converge",
        AUTOTRAINER,
        "each layer multiplies the gradient by more than one on its way to the input",
        (
            "residual connections",
            "a smaller initialisation",
            "a lower learning rate",
            "clipping, which bounds the step",
        ),
    ),
    "vanishing": RuleText(
        "norm(first) / norm(last) <= vanishing_ratio and norm(first) < vanishing_norm in more than half of the steps, "
        "in a run that does not converge",
        AUTOTRAINER,
        "each layer multiplies the gradient by less than one on its way to the input",
        ("residual connections", "normalisation", "ReLU with He initialisation", "a larger initialisation"),
    ),
    "dying": RuleText(
        "share of exact zeros >= dying_share in the gradients of dying_sites of the weights and of two at least, in "
        "more than half of the steps, in a run that does not converge; dying_sites is ours",
        f"{AUTOTRAINER}, gamma",
        "units that no input activates: large negative biases, after a step that was too long",
        ("a lower learning rate", "He initialisation with zero biases", "leaky ReLU or GELU", "normalisation"),
    ),
    "silent site": RuleText(
        "gradient exactly zero in every step, `window` steps at least, where other weights have one",
        "arithmetic: such a parameter never moves",
        "the parameter does not reach the loss: multiplied by zero, detached, or behind dead units",
        ("look at how its output is used", "set requires_grad=False if that is meant"),
    ),
    "not learning": RuleText(
        "mean loss of the last `window` steps not below that of the first by drop_errors standard errors, in a run "
        "that does not converge; the standard error is ours",
        f"{SAGEMAKER}, rule LossNotDecreasing",
        "a learning rate near zero, labels that do not belong to the inputs, or gradients that do not arrive",
        ("a higher learning rate", "overfit one batch to prove that the model can", "check the labels"),
    ),
    "spike": RuleText(
        "total norm or loss more than spike_sigmas standard deviations above the mean of the last spike_window steps, "
        "and more than spike_jump times the largest of the last `window`; spike_jump is ours",
        "OLMo 2 (OLMo et al. 2024), section 3.2",
        "a bad batch, or a learning rate at the edge of what is stable",
        ("look at the batch of that step", "clipping", "a lower learning rate"),
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, with its evidence.

    Attributes:
        rule: Name of the rule.
        sites: Sites concerned, the first to fail first; empty where it concerns the whole.
        steps: First and last step concerned.
        evidence: The numbers that the rule saw.
        message: One sentence for a person.
        formula: When the rule fires, with the names of `Thresholds`.
        source: Where the rule and its threshold are from.
        cause: The usual cause.
        remedies: What to do, the likeliest to help first.
    """

    rule: Rule
    sites: tuple[str, ...]
    steps: tuple[int, int]
    evidence: dict[str, float]
    message: str
    formula: str
    source: str
    cause: str
    remedies: tuple[str, ...]


def finding(
    rule: Rule, sites: tuple[str, ...], steps: tuple[int, int], evidence: dict[str, float], message: str
) -> Finding:
    """Makes a finding of a rule.

    Args:
        rule: Name of the rule.
        sites: Sites concerned.
        steps: First and last step concerned.
        evidence: The numbers that the rule saw.
        message: One sentence for a person.

    Returns:
        The finding, with what `RULES` says of the rule.

    Example:
        >>> finding("spike", (), (7, 7), {"norm": 90.0}, "step 7: ...").remedies[0]
        'look at the batch of that step'
    """
    text = RULES[rule]
    return Finding(rule, sites, steps, evidence, message, text.formula, text.source, text.cause, text.remedies)
