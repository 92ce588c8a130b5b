"""The rows that a sweep and a comparison of remedies record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["pending", "done", "diverged"]
"""Status of a cell: epochs are missing, all are recorded, or training stopped at a non-finite training loss."""


@dataclass(frozen=True)
class Cell:
    """One network of the sweep: a family at a depth with a seed."""

    id: int
    family: str
    depth: int
    seed: int
    parameters: int
    status: Status

    @property
    def name(self) -> str:
        """Family and depth, as in the literature: ``plain-56``."""
        return f"{self.family}-{self.depth}"


@dataclass(frozen=True)
class EpochRow:
    """Loss and errors (in percent, over the full sets) at the end of an epoch; epoch 0 is initialisation."""

    epoch: int
    train_loss: float
    train_error_pct: float
    test_error_pct: float
    seconds: float


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

    @property
    def ratio(self) -> float:
        """The first norm over the last; NaN if the last is zero."""
        return self.norms[0] / self.norms[-1] if self.norms[-1] else math.nan


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
