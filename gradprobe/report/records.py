"""The rows that a sweep and a comparison of remedies record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

SPEC_KEY = re.compile(r"spec( \d+)?")
"""Keys of a sweep's metadata that hold the settings of a command as TOML, one for each different command."""

Status = Literal["pending", "done", "diverged"]
"""Status of a cell: epochs are missing, all are recorded, or training stopped at a non-finite training loss."""


Net = tuple[str, int]
"""Family and depth."""


@dataclass(frozen=True)
class Cell:
    """One network of the sweep: a family at a depth with a seed.

    Attributes:
        id: Number of the cell in its file.
        family: Name of a family of `gradprobe.networks`, or a user's function, ``MODULE:CALLABLE``.
        depth: Depth, as the family counts it.
        seed: Seed.
        parameters: Number of trainable parameters.
        status: How far it has come.
        failure: The exception that stopped it; empty if none did since it was last started.
        progress: Share of the steps of the epoch in progress that were done when that was last recorded.
    """

    id: int
    family: str
    depth: int
    seed: int
    parameters: int
    status: Status
    failure: str = ""
    progress: float = 0.0

    @property
    def name(self) -> str:
        """Family and depth, as in the literature: ``plain-56``."""
        return f"{self.family}-{self.depth}"

    @property
    def title(self) -> str:
        """The cell in words, as in "plain-56 seed 0"."""
        return f"{self.name} seed {self.seed}"

    @property
    def net(self) -> Net:
        """Family and depth, which the seeds of a network share."""
        return self.family, self.depth


@dataclass(frozen=True)
class EpochRow:
    """Losses and errors at the end of an epoch; epoch 0 is initialisation. NaN where nothing was measured.

    Attributes:
        epoch: Number of completed epochs.
        train_loss: Loss over the whole training set.
        train_error_pct: Training error, over the whole training set, in percent.
        test_error_pct: Test error, over the whole test set, in percent.
        seconds: Time of the epoch.
        running_loss: Loss of the epoch's steps, each before its update.
        running_error_pct: Running training error: the error of the same steps, in percent. It costs no time, but lags
            behind the training error and is in training mode.
    """

    epoch: int
    train_loss: float
    train_error_pct: float
    test_error_pct: float
    seconds: float
    running_loss: float = math.nan
    running_error_pct: float = math.nan

    @property
    def is_running(self) -> bool:
        """Whether only the running training error was measured."""
        return math.isnan(self.train_error_pct) and not math.isnan(self.running_error_pct)

    @property
    def any_train_error_pct(self) -> float:
        """The training error, or the running one if only that was measured."""
        return self.running_error_pct if self.is_running else self.train_error_pct

    @property
    def any_running_error_pct(self) -> float:
        """The running training error, or the training error if that was not measured, as at epoch 0."""
        return self.train_error_pct if math.isnan(self.running_error_pct) else self.running_error_pct


def measured_by_both(one: EpochRow, other: EpochRow) -> Iterator[tuple[float, float]]:
    """Pairs the numbers that two sweeps measured of the same epoch of the same cell, without times.

    Only some sweeps measure each of the two training errors. The errors tell which: a loss may be NaN.

    Args:
        one: The epoch in one sweep.
        other: The epoch in the other.

    Yields:
        A number of each.

    Example:
        >>> list(measured_by_both(EpochRow(1, 2.3, 90.0, 91.0, 1.0), EpochRow(1, math.nan, math.nan, 91.0, 2.0)))
        [(91.0, 91.0)]
    """
    yield one.test_error_pct, other.test_error_pct
    for error, loss in (("train_error_pct", "train_loss"), ("running_error_pct", "running_loss")):
        errors = getattr(one, error), getattr(other, error)
        if not any(map(math.isnan, errors)):
            yield errors
            yield getattr(one, loss), getattr(other, loss)


