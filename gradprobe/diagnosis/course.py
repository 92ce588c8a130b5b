"""The losses and total norms of a run, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from gradprobe.diagnosis.thresholds import Thresholds

Point = tuple[int, float]  # step and value


@dataclass(slots=True)
class Course:
    """The first losses of a run, the newest losses and total norms, and how many steps there were.

    Attributes:
        n_first: Number of first losses to keep.
        n_kept: Number of newest losses and norms to keep.
        first_losses: Step and loss of the first steps with a loss.
        losses: The same of the newest steps.
        norms: Step and total norm of the newest steps.
        n_steps: Number of steps with a gradient.
        n_losses: Number of steps with a loss.
    """

    n_first: int
    n_kept: int
    first_losses: list[Point] = field(default_factory=list)
    losses: deque[Point] = field(init=False)
    norms: deque[Point] = field(init=False)
    n_steps: int = 0
    n_losses: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.n_kept)
        self.norms = deque(maxlen=self.n_kept)

    @classmethod
    def under(cls, limits: Thresholds) -> Course:
        """Returns an empty course of the length that the rules need."""
        return cls(limits.window, limits.spike_window + limits.n_recent)

    def add_losses(self, points: Iterable[Point]) -> None:
        """Appends the losses of the next steps."""
        for point in points:
            self.n_losses += 1
            self.losses.append(point)
            if len(self.first_losses) < self.n_first:
                self.first_losses.append(point)

    def copy(self) -> Course:
        """Returns an independent copy."""
        twin = Course(self.n_first, self.n_kept, list(self.first_losses))
        twin.losses, twin.norms = self.losses.copy(), self.norms.copy()
        twin.n_steps, twin.n_losses = self.n_steps, self.n_losses
        return twin
