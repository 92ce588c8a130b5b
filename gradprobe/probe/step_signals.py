"""Observes the activations and residual adds of the open step, also when the model gets other residual adds."""

from __future__ import annotations

from collections.abc import Callable

from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.signals import SignalObserver
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.history import History
from gradprobe.probe.open_step import Recording
from gradprobe.probe.signal_choice import SignalChoice


class StepSignals:
    """Observes what a `SignalChoice` chooses.

    Attributes:
        observer: Has the hooks; None if nothing is observed.

    Args:
        recording: Knows the open step.
        choice: The activations and residual adds.
        every: Every how many steps they are measured; `activations_every` of `attach`.
        gradients: The observer of gradients, on whose device the rows lie.
        restart: Called when the history has to take rows of other sites.
        history: Takes the rows.
        coverage: Is told what is observed.
        fence: Takes the errors.

    Raises:
        BackendError: The back end cannot run on the model's device.
    """

    def __init__(
        self,
        recording: Recording,
        choice: SignalChoice,
        every: int,
        gradients: GradientObserver,
        restart: Callable[[], None],
        history: History,
        coverage: CoverageLog,
        fence: Fence,
    ) -> None:
        self._recording = recording
        self._choice = choice
        self._every = every
        self._gradients = gradients
        self._restart = restart
        self._history = history
        self._coverage = coverage
        self._fence = fence
        self._are_new = False  # the model has other residual adds than at the start of the open step
        self._are_agreed_on = False  # the ranks reduce them, so they must stay the same
        self._is_released = False
        self.observer: SignalObserver | None = None
        self._observe()

    def take_up(self) -> None:
        """Follows the model if it has other residual adds than before, in the next step if this one has begun."""
        if self._is_released or self._recording.is_off or not self._choice.is_outdated():
            return
        opened = self._recording.open
        if self._are_agreed_on:
            self._coverage.note_unfollowed(opened.number, "it has other residual adds")
            return
        self._are_new = opened.n_backwards > 0
        if not self._are_new:
            with self._fence.around("activations and residual adds", self.remove):
                self._follow()

    def take_up_late(self) -> None:
        """Follows the model now that the step before has its update and loss, and nothing of this one is measured."""
        opened = self._recording.open
        if self._are_new and opened.n_backwards == 0 and opened.measured is None:
            opened.has_missed_forward = True
            self.take_up()

    def agree(self) -> None:
        """Notes that the ranks reduce the residual adds, which must then stay the same."""
        self._are_agreed_on = True

    def are_due(self) -> bool:
        """Returns whether activations and residual adds are measured in the open step."""
        is_turn = self._recording.open.number % self._every == 0
        return self._recording.is_due() and is_turn and not self._recording.open.has_missed_forward

    def switch(self) -> None:
        """Switches the hooks on if they are due in the open step, else off."""
        if self.observer is not None and not self._is_released:
            self.observer.set_enabled(self.are_due(), self._recording.open.number)

    def remove(self) -> None:
        """Removes the hooks."""
        if self.observer is not None:
            self.observer.remove()
            self.observer = None

    def release(self) -> None:
        """Removes the hooks, for good; what they have seen can still be read."""
        self._is_released = True
        if self.observer is not None:
            self.observer.remove()

    def _follow(self) -> None:
        self._are_new = False
        self.remove()
        self._history.archive()
        self._choice.choose()
        self._history.signals = self._choice.table
        self._restart()
        self._observe()
        self.switch()

    def _observe(self) -> None:
        device = next(iter(self._gradients.meter.rows_on))
        self.observer = self._choice.observe(device, self._fence)
        self._coverage.follow_signals(self.observer, self._choice.unobserved)