@dataclass(frozen=True)
class LayerRow:
    """The gradient of one weight (a parameter of more than one dimension), ordered by depth in ``position``.

    Epoch 0 holds the first step's gradient, epoch e the median over the steps of epoch e; ``nonfinite`` is the largest
    count of any step. ``site`` is the parameter's name.
    """

    epoch: int
    position: int
    site: str
    norm_l2: float
    rms: float
    abs_max: float
    zero_fraction: float
    nonfinite: int
    numel: int


@dataclass(frozen=True)
class JunctionRow:
    """The two parts of the gradient at a residual add in one step, ordered by depth in ``position``.

    ``epoch`` is the number of completed epochs; the step is the first of the next one, so 0 is initialisation. ``site``
    is the residual add's name, and the values are those of `gradprobe.snapshot.Junction`: NaN if a part is missing, as
    behind a shortcut that changes the shape.
    """

    epoch: int
    position: int
    site: str
    shortcut_norm_l2: float
    branch_norm_l2: float
    cosine: float
    shortcut_share: float


@dataclass(frozen=True, slots=True)
class RemedyCell:
    """One remedy on one network; norms are geometric means over the seeds.

    Attributes:
        remedy: Parts of `gradprobe.experiments.remedies.networks.PARTS`, joined by +.
        activation: Activation of every hidden layer.
        depth: Number of weight layers.
        norms: Norm of each weight's gradient at initialisation, from the input to the loss, after clipping if the
            remedy clips. Zero if it is zero for one seed.
        total_norm: Norm of the gradient of all parameters at initialisation.
        factor: Factor of the norm per hidden layer towards the input, from a line through the log-norms; NaN if no line
            fits.
        std_error: Standard error of the factor.
        theory: Predicted factor for wide layers and groups; None if there is no prediction.
        verdict: Verdict on the gradient, residual adds and loss at initialisation; the most severe of the seeds.
        start_loss: Loss over the training set, mean over the seeds, normalised by batch statistics.
        final_loss: The same after training.
        n_fell: Number of seeds whose loss fell.
        nan_after: For each seed whose loss became NaN or infinite, the number of steps completed before that.
        variances: Mean square of the signal at initialisation, behind the first layer and behind each residual add;
            empty if there is none.
        expected_variances: Its prediction for wide layers; empty if there is none.
    """

    remedy: str
    activation: str
    depth: int
    norms: tuple[float, ...]
    total_norm: float
    factor: float
    std_error: float
    theory: float | None
    verdict: str
    start_loss: float
    final_loss: float
    n_fell: int
    nan_after: tuple[int, ...]
    variances: tuple[float, ...] = ()
    expected_variances: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """The first norm over the last; NaN if the last is zero."""
        return self.norms[0] / self.norms[-1] if self.norms[-1] else math.nan

    @property
    def growth(self) -> float | None:
        """Variance of the signal behind the last residual add over that behind the first layer, if it was measured."""
        return self.variances[-1] / self.variances[0] if self.variances else None

    @property
    def expected_growth(self) -> float | None:
        """Its prediction, if there is one."""
        return self.expected_variances[-1] / self.expected_variances[0] if self.expected_variances else None


class SweepRun(Protocol):
    """A recorded sweep, such as `gradprobe.experiments.sweep.store.Run`."""

    @property
    def config(self) -> Mapping[str, object]:
        """Settings that all cells share: data, epochs, recipe."""

    @property
    def meta(self) -> Mapping[str, str]:
        """The file's metadata: versions, creation time."""

    def cells(self) -> Sequence[Cell]:
        """Returns all planned cells."""

    def epochs(self, cell_id: int, /) -> Sequence[EpochRow]:
        """Returns the recorded epochs of a cell."""

    def layers(self, cell_id: int, epoch: int, /) -> Sequence[LayerRow]:
        """Returns the gradients of a cell's weights in one epoch."""

    def junctions(self, cell_id: int, epoch: int, /) -> Sequence[JunctionRow]:
        """Returns the residual adds of a cell in its first step after ``epoch`` completed epochs."""
