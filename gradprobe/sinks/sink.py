"""What a sink is: a place that finished steps and findings go to while the training runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.snapshot.snapshot import Snapshot


class Sink(Protocol):
    """A place that finished steps and findings go to, such as a file or an experiment tracker.

    A `Feed` calls the methods one after another, all in one thread of its own. They may block and raise: the training
    does not notice, and a sink that raised gets `close` and nothing more.
    """

    def open(self, about: Mapping[str, object]) -> None:
        """Prepares for writing; called once, before anything else.

        Args:
            about: What is the same for all steps: options, versions, names of the parameters.
        """

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Writes a finished step.

        Args:
            step: Its number as the trainer counts; `Snapshot.step` counts from `attach`.
            snapshot: The step.
        """

    def tell(self, step: int, finding: Finding) -> None:
        """Writes a finding.

        Args:
            step: Number of the step at which it was found.
            finding: The finding.
        """

    def close(self) -> None:
        """Writes what is left and lets go of files and runs; called once, at the end."""
