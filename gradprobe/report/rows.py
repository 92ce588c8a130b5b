"""What a report reads of a sweep: the shape of the rows, so that this stage knows no store and no experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class CellRow(Protocol):
    """One training run of the sweep: a network family at a depth with a seed."""

    @property
    def id(self) -> int:
        """Key of the cell in its run."""

    @property
    def family(self) -> str:
        """Name of the network's family."""

    @property
    def depth(self) -> int:
        """Depth in weight layers, as the family counts them."""

    @property
    def seed(self) -> int:
        """Seed of initialisation and data order."""

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""

    @property
    def status(self) -> str:
        """One of "pending", "done" and "diverged" (its training loss became non-finite and it stopped)."""


class EpochRow(Protocol):
    """Loss and errors after one epoch; epoch 0 is the network before its first step."""

    @property
    def epoch(self) -> int:
        """Number of the epoch."""

    @property
    def train_loss(self) -> float:
        """Mean loss on the training set."""

    @property
    def train_error_pct(self) -> float:
        """Wrong answers on the training set, in percent."""

    @property
    def test_error_pct(self) -> float:
        """Wrong answers on the test set, in percent."""

    @property
    def seconds(self) -> float:
        """Time that the epoch took."""


class LayerRow(Protocol):
    """Gradient of one weight tensor; epoch 0 is the first step, epoch e the median over the steps of epoch e."""

    @property
    def position(self) -> int:
        """Place in depth order, the layer next to the input first."""

    @property
    def site(self) -> str:
        """Name of the weight."""

    @property
    def norm_l2(self) -> float:
        """L2 norm of the gradient."""

    @property
    def rms(self) -> float:
        """Root of the gradient's mean square."""

    @property
    def abs_max(self) -> float:
        """Largest magnitude in the gradient."""

    @property
    def zero_fraction(self) -> float:
        """Share of exact zeros."""

    @property
    def nonfinite(self) -> int:
        """Number of NaN and infinite elements."""

    @property
    def numel(self) -> int:
        """Number of elements."""


class JunctionRow(Protocol):
    """The two parts of the gradient at a residual junction, in one step; NaN where there is nothing to compare."""

    @property
    def epoch(self) -> int:
        """Epochs done before the step, which is the first of the next one."""

    @property
    def position(self) -> int:
        """Place in depth order, the junction next to the input first."""

    @property
    def site(self) -> str:
        """Name of the junction."""

    @property
    def shortcut_norm_l2(self) -> float:
        """L2 norm of the part that arrives by the shortcut."""

    @property
    def branch_norm_l2(self) -> float:
        """L2 norm of the part that arrives through the branch."""

    @property
    def cosine(self) -> float:
        """Of the angle between the two parts."""

    @property
    def shortcut_share(self) -> float:
        """Norm of the shortcut's part over the sum of both norms."""


class SweepRun(Protocol):
    """A recorded sweep. `gradprobe.experiments.store.Run` has this shape; so may any other source of rows."""

    @property
    def config(self) -> Mapping[str, object]:
        """What all cells share: the data, the epochs, the recipe."""

    @property
    def meta(self) -> Mapping[str, str]:
        """What the file says of itself: versions, creation time."""

    def cells(self) -> Sequence[CellRow]:
        """All planned cells."""

    def epochs(self, cell_id: int, /) -> Sequence[EpochRow]:
        """The recorded epochs of a cell."""

    def layers(self, cell_id: int, epoch: int, /) -> Sequence[LayerRow]:
        """The gradients of a cell's weights in one epoch."""

    def junctions(self, cell_id: int, epoch: int, /) -> Sequence[JunctionRow]:
        """The residual junctions of a cell in its first step after so many epochs."""
