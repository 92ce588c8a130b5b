"""The paradox of depth, constructed: a deep net as good as a shallow one exists; does training find it?

A trained plain net is extended with layers that are exact identities, and stands beside the net of the same depth that
was trained from scratch, and beside itself after more training. With it: what stacks of layers make of y = x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from gradprobe import networks
from gradprobe.errors import ArgumentError
from gradprobe.experiments import DEFAULT_EPOCHS, STACK_STEPS
from gradprobe.experiments.common import bar
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.identity.stacks import DEPTHS, Stacks, check_options, train_stacks
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.train import Recipe, build, evaluate, load_state, save_state, sgd
from gradprobe.nn.residual import ResidualAdd
from gradprobe.report.records import Cell, EpochRow

BATCH_SIZE = 64
# A difference of training errors, in percentage points, that is not spoken of as one.
AS_GOOD_PP = 1.0
# For the progress bar: a layer of a stack takes about as long for all STACK_STEPS as four layers of a net for an epoch.
_STACK_LAYER_COST = 4.0


@dataclass(frozen=True, slots=True)
class NetErrors:
    """A network's loss and errors over the full sets, in per cent."""

    train_loss: float
    train_error_pct: float
    test_error_pct: float


@dataclass(frozen=True, slots=True)
class Paradox:
    """A shallow net, the same net with identity layers, and the deep net from scratch.

    Attributes:
        shallow_depth: layers of the shallow net.
        deep_depth: layers of the deep ones.
        parameters: of the deep ones.
        epochs: for which the shallow net and the one from scratch were trained.
        further_epochs: for which the constructed net was trained on, at the last learning rate.
        largest_logit_difference: between the shallow and the constructed net, over all training and test images.
        shallow: the trained shallow net.
        constructed: the shallow net with identity layers.
        by_batch: the same, normalised by each batch instead of by the running averages, as in training.
        trained_on: the constructed net after further training.
        scratch: the deep net, trained from scratch.
    """

    shallow_depth: int
    deep_depth: int
    parameters: int
    epochs: int
    further_epochs: int
    largest_logit_difference: float
    shallow: NetErrors
    constructed: NetErrors
    by_batch: NetErrors
    trained_on: NetErrors
    scratch: NetErrors

    @property
    def conclusions(self) -> tuple[str, ...]:
        """What the numbers say, in sentences."""
        shallow, deep = f"plain-{self.shallow_depth}", f"plain-{self.deep_depth}"
        added = self.deep_depth - self.shallow_depth
        limit, reached = self.shallow.train_error_pct, self.scratch.train_error_pct
        first = f"{shallow} with {added} identity layers gives its logits (largest difference "
        first += f"{self.largest_logit_difference:.1g})"
        if self.constructed.train_error_pct == limit and self.constructed.test_error_pct == self.shallow.test_error_pct:
            first += f" and the same errors: a {deep} exists that is as good as {shallow}."
        else:
            first += f", but a training error of {self.constructed.train_error_pct:.1f} % instead of {limit:.1f} %."
        compared = f"{reached:.1f} % against {limit:.1f} % of training error"
        if reached > limit + AS_GOOD_PP:
            second = (
                f"Trained from scratch with the same recipe, {deep} does not find one: {compared}. "
                "It is not overfitting, since the training error is the higher one."
            )
        elif reached < limit - AS_GOOD_PP:
            second = f"Trained from scratch with the same recipe, {deep} becomes better here: {compared}."
        else:
            second = f"Trained from scratch with the same recipe, {deep} becomes as good here: {compared}."
        before, batch, after = (row.train_error_pct for row in (self.constructed, self.by_batch, self.trained_on))
        third = ""
        if batch > before + AS_GOOD_PP:
            third += (
                "Training normalises by each batch, under which the added layers are no identities: "
                f"{batch:.1f} % before the first step. "
            )
        third += (
            f"{self.further_epochs} more epochs at the last learning rate take the constructed net's training error "
            f"from {before:.1f} to {after:.1f} % (loss {self.constructed.train_loss:.2g} to "
            f"{self.trained_on.train_loss:.2g}): "
        )
        if after > before + AS_GOOD_PP:
            third += "training leaves the better solution."
        else:
            third += f"training stays within {AS_GOOD_PP:g} point of the better solution."
        return (first, second, third)


