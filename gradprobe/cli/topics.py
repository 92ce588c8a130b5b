"""What goes wrong in deep networks: the problem, its cause, its remedies, and how to see it. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from gradprobe.diagnosis.findings import Rule
from gradprobe.errors import ArgumentError

_AUTOTRAINER = "Zhang et al. 2021, AUTOTRAINER (ICSE): the rule's thresholds"
_HE_NETS = "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv 1512.03385"
_HE_INIT = "He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852"
_HE_IDENTITY = "He et al. 2016, Identity Mappings in Deep Residual Networks, arXiv 1603.05027"
_YANG = "Yang et al. 2019, A Mean Field Theory of Batch Normalization, arXiv 1902.08129"
_GLOROT = "Glorot, Bengio 2010, Understanding the Difficulty of Training Deep Feedforward Networks (AISTATS)"
_PASCANU = "Pascanu, Mikolov, Bengio 2013, On the Difficulty of Training Recurrent Neural Networks (ICML)"

_ATTACH = "probe = gradprobe.attach(model, optimizer=optimizer)"
_ATTACH_UPDATES = "probe = gradprobe.attach(model, optimizer=optimizer, updates=True)"
_ATTACH_ALL = "probe = gradprobe.attach(model, optimizer=optimizer, activations=True)"


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing that goes wrong, or that helps; prints as text.

    Attributes:
        name: What to ask for.
        problem: What happens.
        cause: Why.
        remedies: What to do, in the order to try it.
        commands: Commands that show it.
        code: Lines that show it in a training loop.
        sources: Where this is from.
        rules: Findings that this explains.
    """

    name: str
    problem: str
    cause: str
    remedies: tuple[str, ...]
    commands: tuple[str, ...]
    code: tuple[str, ...]
    sources: tuple[str, ...]
    rules: tuple[Rule, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Gives the topic as plain data."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.name, style="bold")
        yield Padding(self.problem, (0, 0, 1, 0))
        yield Text("Why", style="bold")
        yield Padding(self.cause, (0, 0, 1, 0))
        for title, lines in (
            ("What to do, in this order", [f"{k}. {remedy}" for k, remedy in enumerate(self.remedies, start=1)]),
            ("See it", [*self.commands, *self.code]),
            ("Sources", list(self.sources)),
        ):
            yield Text(title, style="bold")
            for line in lines:
                yield Padding(Text(line), (0, 0, 0, 2))
            yield Text()


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic(
            "vanishing",
            "The gradient shrinks from layer to layer on its way back, and the layers next to the input hardly learn.",
            "By the chain rule the gradient is a product of one Jacobian for each layer. Where a layer shrinks it, the "
            "product falls exponentially: a factor of 0.5 leaves 0.5^20 = 9.5e-7 after 20 layers. Weights that start "
            "too small and saturated sigmoids do that.",
            (
                "Initialise for the activation: He for ReLU, Xavier for tanh.",
                "Take ReLU or a relative of it instead of a saturating activation.",
                "Normalise: batch, layer or group normalisation; with sigmoids only batch normalisation helps.",
                "Add residual connections.",
                "Compare them side by side: gradprobe remedies.",
            ),
            ("gradprobe check 'gradprobe.networks:deep_cnn(50)' --input 3,32,32",),
            (_ATTACH, "probe.findings()"),
            (
                "Bengio, Simard, Frasconi 1994, Learning Long-Term Dependencies with Gradient Descent is Difficult",
                _GLOROT,
                _HE_INIT,
                "Wu, He 2018, Group Normalization, arXiv 1803.08494",
                _AUTOTRAINER,
            ),
            ("vanishing",),
        ),
        Topic(
            "exploding",
            "The gradient grows from layer to layer on its way back, or the signal on its way forward; steps become "
            "too large, and the loss jumps or becomes NaN.",
            "The same product as for vanishing gradients, with factors above 1: 2^20 = 1,048,576 after 20 layers. "
            "Batch normalisation keeps the forward pass in bounds and not the backward one: in a plain ReLU net with "
            "it the gradient grows about 1.2 times per layer at initialisation. In a residual net without it the "
            "signal grows: each junction adds the variance of its branch.",
            (
                "Clip the gradient: probe.clip_grad_norm_(1.0) before the optimizer's step.",
                "Lower the learning rate, or warm it up.",
                "Initialise for the activation: He for ReLU, Xavier for tanh.",
                "Add residual connections; in a deep plain net batch normalisation alone is no remedy.",
                "Compare them side by side: gradprobe remedies.",
            ),
            ("gradprobe check 'gradprobe.networks:plain(110)' --input 3,32,32 --batch 16",),
            (_ATTACH, "probe.findings()"),
            (_PASCANU, _YANG, _AUTOTRAINER),
            ("exploding", "loss blow-up"),
        ),
        Topic(
            "degradation",
            "A deeper net ends with a higher training error than a shallower one, although its gradients are sound.",
            "It is not overfitting, since the training error is higher too, and with batch normalisation vanishing "
            "gradients are an unlikely cause. The deeper net could copy the shallower one and make the other layers "
            "the identity, so a better solution exists; training does not find it. A layer with ReLU has to learn the "
            "identity exactly, weight by weight.",
            (
                "Add residual connections: a block then learns F(x) = H(x) - x, and the identity is F = 0.",
                "Put normalisation and ReLU before the convolutions, so that the shortcuts stay clean.",
                "Train a shallower net.",
            ),
            (
                "gradprobe sweep --families plain,resnet --depths 20,56 --out run.sqlite",
                "gradprobe report run.sqlite --html report.html",
                "gradprobe identity",
            ),
            (),
            (_HE_NETS + ", sections 1 and 4.1", _HE_IDENTITY),
        ),
        Topic(
            "overfitting",
            "On test images a net is clearly worse than a shallower one, or than it was itself some epochs before; on "
            "the training images it is as good or better.",
            "The training images are too few for a net of this size: it learns them by heart, wrong labels too. In a "
            "degraded net the training error is the higher one; here only the test error is. He et al. have both: "
            "plain-56 trains worse than plain-20; ResNet-1202 trains like ResNet-110 and has a test error of 7.93 % "
            "against 6.43. Sound gradients do not tell one from the other.",
            (
                "Take more training images, or augment them.",
                "Regularise: weight decay, dropout.",
                "Stop where the error on a validation set is lowest; a test set that chose the epoch cannot judge it.",
                "Train a shallower or narrower net.",
                "Look at the labels of training images that are learned last.",
            ),
            (
                "gradprobe sweep --families resnet --depths 20,56 --seeds 0,1,2 --out run.sqlite",
                "gradprobe report run.sqlite --html report.html",
            ),
            (),
            (
                _HE_NETS + ", section 4.2",
                "Prechelt 1998, Early Stopping - but when? (Neural Networks: Tricks of the Trade)",
                "Zhang et al. 2017, Understanding Deep Learning Requires Rethinking Generalization, arXiv 1611.03530",
            ),
        ),
        Topic(
            "non-finite",
            "A value becomes NaN or infinite, and soon all of them are.",
            "An overflow (in float16 above 65,504), a division by zero, the logarithm of zero, or a step that was too "
            "large. What is seen in the loss began somewhere else.",
            (
                "Find the first place: its layer, its step, forward or backward.",
                "Lower the learning rate, or clip the gradient.",
                "In float16 scale the loss (torch.amp.GradScaler), or use bfloat16.",
                "Guard the operation: an epsilon under the root and in the denominator, logsumexp for the logarithm.",
            ),
            (),
            (
                _ATTACH_ALL,
                "print(probe.first_nonfinite())",
            ),
            (
                "Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740",
                "Amazon SageMaker Debugger, rule ExplodingTensor",
            ),
            ("non-finite",),
        ),
        Topic(
            "dead-units",
            "A ReLU gives zero for every input; no gradient passes it, and it never comes back.",
            "A large step has pushed its input below zero for all examples. There the derivative is zero, so nothing "
            "pulls it back.",
            (
                "Lower the learning rate.",
                "Initialise for ReLU (He).",
                "Normalise before the ReLU.",
                "Take a leaky ReLU or GELU.",
            ),
            (),
            (
                _ATTACH_ALL,
                "{name: seen.output.zero_fraction for name, seen in probe.latest().activations.items()}",
            ),
            (
                "Maas, Hannun, Ng 2013, Rectifier Nonlinearities Improve Neural Network Acoustic Models",
                "Amazon SageMaker Debugger, rule DeadRelu",
            ),
            ("dead ReLU", "dying", "silent site"),
        ),
        Topic(
            "saturation",
            "The outputs of a tanh or sigmoid lie at its ends, where its derivative is almost zero.",
            "Its inputs are far from zero: the data is not normalised, or the weights are too large. The mean "
            "derivative follows from the outputs: of a tanh 1 - rms^2, of a sigmoid mean - rms^2.",
            (
                "Normalise the data.",
                "Initialise for the activation: Xavier for tanh.",
                "Normalise before the activation.",
                "Take ReLU or GELU.",
            ),
            (),
            (_ATTACH_ALL, "probe.findings()"),
            (_GLOROT, "Amazon SageMaker Debugger, rule SaturatedActivation"),
            ("saturation",),
        ),
        Topic(
            "initialisation",
            "The outputs of some layers are many times larger than those of others before a single step was taken.",
            "A layer multiplies the variance of what passes by fan-in times the variance of its weights, and by what "
            "its activation leaves of it: a half for ReLU. Where that is not one, the product over the layers is far "
            "from it.",
            (
                "Initialise for the activation: He for ReLU, Xavier for tanh.",
                "Normalise: batch, layer or group normalisation.",
                "Add residual connections.",
                "Compare them side by side: gradprobe remedies.",
            ),
            (),
            (_ATTACH_ALL, "{name: seen.output.std for name, seen in probe.latest().activations.items()}"),
            (_GLOROT, _HE_INIT, "Amazon SageMaker Debugger, rule PoorWeightInitialization"),
            ("poor initialisation",),
        ),
        Topic(
            "precision",
            "Gradients are too small for float16: they lose digits, and then become zero.",
            "The smallest normal number of float16 is 6.1e-5, the smallest of all 6e-8. A mean over many examples "
            "makes gradients that small.",
            (
                "Scale the loss: torch.amp.GradScaler, given to attach as grad_scaler.",
                "Take bfloat16, whose range is that of float32.",
                "Keep the layers named in float32.",
            ),
            (),
            (_ATTACH_ALL, "probe.findings()"),
            ("Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740",),
            ("precision loss",),
        ),
        Topic(
            "updates",
            "The optimizer moves the weights too far, or not at all. Usual is about a thousandth of a weight's norm.",
            "The rate does not suit the weights, or the gradient vanishes on its way to them. Weights in bfloat16 have "
            "8 significant bits: a step below 2^-9 of an element, two thousandths, is rounded away.",
            (
                "Change the learning rate: lower or with a warm-up, or higher.",
                "Keep the weights in float32, and compute in bfloat16 under torch.autocast.",
                "Look at the gradients first: do they vanish towards the input?",
            ),
            (),
            (_ATTACH_UPDATES, "{name: seen.ratio for name, seen in probe.latest().updates.items()}"),
            (
                "CS231n, Neural Networks Part 3, ratio of weights to updates",
                "Amazon SageMaker Debugger, rule WeightUpdateRatio",
                "Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192",
            ),
            ("updates too large", "updates too small"),
        ),
        Topic(
            "unstable-loss",
            "The loss falls and rises again, or swings up and down, by more than the batches explain.",
            "The learning rate is at the edge of what is stable. Where training has made the loss steeper, a rate that "
            "was right at the start is too high.",
            (
                "Lower the learning rate, or let it decay.",
                "Clip the gradient: probe.clip_grad_norm_(1.0) before the optimizer's step.",
                "Take larger batches.",
                "Look at the order of the data: do all batches hold the same mix?",
            ),
            (),
            (_ATTACH, "[(one.step, one.loss) for one in probe.history()]"),
            (
                "AUTOTRAINER (Zhang et al., ICSE 2021), oscillating loss",
                "Cohen et al. 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, "
                "arXiv 2103.00065",
            ),
            ("unstable loss",),
        ),
        Topic(
            "not-learning",
            "The loss does not fall, although nothing looks broken.",
            "The rate is near zero or far too high, labels do not belong to their inputs, or the gradients do not "
            "arrive.",
            (
                "Look at the other findings first: they name causes.",
                "Overfit one batch, to prove that the model can.",
                "Try rates ten times higher and lower.",
                "Check that inputs and labels belong together.",
            ),
            (),
            (_ATTACH, "probe.findings()"),
            ("Amazon SageMaker Debugger, rule LossNotDecreasing",),
            ("not learning",),
        ),
        Topic(
            "spike",
            "One step's gradient or loss stands far out of those before.",
            "A bad batch, or a rate at the edge of what is stable. A single step of that size can undo many.",
            (
                "Look at the batch of that step.",
                "Clip the gradient: probe.clip_grad_norm_(1.0) before the optimizer's step.",
                "Lower the learning rate.",
            ),
            (),
            (_ATTACH, "[(one.step, one.total_norm) for one in probe.history()]"),
            ("OLMo et al. 2024, 2 OLMo 2 Furious, arXiv 2501.00656, section 3.2",),
            ("spike",),
        ),
        Topic(
            "drift",
            "One layer's gradient falls far below its own running mean, and stays there, while the others go on.",
            "The layer was cut off or died on the way: its units are dead or saturated, or a mask or a factor became "
            "zero.",
            (
                "Look at the steps before the one that the finding names.",
                "Look at how the layer's output is used.",
                "Lower the learning rate, or clip the gradient.",
            ),
            (),
            (_ATTACH, "probe.findings()"),
            ("The rule is ours: a layer against itself needs no limit that fits all layers",),
            ("layer drift",),
        ),
        Topic(
            "shortcut",
            "Residual connections train at depths where plain nets do not.",
            "At y = x + F(x) the gradient at x is dL/dx = dL/dy + J_F(x)^T dL/dy: whatever the branch does to its "
            "part, the first part arrives unchanged. How much comes which way can be measured at each junction.",
            ("Write the junction as gradprobe.nn.ResidualAdd, and attach.",),
            ("gradprobe check 'gradprobe.networks:resnet(110)' --input 3,32,32 --batch 16",),
            (
                _ATTACH,
                "{name: seen.shortcut_share for name, seen in probe.latest().junctions.items()}",
            ),
            (_HE_NETS, _HE_IDENTITY + ", eq. 5"),
        ),
    )
}


def explain(name: str) -> Topic:
    """Explains one problem.

    Args:
        name: One of `TOPICS`.

    Returns:
        The topic; prints as text.

    Raises:
        ArgumentError: There is no such topic.

    Example:
        >>> explain("vanishing").remedies[0]
        'Initialise for the activation: He for ReLU, Xavier for tanh.'
    """
    if name not in TOPICS:
        raise ArgumentError(f"topic: need one of {', '.join(TOPICS)}; got {name!r}")
    return TOPICS[name]
