"""What is known of a step before it is closed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from gradprobe.observers.magnitudes import StepMagnitudes
from gradprobe.probe.grad_scaler import LossScale
from gradprobe.snapshot.records import Measured


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to gradients after they were measured, as `Slot` and `FinishedStep` describe it."""

    ratios: tuple[torch.Tensor | float, torch.Tensor | float] = (1.0, 1.0)
    tolerance: float | None = None
    is_unscaled: bool = False


@dataclass(slots=True)
class OpenStep:
    """What is known of the step that is not closed yet.

    Attributes:
        number: Number of the step.
        n_backwards: Backward passes that have ended.
        accumulates: The first of them added to the gradients of the step before.
        measured: Which parameters were measured, None as long as none was.
        measured_after: How many backward passes had ended then.
        magnitudes: How their magnitudes spread, None if they were not counted.
        state: What was known of the gradients then.
        is_averaged: They were averaged over processes.
        scales: The loss scales at the end of the newest backward pass.
        is_unscaled: Gradients were unscaled before they were measured.
        is_partly_unscaled: Not those of all optimizers were.
        clip_factor: Factor by which the probe has clipped the gradients, 0-d.
        change: What was done to the gradients between the backward pass and the end of the optimizer's closure.
        is_written: Something wrote to the gradients after they were measured.
        is_stepped_by_others: An optimizer that was not given has stepped the model since.
        has_missed_forward: What is observed in a forward pass has changed after that of this step.
        losses: Losses given so far.
        is_requested: The user has asked to close the step.
        is_shared: The ranks reduce its gradients.
        has_changed: The parameters have got other hooks in this step, so it is not known which gradients are ready.
    """

    number: int
    n_backwards: int = 0
    accumulates: bool = False
    measured: Measured | None = None
    measured_after: int = 0
    magnitudes: StepMagnitudes | None = None
    state: Literal["raw", "modified"] = "raw"
    is_averaged: bool = False
    scales: list[LossScale] = field(default_factory=list)
    is_unscaled: bool = False
    is_partly_unscaled: bool = False
    clip_factor: torch.Tensor | None = None
    change: Change | None = None
    is_written: bool = False
    is_stepped_by_others: bool = False
    has_missed_forward: bool = False
    losses: list[torch.Tensor | float] = field(default_factory=list)
    is_requested: bool = False
    is_shared: bool = False
    has_changed: bool = False

    def scale_of(self, optimizer: torch.optim.Optimizer | None) -> LossScale | None:
        """Returns the loss scale of the gradients that an optimizer steps, None if they are not scaled."""
        scales = self.scales
        if optimizer is not None and len(scales) > 1:
            return next((scale for scale in scales if scale.belongs_to(optimizer)), scales[0])
        return scales[0] if scales else None

    def unscaled(
        self, optimizers: Collection[torch.optim.Optimizer], stepping: torch.optim.Optimizer | None = None
    ) -> list[bool]:
        """Tells for each optimizer of the model whether the gradients that it steps have been unscaled.

        Args:
            optimizers: Those that are known to step the model; if none is, the one that steps now is asked about.
            stepping: The optimizer that steps now, None if none does.

        Returns:
            One answer for each, none if the gradients are not scaled.
        """
        scale = self.scale_of(stepping)
        if scale is None:
            return []
        return [scale.is_removed_from(each) for each in optimizers] or [scale.is_removed_from(stepping)]


@dataclass(slots=True)
class Recording:
    """Which step is open, and whether it is measured: what the parts of a recorder share.

    Attributes:
        every: Every how many steps one is measured.
        open: The open step.
        n_pauses: Pauses that have not ended.
        is_off: Nothing is measured any more.
        are_gradients_off: No gradients are measured any more.
    """

    every: int
    open: OpenStep
    n_pauses: int = 0
    is_off: bool = False
    are_gradients_off: bool = False

    def is_due(self) -> bool:
        """Returns whether the open step is measured."""
        return self.n_pauses == 0 and self.open.number % self.every == 0 and not self.is_off


def kept(loss: torch.Tensor | float) -> torch.Tensor | float:
    """Returns a loss without its graph, as it is now."""
    return loss.detach().reshape(()).to(torch.float64, copy=True) if isinstance(loss, torch.Tensor) else float(loss)


def mean(losses: Sequence[torch.Tensor | float]) -> torch.Tensor | float:
    """Returns the mean of at least one loss."""
    return sum(losses[1:], start=losses[0]) / len(losses)
