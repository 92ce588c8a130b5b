"""What can be wrong with a run: the rules' limits, and what a person is told when one fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradprobe.errors import ArgumentError

Rule = Literal[
    "non-finite",
    "loss blow-up",
    "exploding",
    "vanishing",
    "poor initialisation",
    "saturation",
    "dead ReLU",
    "dying",
    "silent site",
    "layer drift",
    "precision loss",
    "updates too large",
    "updates too small",
    "unstable loss",
    "not learning",
    "spike",
]  # the gravest first
Where = Literal["", "forward", "backward"]

AUTOTRAINER = "AUTOTRAINER (Zhang et al., ICSE 2021)"
SAGEMAKER = "SageMaker Debugger"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        vanishing_ratio: beta1: first over last norm below which a gradient may be vanishing.
        vanishing_norm: beta2: norm of the first layer below which it then is.
        exploding_ratio: beta3: first over last norm above which a gradient is exploding; last over first RMS above
            which what goes forward is.
        slope_sites: Number of weights between the first and the last from which on a line through their norms counts.
        slope_errors: Standard errors by which the line must rise or fall.
        loss_limit: Loss from which on training has blown up.
        dying_share: gamma: share of gradient elements that are exactly zero from which on a layer is dying.
        dying_sites: Share of the weights that must be dying, and two at least.
        drift_fall: Share of its own running mean below which a layer's norm has fallen, others taken into account.
        drift_rise: Multiple of it above which the norm has risen.
        variance_ratio: Largest over smallest variance of the layers' outputs from which on an initialisation is poor.
        dead_activity: Share of the time below which a ReLU that is active no more than that is dead.
        dead_share: Share of a layer's ReLUs that must be dead.
        saturated_slope: Mean derivative of a tanh or sigmoid, as a share of its largest, below which it is saturated.
        subnormal_share: Share of the values of a gradient, zeros left out, that are below the smallest normal number of
            their dtype, above which precision is lost.
        update_ratio_high: Norm of an update over that of its weight above which it is too large.
        update_ratio_low: The same below which it is too small.
        lost_share: Share of a weight's elements that have a gradient and do not move, above which updates are lost.
        spike_sigmas: Standard deviations from the mean of the steps before.
        spike_jump: Multiple of the largest of the last `window` losses that a spike reaches too; a slow rise does not.
        spike_norm_jump: The same for the total norm, which jumps more; sound recurrent nets reach 2.6.
        spike_window: Number of steps before that are looked at.
        spike_warm_up: Number of steps before that are needed.
        window: Number of losses that are compared at the start and at the end; number of steps in which something must
            persist.
        converging: Share of the loss at the start below which training converges: the layers' ratios are then no fault;
            also share of a high loss that is a low one.
        swing_errors: Standard errors by which the loss must fall or rise to be unstable; the largest of the
            differences that noise makes in 1,000 steps stay below in 200 of 200 histories.
        drop_errors: Standard errors by which the loss must have dropped for the model to learn at all; noise alone
            does that in one of 260 runs (Student's t, 18 degrees of freedom).

    Raises:
        ArgumentError: A number of steps is too small.
    """

    vanishing_ratio: float = 1e-3
    vanishing_norm: float = 1e-4
    exploding_ratio: float = 70.0
    slope_sites: int = 10
    slope_errors: float = 3.0
    loss_limit: float = 1e3
    dying_share: float = 0.7
    dying_sites: float = 0.25
    drift_fall: float = 1e-3
    drift_rise: float = 70.0
    variance_ratio: float = 1e4
    dead_activity: float = 0.01
    dead_share: float = 0.5
    saturated_slope: float = 0.05
    subnormal_share: float = 0.5
    update_ratio_high: float = 10.0
    update_ratio_low: float = 1e-8
    lost_share: float = 0.5
    spike_sigmas: float = 7.0
    spike_jump: float = 2.0
    spike_norm_jump: float = 3.0
    spike_window: int = 1000
    spike_warm_up: int = 20
    window: int = 10
    converging: float = 0.8
    swing_errors: float = 8.0
    drop_errors: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("slope_sites", 3), ("spike_warm_up", 1), ("spike_window", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: needed at least {least}, got {getattr(self, name)}")


DEFAULTS = Thresholds()

_DEAD_UNITS = (
    "units that no input activates: large negative biases, after a step that was too long",
    ("a lower learning rate", "He initialisation with zero biases", "leaky ReLU or GELU", "normalisation"),
)  # cause and remedies


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


RULES: dict[tuple[Rule, Where], RuleText] = {
    ("non-finite", ""): RuleText(
        "a NaN or an infinity in any gradient of any step",
        f"{SAGEMAKER}, rule ExplodingTensor",
        "an overflow, a division by zero, a logarithm or root of nothing, or bad values in the data",
        ("look up the first site with probe.first_nonfinite()", "check the data", "a lower learning rate", "clipping"),
    ),
    ("loss blow-up", ""): RuleText(
        "loss NaN or infinite, or >= loss_limit and either the first or above spike_jump times that, in a run that "
        "does not converge; the comparison with the first is ours",
        AUTOTRAINER,
        "a learning rate that is too high, or activations that grow from layer to layer",
        ("a lower learning rate or a warm-up", "clipping", "normalisation", "an initialisation to suit the activation"),
    ),
    ("exploding", "backward"): RuleText(
        "norm(first) / norm(last) > exploding_ratio in more than half of the steps, in a run that does not converge; "
        "or at the first step, where the gradient vanishes in more than half of them, which is ours; or so by a line "
        "through the log-norms of slope_sites weights at least, the first and the last left out, that rises by "
        "slope_errors standard errors; the line is ours",
        AUTOTRAINER,
        "each layer multiplies the gradient by more than one on its way to the input",
        (
            "residual connections",
            "a smaller initialisation",
            "a lower learning rate",
            "clipping, which bounds the step",
        ),
    ),
    ("exploding", "forward"): RuleText(
        "rms(last) / rms(first) > exploding_ratio in more than half of the steps where both are finite, in a run that "
        "does not converge, for the junctions' outputs or for the outputs of weight layers, each behind its "
        "normalisation where it has one and the last layer left out; the comparison is ours",
        "He et al. 2015, arXiv 1502.01852, section 2.2: the variance of the outputs is a product over the layers",
        "each layer, or each addition of a branch, multiplies what goes forward by more than one",
        (
            "normalisation, also in the branches of residual blocks",
            "He initialisation for ReLU, Xavier for tanh",
            "branches that start at zero or are scaled down by depth (Fixup, Zhang et al. 2019)",
        ),
    ),
    ("vanishing", "backward"): RuleText(
        "norm(first) / norm(last) <= vanishing_ratio and norm(first) < vanishing_norm in more than half of the steps, "
        "in a run that does not converge, and from slope_sites weights between them on the same against the last but "
        "one; or so by a line through the log-norms, as for exploding; the line and the last but one are ours",
        AUTOTRAINER,
        "each layer multiplies the gradient by less than one on its way to the input",
        ("residual connections", "normalisation", "ReLU with He initialisation", "a larger initialisation"),
    ),
    ("poor initialisation", ""): RuleText(
        "largest / smallest variance of the outputs of weight layers > variance_ratio in the first `window` steps, in "
        "a run that does not converge and starts without dead ReLUs; outputs as for exploding forward, constant ones "
        "left out. The source has 10, which a sound transformer exceeds; 1e4 is ours",
        f"{SAGEMAKER}, rule PoorWeightInitialization",
        "weights too small or too large for the activation: what goes forward shrinks or grows from layer to layer",
        ("He initialisation for ReLU, Xavier for tanh", "normalisation", "residual connections"),
    ),
    ("saturation", ""): RuleText(
        "mean derivative of a tanh, 1 - rms^2, or of a sigmoid, (mean - rms^2) / 0.25, < saturated_slope in more than "
        "half of the observed steps, in a run that does not converge; the module that runs last is left out. By "
        "Markov's inequality half of the values then let less than twice that through; the threshold is ours",
        f"{SAGEMAKER}, rule SaturatedActivation, which counts units; Glorot and Bengio 2010",
        "inputs of the activation that are far from zero: data that is not normalised, or weights that are too large",
        ("normalise the data", "Xavier initialisation", "normalisation before the activation", "ReLU or GELU"),
    ),
    ("dead ReLU", ""): RuleText(
        "1 - share of outputs above zero / dead_activity > dead_share over the last `window` observed steps, in a run "
        "that does not converge: by Markov's inequality at least that share of the ReLUs is active less than "
        "dead_activity of the time",
        f"{SAGEMAKER}, rule DeadRelu",
        *_DEAD_UNITS,
    ),
    ("dying", ""): RuleText(
        "share of exact zeros >= dying_share in the gradients of dying_sites of the weights and of two at least, in "
        "more than half of the steps, in a run that does not converge; dying_sites is ours",
        f"{AUTOTRAINER}, gamma",
        *_DEAD_UNITS,
    ),
    ("silent site", ""): RuleText(
        "gradient exactly zero in every step, `window` steps at least, where other weights have one",
        "arithmetic: such a parameter never moves",
        "the parameter does not reach the loss: multiplied by zero, detached, or behind dead units",
        ("look at how its output is used", "set requires_grad=False if that is meant"),
    ),
    ("layer drift", ""): RuleText(
        "norm of a weight's gradient, over the median of all weights', in each of the last `window` steps or more "
        "< drift_fall times its own mean before, of spike_warm_up steps at least; or > drift_rise times that, in a run "
        "that does not converge; the rule is ours",
        "a layer against its own running mean: nothing is compared that differs between layers",
        "the layer was cut off or died on the way: dead units, saturation, a mask or a factor that became zero",
        (
            "look at the steps before the first one named",
            "look at how the layer's output is used",
            "a lower learning rate",
            "clipping",
        ),
    ),
    ("precision loss", ""): RuleText(
        "1 - mean magnitude / smallest normal number of the dtype / share that is not zero > subnormal_share, for the "
        "gradient at the output of a module or junction, before loss scaling is undone, in more than half of the "
        "observed steps, in a run that does not converge: by Markov's inequality at least that share of what is not "
        "zero is below the smallest normal number; the threshold is ours",
        "Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740, section 3.2",
        "gradients that are too small for float16, whose smallest normal number is 2^-14 and smallest of all 2^-24",
        ("scale the loss with torch.amp.GradScaler", "bfloat16", "float32 for the layers named"),
    ),
    ("updates too large", ""): RuleText(
        "norm(update) / norm(weight) > update_ratio_high in one observed step at least, for half of the weights or "
        "more, in a run that does not converge; the half is ours",
        f"{SAGEMAKER}, rule WeightUpdateRatio",
        "a learning rate that is too high for such weights; one such step can leave units dead or saturated for good",
        ("a lower learning rate or a warm-up", "clipping", "an initialisation to suit the activation"),
    ),
    ("updates too small", ""): RuleText(
        "norm(update) / norm(weight) < update_ratio_low, or share of the weight's elements that have a gradient and do "
        "not move > lost_share, in more than half of `window` observed steps or more, in a run that does not converge; "
        "the second threshold is ours",
        f"{SAGEMAKER}, rule WeightUpdateRatio; Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192, "
        "on updates that rounding cancels",
        "a learning rate near zero, a gradient that vanishes, or weights whose dtype is too coarse for such steps",
        (
            "a higher learning rate",
            "weights in float32, the computation in bfloat16 under autocast",
            "look at the gradients: do they vanish towards the input?",
        ),
    ),
    ("unstable loss", ""): RuleText(
        "a mean of `window` losses < converging times a later one and swing_errors standard errors below it, in a run "
        "that does not converge; the rule is ours, the source looks at the accuracy of epochs",
        f"{AUTOTRAINER}, oscillating loss",
        "a learning rate at the edge of what is stable, or above it once the loss has become steeper",
        ("a lower learning rate, or one that decays", "clipping", "larger batches", "look at the order of the data"),
    ),
    ("not learning", ""): RuleText(
        "mean loss of the last `window` steps not below that of the first by drop_errors standard errors, in a run "
        "that does not converge; the standard error is ours",
        f"{SAGEMAKER}, rule LossNotDecreasing",
        "a learning rate near zero, labels that do not belong to the inputs, or gradients that do not arrive",
        ("a higher learning rate", "overfit one batch to prove that the model can", "check the labels"),
    ),
    ("spike", ""): RuleText(
        "total norm or loss more than spike_sigmas standard deviations above the mean of the last spike_window steps, "
        "and more than spike_norm_jump or spike_jump times the largest of the last `window`; both are ours",
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
        where: In which pass, where the rule can be about either.
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
    where: Where
    sites: tuple[str, ...]
    steps: tuple[int, int]
    evidence: dict[str, float]
    message: str
    formula: str
    source: str
    cause: str
    remedies: tuple[str, ...]

    @property
    def title(self) -> str:
        """The rule, with where in brackets.

        Example:
            >>> finding("exploding", (), (0, 0), {}, "step 0: ...", where="forward").title
            'exploding (forward)'
        """
        return title(self.rule, self.where)


def title(rule: Rule, where: Where) -> str:
    """Puts a rule and where it found something into words."""
    return f"{rule} ({where})" if where else rule


def finding(
    rule: Rule,
    sites: tuple[str, ...],
    steps: tuple[int, int],
    evidence: dict[str, float],
    message: str,
    where: Where = "",
) -> Finding:
    """Makes a finding of a rule.

    Args:
        rule: Name of the rule.
        sites: Sites concerned.
        steps: First and last step concerned.
        evidence: The numbers that the rule saw.
        message: One sentence for a person.
        where: In which pass.

    Returns:
        The finding, with what `RULES` says of the rule.

    Example:
        >>> finding("spike", (), (7, 7), {"norm": 90.0}, "step 7: ...").remedies[0]
        'look at the batch of that step'
    """
    text = RULES[rule, where]
    return Finding(rule, where, sites, steps, evidence, message, text.formula, text.source, text.cause, text.remedies)
