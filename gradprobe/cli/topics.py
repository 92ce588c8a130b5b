"""The topics of `gradprobe explain`: one per rule of the diagnosis, and a few without a rule. Needs no torch.

Cause, remedies and formula come from the rule; problem, code and further sources are written here.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from gradprobe.diagnosis.rules import RULES
from gradprobe.errors import not_among

_HE_NETS = "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv 1512.03385"
_HE_INIT = "He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852"
_HE_IDENTITY = "He et al. 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027"
_YANG = "Yang et al. 2019, A Mean Field Theory of Batch Normalization, arXiv 1902.08129"
_GLOROT = "Glorot, Bengio 2010, Understanding the Difficulty of Training Deep Feedforward Networks (AISTATS)"
_PASCANU = "Pascanu, Mikolov, Bengio 2013, On the Difficulty of Training Recurrent Neural Networks (ICML)"
_MAAS = "Maas, Hannun, Ng 2013, Rectifier Nonlinearities Improve Neural Network Acoustic Models"
_CS231N = "CS231n, Neural Networks Part 3, ratio of weights to updates"

_ATTACH = "probe = gradprobe.attach(model, optimizer=optimizer)"
_ATTACH_ALL = "probe = gradprobe.attach(model, optimizer=optimizer, activations=True)"
_FINDINGS = (_ATTACH, "probe.findings()")
_FINDINGS_OF_ALL = (_ATTACH_ALL, "probe.findings()")
_ZEROS = (_ATTACH_ALL, "{name: seen.output.zero_fraction for name, seen in probe.latest().activations.items()}")
_LOSSES = (
    _ATTACH,
    "probe.step(loss)  # after each optimizer.step()",
    "[(one.step, one.loss) for one in probe.history()]",
)
_RATIOS = (
    "probe = gradprobe.attach(model, optimizer=optimizer, updates=True)",
    "{name: seen.ratio for name, seen in probe.latest().updates.items()}",
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One problem of deep networks, or one remedy; prints as text.

    Attributes:
        name: The argument of `gradprobe explain`; the name of the rule if there is one.
        problem: What happens, and how.
        cause: The usual cause.
        remedies: What to do, the most likely to help first.
        sources: Literature.
        commands: Commands that show it.
        code: Lines that show it in a training loop.
        formula: When a finding reports it; empty without a rule.
        rules: Titles of the findings that this explains.
    """

    name: str
    problem: str
    cause: str
    remedies: tuple[str, ...]
    sources: tuple[str, ...]
    commands: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    formula: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first sentence of the problem."""
        return self.problem.partition(". ")[0].removesuffix(".") + "."

    def as_dict(self) -> dict[str, object]:
        """Returns the topic as plain data."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.name, style="bold")
        yield Padding(Text(self.problem), (0, 0, 1, 0))
        for title, lines in (
            ("Why", [self.cause]),
            (
                "What to do, the most likely to help first",
                [f"{k}. {remedy}" for k, remedy in enumerate(self.remedies, start=1)],
            ),
            ("Reported if", list(self.formula)),
            ("See it", [*self.commands, *self.code]),
            ("Sources", list(self.sources)),
        ):
            if lines:
                yield Text(title, style="bold")
                for line in lines:
                    yield Padding(Text(line), (0, 0, 0, 2))
                yield Text()