@dataclass(frozen=True, slots=True)
class Identity:
    """What `identity` found; prints as two tables with what follows from them.

    Attributes:
        data: what the nets were trained on, in a line.
        seed: of everything.
        batch_size: images per step.
        learning_rate: at the start; divided by 10 at 50 % and at 75 % of the steps.
        paradox: the constructed net and those beside it.
        stacks: y = x, learned by depth.
    """

    data: str
    seed: int
    batch_size: int
    learning_rate: float
    paradox: Paradox
    stacks: Stacks

    def as_dict(self) -> dict[str, object]:
        """Gives the result as plain data, with the conclusions."""
        values = asdict(self)
        values["paradox"]["conclusions"] = list(self.paradox.conclusions)
        values["stacks"] = self.stacks.as_dict()
        return values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        paradox, stacks = self.paradox, self.stacks
        shallow, deep = f"plain-{paradox.shallow_depth}", f"plain-{paradox.deep_depth}"
        table = Table(
            "net",
            "train loss",
            "train error %",
            "test error %",
            title="The better solution exists",
            title_justify="left",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for name, row in (
            (f"{shallow}, {paradox.epochs} epochs", paradox.shallow),
            (f"{deep}, constructed: {shallow} and identities", paradox.constructed),
            ("  normalised by each batch, as in training", paradox.by_batch),
            (f"  after {paradox.further_epochs} more epochs", paradox.trained_on),
            (f"{deep} from scratch, {paradox.epochs} epochs", paradox.scratch),
        ):
            table.add_row(name, f"{row.train_loss:.3g}", f"{row.train_error_pct:.1f}", f"{row.test_error_pct:.1f}")
        yield table
        yield Text(
            f"{self.data}; seed {self.seed}, batch {self.batch_size}, SGD {self.learning_rate:g} / 10 at 50 and 75 %; "
            f"{paradox.parameters:,} parameters in {deep}"
        )
        yield from (Text(sentence) for sentence in paradox.conclusions)
        yield Text()
        kinds = (("plain", "he"), ("residual", "he"), ("residual", "zero"))
        table = Table("layers", title="Learning y = x: loss, and distance of a layer from the identity")
        table.title_justify = "left"
        for kind, init in kinds:
            start = "He" if init == "he" else "zero"
            table.add_column(f"{kind}, {start}: loss", justify="right")
            table.add_column("distance", justify="right")
        for row_of in zip(*(stacks.of(*kind) for kind in kinds), strict=True):
            cells = [text for one in row_of for text in (f"{one.final_loss:.2g}", f"{one.distance:.2g}")]
            table.add_row(str(row_of[0].depth), *cells)
        yield table
        yield Text(
            f"width {stacks.width}, inputs |N(0, 1)|, {stacks.steps} steps of Adam; plain: y = relu(Wx + b), distance "
            "||W - I||_F / sqrt(width); residual: y = relu(x + Wx + b), distance ||W||_F / sqrt(width)"
        )
        yield from (Text(sentence) for sentence in stacks.conclusions)


def extend(shallow: nn.Module, deep: nn.Module) -> None:
    """Makes a deep plain net the same function as a shallow one: the layers that it has more become identities.

    The new blocks stand behind the last block of their stage, where the input is the output of a ReLU, hence not
    negative, and the next ReLU keeps it. Their convolutions copy their input; their batch normalisations do too in
    evaluation mode, until training replaces their running averages.

    Args:
        shallow: a plain net of `gradprobe.networks`.
        deep: a deeper one with the same layout, width, channels and classes; changed in place.

    Raises:
        ArgumentError: the deep net is residual, or is not the shallow one with more blocks.

    Source:
        He et al. 2015, section 1: "a solution by construction".

    Example:
        >>> shallow, deep = networks.plain(8).eval(), networks.plain(14).eval()
        >>> extend(shallow, deep)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(shallow(x), deep(x), atol=1e-5)
        True
    """
    if any(isinstance(module, ResidualAdd) for net in (shallow, deep) for module in net.modules()):
        raise ArgumentError("deep: needed plain nets, got a residual one, whose identity is another")
    state, wanted = shallow.state_dict(), deep.state_dict()
    for name, value in state.items():
        if name not in wanted or wanted[name].shape != value.shape:
            found = tuple(wanted[name].shape) if name in wanted else "nothing"
            raise ArgumentError(f"deep: needed {name} of {tuple(value.shape)} as in the shallow net, got {found}")
    known = dict(shallow.named_modules())
    added = {name: module for name, module in deep.named_modules() if name not in known}
    for name, module in added.items():
        if isinstance(module, nn.Conv2d):
            square = module.in_channels == module.out_channels and module.stride == (1, 1)
            if not square:
                raise ArgumentError(f"deep: {name} changes the shape of its input, so it cannot be an identity")
    deep.load_state_dict(wanted | state)
    with torch.no_grad():
        for module in added.values():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(math.sqrt(1 + module.eps))
                module.bias.zero_()


def identity(
    *,
    seed: int = 0,
    depths: Sequence[int] = (20, 56),
    epochs: int = DEFAULT_EPOCHS,
    stack_depths: Sequence[int] = DEPTHS,
    steps: int = STACK_STEPS,
    console: Console | None = None,
) -> Identity:
    """Constructs the better deep net, trains beside it one from scratch and it itself on, and lets stacks learn y = x.

    Args:
        seed: of all weights, of the order of the images, and of the stacks' inputs.
        depths: of the shallow and of the deep net, both in the CIFAR layout.
        epochs: passes over the training set, at least 3; a third of them more for the constructed net.
        stack_depths: layers of the stacks.
        steps: of the stacks' optimizer.
        console: where to draw the progress bar; None draws none. A console that is no terminal stays quiet.

    Returns:
        The measured errors and losses, with their conditions.

    Raises:
        ArgumentError: an option is not one of those above.
        GradprobeError: a training run failed.

    Source:
        He et al. 2015, sections 1 and 4.2.
    """
    check_options(seed, stack_depths, steps)
    if epochs < 3:
        raise ArgumentError(f"epochs: needed at least 3, got {epochs}")
    if len(depths) != 2 or not depths[0] < depths[1]:
        raise ArgumentError(f"depths: needed a shallow and then a deeper net, got {', '.join(map(str, depths))}")
    for depth in depths:
        if networks.default_layout(depth) != "cifar":
            raise ArgumentError(
                f"depths: needed 6n+2 of the CIFAR layout (8, 14, 20, 56, …), got {depth}, which names an ImageNet net"
            )
    dataset = load("digits")
    recipe = Recipe(epochs, BATCH_SIZE)
    further = epochs // 3
    stack_layer_cost = _STACK_LAYER_COST * steps / STACK_STEPS
    total = epochs * sum(depths) + further * depths[1] + 3 * sum(stack_depths) * stack_layer_cost
    with _progress(console, total) as advance:
        paradox = _paradox(dataset, seed, depths, recipe, further, advance)
        stacks = train_stacks(
            seed=seed,
            depths=stack_depths,
            steps=steps,
            advance=lambda depth: advance(depth * stack_layer_cost, f"y = x: {depth} layers"),
        )
    return Identity(dataset.summary, seed, recipe.batch_size, recipe.learning_rate, paradox, stacks)


Advance = Callable[[float, str], None]


def _paradox(
    data: Dataset, seed: int, depths: Sequence[int], recipe: Recipe, further: int, advance: Advance
) -> Paradox:
    nets = [build("plain", depth, data.in_channels, data.num_classes) for depth in depths]
    parameters = [networks.count_parameters(net) for net in nets]
    cells = [Cell(id, "plain", depths[id], seed, parameters[id], "pending") for id in (0, 1)]
    # The longer one first, so that it is not left alone at the end.
    jobs = [engines.Job(cells[id], data.spec, recipe) for id in (1, 0)]
    ends = _run(jobs, {}, advance)
    shallow, constructed = nets
    load_state(shallow, ends[0][1])
    extend(shallow, constructed)
    shallow.eval()
    constructed.eval()
    with torch.no_grad():
        difference = max(
            (shallow(x) - constructed(x)).abs().max().item()
            for images in (data.train_x, data.test_x)
            for x in torch.split(images, BATCH_SIZE)
        )
    errors = _measure(constructed, data, by_batch=False)
    by_batch = _measure(constructed, data, by_batch=True)
    # As if its epochs had passed: a third more at most leaves all of the further steps at the last learning rate.
    longer = Recipe(recipe.epochs + further, recipe.batch_size)
    start = save_state(constructed, sgd(constructed, recipe), recipe.epochs, False)
    trained_on = _run([engines.Job(cells[1], data.spec, longer)], {1: start}, advance)
    return Paradox(
        shallow_depth=depths[0],
        deep_depth=depths[1],
        parameters=parameters[1],
        epochs=recipe.epochs,
        further_epochs=further,
        largest_logit_difference=difference,
        shallow=_errors(ends[0][0]),
        constructed=errors,
        by_batch=by_batch,
        trained_on=_errors(trained_on[1][0]),
        scratch=_errors(ends[1][0]),
    )


def _run(jobs: list[engines.Job], states: dict[int, bytes], advance: Advance) -> dict[int, tuple[EpochRow, bytes]]:
    """Trains to the end, and gives the last row and checkpoint of each cell by its id."""
    ends: dict[int, tuple[EpochRow, bytes]] = {}
    for job, result in engines.run_local(jobs, min(len(jobs), engines.cpus()), states.get):
        row = result.epochs[-1]
        ends[job.cell.id] = row, result.state
        missing = job.recipe.epochs - row.epoch if result.status == "diverged" else 0
        text = f"{job.cell.name}: epoch {row.epoch}/{job.recipe.epochs}, train error {row.train_error_pct:.1f} %"
        advance(job.cell.depth * (1 + missing), text)
    return ends


def _measure(model: nn.Module, data: Dataset, *, by_batch: bool) -> NetErrors:
    train_loss, train_error_pct = evaluate(model, data.train_x, data.train_y, by_batch=by_batch)
    _, test_error_pct = evaluate(model, data.test_x, data.test_y, by_batch=by_batch)
    return NetErrors(train_loss, train_error_pct, test_error_pct)


def _errors(row: EpochRow) -> NetErrors:
    return NetErrors(row.train_loss, row.train_error_pct, row.test_error_pct)


@contextmanager
def _progress(console: Console | None, total: float) -> Iterator[Advance]:
    """A bar over all that is trained, weighted by layers; yields what to call after a part."""
    with bar(console) as progress:
        task = progress.add_task("", total=total)
        yield lambda cost, text: progress.update(task, advance=cost, description=text)
