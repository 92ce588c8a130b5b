"""What a sweep records, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Cell:
    """One network of the sweep.

    ``status`` is ``"pending"`` (epochs are missing), ``"done"``, or ``"diverged"`` (its training loss became
    non-finite, and it stopped in that epoch, the last one recorded).
    """

    id: int
    family: str
    depth: int
    seed: int
    parameters: int
    status: str

    @property
    def name(self) -> str:
        """Family and depth, as in the literature: ``plain-56``."""
        return f"{self.family}-{self.depth}"


@dataclass(frozen=True)
class EpochRow:
    """What an epoch ended with; epoch 0 is the network at initialisation. Errors are percentages over the full sets."""

    epoch: int
    train_loss: float
    train_error_pct: float
    test_error_pct: float
    seconds: float


@dataclass(frozen=True)
class LayerRow:
    """The gradient of one weight (more than one dimension), in depth order by ``position``.

    Epoch 0 holds the first step's gradient, epoch e the median over the steps of epoch e; ``nonfinite`` is the largest
    count of any step.
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
    """The two parts of the gradient at a residual junction in one step, in depth order by ``position``.

    ``epoch`` counts the epochs done before the step, which is the first of the next epoch: 0 is at initialisation. What
    the values are: `gradprobe.snapshot.Junction`. NaN stands where a part is missing, as behind a shortcut that changes
    the shape.
    """

    epoch: int
    position: int
    site: str
    shortcut_norm_l2: float
    branch_norm_l2: float
    cosine: float
    shortcut_share: float


class SweepRun(Protocol):
    """A recorded sweep. `gradprobe.experiments.sweep.store.Run` has this shape; so may any other source of rows."""

    @property
    def config(self) -> Mapping[str, object]:
        """What all cells share: the data, the epochs, the recipe."""

    @property
    def meta(self) -> Mapping[str, str]:
        """What the file says of itself: versions, creation time."""

    def cells(self) -> Sequence[Cell]:
        """All planned cells."""

    def epochs(self, cell_id: int, /) -> Sequence[EpochRow]:
        """The recorded epochs of a cell."""

    def layers(self, cell_id: int, epoch: int, /) -> Sequence[LayerRow]:
        """The gradients of a cell's weights in one epoch."""

    def junctions(self, cell_id: int, epoch: int, /) -> Sequence[JunctionRow]:
        """The residual junctions of a cell in its first step after so many epochs."""