def _rule(
    name: str, problem: str, code: tuple[str, ...], sources: tuple[str, ...] = (), commands: tuple[str, ...] = ()
) -> Topic:
    """Makes the topic of all rules of this name, whose texts say which pass they are about if there are several."""
    rules = [rule for rule in RULES if rule.name == name]
    labels = {rule: f"{rule.where}: " if len(rules) > 1 else "" for rule in rules}
    cause = "; ".join(labels[rule] + rule.cause for rule in rules)
    return Topic(
        name,
        problem,
        cause=f"{cause[0].upper()}{cause[1:]}.",
        remedies=tuple(labels[rule] + remedy for rule in rules for remedy in rule.remedies),
        formula=tuple(labels[rule] + rule.formula for rule in rules),
        commands=commands,
        code=code,
        sources=(*dict.fromkeys(rule.source for rule in rules), *sources),
        rules=tuple(rule.title for rule in rules),
    )


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        _rule(
            "vanishing",
            "The gradient shrinks from layer to layer on its way back, and the layers next to the input hardly learn. "
            "By the chain rule it is a product of one Jacobian per layer: if each one shrinks it, it falls "
            "exponentially. A factor of 0.5 leaves 0.5^20 = 9.5e-7 after 20 layers. Weights that start too small and "
            "saturated sigmoids do this.",
            _FINDINGS,
            (
                "Bengio, Simard, Frasconi 1994, Learning Long-Term Dependencies with Gradient Descent is Difficult",
                _GLOROT,
                _HE_INIT,
                "Wu, He 2018, Group Normalization, arXiv 1803.08494",
            ),
            ("gradprobe check 'gradprobe.networks:deep_cnn(50)' --input 3,32,32", "gradprobe remedies"),
        ),
        _rule(
            "exploding",
            "The gradient grows from layer to layer on its way back, or the signal on its way forward; steps become "
            "too large, and the loss jumps or becomes NaN. It is the same product as for vanishing gradients, with "
            "factors above 1: 2^20 = 1,048,576 after 20 layers. Batch normalisation bounds the forward pass but not "
            "the backward pass: in a plain ReLU network with it the gradient grows about 1.2 times per layer at "
            "initialisation. In a residual network without it the signal grows: each residual add adds the variance of "
            "its branch.",
            _FINDINGS,
            (_PASCANU, _YANG),
            ("gradprobe check 'gradprobe.networks:plain(110)' --input 3,32,32 --batch-size 16", "gradprobe remedies"),
        ),
        _rule(
            "loss blow-up",
            "The loss becomes huge, NaN or infinite, at once or within a few steps.",
            _LOSSES,
            (_PASCANU,),
        ),
        Topic(
            "degradation",
            "A deeper network ends with a higher training error than a shallower one, although its gradients are "
            "healthy.",
            "It is not overfitting, since the training error is higher too, and with batch normalisation vanishing "
            "gradients are an unlikely cause. The deeper network could copy the shallower one and make the other "
            "layers the identity, so a better solution exists, but training does not find it. A layer with ReLU has to "
            "learn the identity exactly, weight by weight.",
            (
                "residual connections: a block then learns F(x) = H(x) - x, and the identity is F = 0",
                "normalisation and ReLU before the convolutions, so that the shortcuts stay clean",
                "a shallower network",
            ),
            (_HE_NETS + ", sections 1 and 4.1", _HE_IDENTITY),
            commands=(
                "gradprobe sweep --families plain,resnet --depths 20,56 --out run.sqlite",
                "gradprobe report run.sqlite --html report.html",
                "gradprobe identity",
            ),
        ),
        Topic(
            "overfitting",
            "On test images a network is clearly worse than a shallower one, or than it was itself some epochs before; "
            "on the training images it is as good or better.",
            "There are too few training images for a network of this size: it memorises them, wrong labels included. "
            "In a degraded network the training error is the higher one; here only the test error is. He et al. report "
            "both: plain-56 trains worse than plain-20; ResNet-1202 trains like ResNet-110 and has a test error of "
            "7.93 % against 6.43. Healthy gradients do not tell one from the other.",
            (
                "more training images, or augmentation",
                "regularisation: weight decay, dropout",
                "stop where the error on a validation set is lowest; a test set that chose the epoch cannot judge it",
                "a shallower or narrower network",
                "check the labels of the training images that are learned last",
            ),
            (
                _HE_NETS + ", section 4.2",
                "Prechelt 1998, Early Stopping - but when? (Neural Networks: Tricks of the Trade)",
                "Zhang et al. 2017, Understanding Deep Learning Requires Rethinking Generalization, arXiv 1611.03530",
            ),
            commands=(
                "gradprobe sweep --families resnet --depths 20,56 --seeds 0,1,2 --out run.sqlite",
                "gradprobe report run.sqlite --html report.html",
            ),
        ),
        _rule(
            "non-finite",
            "A value becomes NaN or infinite, and soon all of them are. What shows in the loss began somewhere else.",
            (_ATTACH_ALL, "print(probe.first_nonfinite())"),
            ("Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740",),
        ),
        _rule(
            "replicas differ",
            "Ranks that hold copies of one parameter have different gradients for it. Their copies drift apart, "
            "without any error, and each rank trains another network.",
            (_ATTACH + "  # on every rank", "probe.findings()"),
        ),
        _rule(
            "dead ReLU",
            "A ReLU returns zero for every input. A large step has pushed its input below zero for all examples; there "
            "the derivative is zero, so no gradient gets through to pull it back.",
            _ZEROS,
            (_MAAS,),
        ),
        _rule(
            "dying",
            "The gradients of several layers are mostly exact zeros: the units behind them hardly ever let a gradient "
            "through.",
            (_ATTACH, "{name: seen.zero_fraction for name, seen in probe.latest().sites.items()}"),
            (_MAAS,),
        ),
        _rule(
            "silent parameter",
            "A parameter's gradient is exactly zero in every step, while others have one: it never moves.",
            (_ATTACH, "[name for name, seen in probe.latest().sites.items() if seen.abs_max == 0]"),
        ),
        _rule(
            "gradients not cleared",
            "Without zero_grad, each backward pass adds to the gradients of all steps before. The optimizer then "
            "follows their sum, which grows with every step like a momentum that never decays: the loss may still fall "
            "for a while, and then swings or blows up.",
            _FINDINGS,
        ),
        _rule(
            "saturation",
            "The outputs of a tanh or sigmoid are close to its limits, where its derivative is almost zero. The mean "
            "derivative follows from the outputs: it is 1 - rms^2 for a tanh and mean - rms^2 for a sigmoid.",
            _FINDINGS_OF_ALL,
            (_GLOROT,),
        ),
        _rule(
            "poor initialisation",
            "The outputs of some layers are many times larger than those of others before a single step was taken. A "
            "layer multiplies the variance of its input by fan-in times the variance of its weights, and its "
            "activation keeps a part of that: half for ReLU. If the result is not one, the product over the layers is "
            "far from one.",
            (_ATTACH_ALL, "{name: seen.output.std for name, seen in probe.latest().activations.items()}"),
            (_GLOROT, _HE_INIT),
            ("gradprobe remedies",),
        ),
        _rule(
            "precision loss",
            "Gradients are too small for float16: they lose digits, and then become zero. The smallest normal number "
            "of float16 is 6.1e-5, the smallest subnormal number 6e-8. A mean over many examples makes gradients that "
            "small.",
            _FINDINGS_OF_ALL,
        ),
        _rule(
            "updates too large",
            "The optimizer moves the weights too far in one step. The usual update is about a thousandth of a weight's "
            "norm.",
            _RATIOS,
            (_CS231N,),
        ),
        _rule(
            "updates too small",
            "The optimizer hardly moves the weights. The usual update is about a thousandth of a weight's norm. "
            "Weights in bfloat16 have 8 significant bits: a step below 2^-9 of an element, two thousandths, is rounded "
            "away.",
            _RATIOS,
            (_CS231N,),
        ),
        _rule(
            "unstable loss",
            "The loss falls and rises again, or swings up and down, by more than the batches explain. As training "
            "makes the loss steeper, a learning rate that was right at the start becomes too high.",
            _LOSSES,
            (
                "Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, "
                "arXiv 2103.00065",
            ),
        ),
        _rule("not learning", "The loss does not fall, although nothing looks broken.", _FINDINGS),
        _rule(
            "spike",
            "The gradient or the loss of one step is far above those before. A single step of that size can undo many. "
            "The norm is that before clipping; times the clip factor, it is what the optimizer got.",
            (_ATTACH, "[(one.step, one.total_norm, one.clip_factor) for one in probe.history()]"),
            ("OLMo et al. 2024, 2 OLMo 2 Furious, arXiv 2501.00656, section 3.2",),
        ),
        _rule(
            "layer drift",
            "One layer's gradient falls far below its own running mean and stays there, while the others go on as "
            "before.",
            _FINDINGS,
        ),
        Topic(
            "shortcut",
            "Residual connections train at depths at which plain networks do not.",
            "At y = x + F(x) the gradient at x is dL/dx = dL/dy + J_F(x)^T dL/dy: whatever the branch does to its "
            "part, the first part arrives unchanged. Each residual add can measure how much comes through which.",
            ("write the residual add as gradprobe.nn.ResidualAdd, and attach",),
            (_HE_NETS, _HE_IDENTITY + ", eq. 5"),
            commands=("gradprobe check 'gradprobe.networks:resnet(110)' --input 3,32,32 --batch-size 16",),
            code=(_ATTACH, "{name: seen.shortcut_share for name, seen in probe.latest().junctions.items()}"),
        ),
    )
}

