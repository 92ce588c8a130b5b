"""The result of `identity`: errors, conclusions, and printed tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe.experiments.identity.stacks import Stacks

# Training errors that differ by less than this are called equal, in percentage points.
AS_GOOD_PP = 1.0


@dataclass(frozen=True, slots=True)
class NetErrors:
    """A network's loss and errors (in percent) over the full sets."""

    train_loss: float
    train_error_pct: float
    test_error_pct: float


@dataclass(frozen=True, slots=True)
class Paradox:
    """A shallow network, the same network with identity layers, and the deep network trained from scratch.

    Attributes:
        shallow_depth: Depth of the shallow network, in layers.
        deep_depth: Depth of the deep networks, in layers.
        parameters: Number of parameters of the deep networks.
        epochs: Training epochs of the shallow network and of the one from scratch.
        further_epochs: Additional epochs of the constructed network, at the last learning rate.
        largest_logit_difference: Largest difference between the logits of the shallow and the constructed network, over
            all training and test images.
        shallow: Errors of the trained shallow network.
        constructed: Errors of the shallow network with identity layers.
        by_batch: The same, normalised by batch statistics as in training instead of running averages.
        trained_on: Errors of the constructed network after the further epochs.
        scratch: Errors of the deep network trained from scratch.
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
        """The conclusions from the numbers, in sentences."""
        shallow, deep = f"plain-{self.shallow_depth}", f"plain-{self.deep_depth}"
        added = self.deep_depth - self.shallow_depth
        limit, reached = self.shallow.train_error_pct, self.scratch.train_error_pct
        first = f"{shallow} with {added} identity layers added has the same logits (largest difference "
        first += f"{self.largest_logit_difference:.1g})"
        if self.constructed.train_error_pct == limit and self.constructed.test_error_pct == self.shallow.test_error_pct:
            first += f" and errors: a {deep} exists that is as good as {shallow}."
        else:
            first += f", but a training error of {self.constructed.train_error_pct:.1f} % instead of {limit:.1f} %."
        compared = f"{reached:.1f} % against {limit:.1f} % training error"
        if reached > limit + AS_GOOD_PP:
            second = (
                f"Trained from scratch with the same recipe, {deep} does not find one: {compared}. "
                "This is not overfitting, since the training error itself is higher."
            )
        elif reached < limit - AS_GOOD_PP:
            second = f"Trained from scratch with the same recipe, {deep} is better: {compared}."
        else:
            second = f"Trained from scratch with the same recipe, {deep} is as good: {compared}."
        before, batch, after = (row.train_error_pct for row in (self.constructed, self.by_batch, self.trained_on))
        third = ""
        if batch > before + AS_GOOD_PP:
            third += (
                "Training normalises by batch statistics, under which the added layers are not identities: "
                f"{batch:.1f} % before the first step. "
            )
        third += (
            f"{self.further_epochs} more epochs at the last learning rate take the constructed network's training "
            f"error from {before:.1f} to {after:.1f} % (loss {self.constructed.train_loss:.2g} to "
            f"{self.trained_on.train_loss:.2g}): "
        )
        if after > before + AS_GOOD_PP:
            third += "training leaves the better solution."
        else:
            third += f"training stays within {AS_GOOD_PP:g} point of the better solution."
        return (first, second, third)


@dataclass(frozen=True, slots=True)
class Identity:
    """The result of `identity`; prints as two tables with their conclusions.

    Attributes:
        data: The training data, in one line.
        seed: Seed of all random numbers.
        batch_size: Images per step.
        learning_rate: Initial learning rate, divided by 10 at 50 % and at 75 % of the steps.
        paradox: The constructed network and those that it is compared with.
        stacks: Stacks that learned y = x, by depth.
    """

    data: str
    seed: int
    batch_size: int
    learning_rate: float
    paradox: Paradox
    stacks: Stacks

    def as_dict(self) -> dict[str, object]:
        """Converts the result to plain data, with the conclusions."""
        values = asdict(self)
        values["paradox"]["conclusions"] = list(self.paradox.conclusions)
        values["stacks"] = self.stacks.as_dict()
        return values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        paradox, stacks = self.paradox, self.stacks
        shallow, deep = f"plain-{paradox.shallow_depth}", f"plain-{paradox.deep_depth}"
        table = Table(
            "network",
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
            ("  normalised by batch statistics, as in training", paradox.by_batch),
            (f"  after {paradox.further_epochs} more epochs", paradox.trained_on),
            (f"{deep} from scratch, {paradox.epochs} epochs", paradox.scratch),
        ):
            table.add_row(name, f"{row.train_loss:.3g}", f"{row.train_error_pct:.1f}", f"{row.test_error_pct:.1f}")
        yield table
        yield Text(
            f"{self.data}; seed {self.seed}, batch {self.batch_size}, SGD at {self.learning_rate:g}, divided by 10 at "
            f"50 and 75 % of the steps; {paradox.parameters:,} parameters in {deep}"
        )
        yield from (Text(sentence) for sentence in paradox.conclusions)
        yield Text()
        kinds = (("plain", "he"), ("residual", "he"), ("residual", "zero"))
        table = Table("layers", title="Learning y = x: loss, and distance of the layers from the identity")
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