# Former names and the topics that replace them, kept for one release.
_RENAMED = {
    "dead units": ("dead ReLU", "dying", "silent parameter"),
    "silent site": ("silent parameter",),
    "initialisation": ("poor initialisation",),
    "precision": ("precision loss",),
    "updates": ("updates too large", "updates too small"),
    "drift": ("layer drift",),
}


def explain(name: str) -> tuple[Topic, ...]:
    """Looks up what explains a problem.

    Args:
        name: One of `TOPICS`, in any case and with spaces or hyphens. An old name works too, with a
            `DeprecationWarning` that says the new one.

    Returns:
        The topic; several only for an old name that covered several rules.

    Raises:
        ArgumentError: There is no such topic.

    Example:
        >>> [topic.remedies[0] for topic in explain("dead-relu")]
        ['a lower learning rate']
    """
    key = _key(name)
    found = [topic for topic in TOPICS.values() if _key(topic.name) == key]
    if not found and key in _RENAMED:
        found = [TOPICS[new] for new in _RENAMED[key]]
        names = ", ".join(repr(topic.name) for topic in found)
        warnings.warn(f"explain: topic {name!r} is now {names}", DeprecationWarning, stacklevel=2)
    if not found:
        raise not_among("topic", name, TOPICS)
    return tuple(found)


def _key(name: str) -> str:
    return name.lower().replace("-", " ")
