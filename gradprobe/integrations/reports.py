"""What a trainer logs of its probe: the newest measured step, and each finding once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradprobe.errors import ArgumentError, warn_user

if TYPE_CHECKING:
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.probe.probe import Probe
    from gradprobe.snapshot.metrics import Detail


class Reports:
    """Reads a probe at the pace at which its trainer logs.

    Reading waits for the device, as trainers do when they log a loss.

    Attributes:
        probe: The probe.
        told: Titles of the findings that were told.

    Args:
        probe: The probe.
        n_steps: Number of steps that the training has made so far.
        detail: As in `Snapshot.metrics`.
        is_strict: Raise the errors of reading and logging. Otherwise the first is reported, and ends the logging.
        told: Findings that were told before.
    """

    def __init__(self, probe: Probe, n_steps: int, detail: Detail, is_strict: bool, told: Iterable[str] = ()) -> None:
        self.probe = probe
        self.told = set(told)
        self._n_steps = n_steps
        self._detail: Detail = detail
        self._is_strict = is_strict
        self._reported = -1
        self._is_off = False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keeps the errors of the block from the training."""
        try:
            yield
        except Exception as error:
            if self._is_strict:
                raise
            if not self._is_off:
                self._is_off = True
                warn_user(
                    f"logging what the probe measures failed and is switched off; the training and the probe go on. "
                    f"{type(error).__name__}: {error}. With strict=True, the error is raised"
                )

    def is_due(self, n_steps: int, every: int) -> bool:
        """Returns whether the training has reached another multiple of `every` steps, once for each.

        Args:
            n_steps: Number of steps of the training so far.
            every: Number of steps from one report to the next, 0 for none.
        """
        is_due = not self._is_off and every > 0 and n_steps // every > self._n_steps // every
        self._n_steps = n_steps
        return is_due

    def newest(self) -> tuple[int, dict[str, float]] | None:
        """Returns the number of the newest measured step with its metrics, None if there is no new one."""
        snapshot = None if self._is_off else self.probe.latest(wait=True)
        if snapshot is None or snapshot.step <= self._reported:
            return None
        self._reported = snapshot.step
        return snapshot.step, snapshot.metrics(self._detail)

    def findings(self) -> list[Finding]:
        """Returns the findings that were not told yet."""
        if self._is_off:
            return []
        new = [finding for finding in self.probe.findings() if finding.title not in self.told]
        self.told.update(finding.title for finding in new)
        return new


def sentence(finding: Finding) -> str:
    """Returns a finding as a line of a log."""
    remedy = f"It is explained by: {finding.follows}." if finding.follows else f"Try first: {finding.remedies[0]}."
    return f"gradprobe: {finding.title}: {finding.message}. {remedy}"


def check_options(options: Mapping[str, object], taken: Iterable[str]) -> None:
    """Raises ArgumentError if the options for `attach` hold one that the trainer knows better."""
    for name in taken:
        if name in options:
            raise ArgumentError(f"{name}: needed none, since it comes from the trainer, got {options[name]!r}")


def missing(package: str) -> ArgumentError:
    """Returns the error that says how to install a library."""
    return ArgumentError(f"{package}: needed the library, which is not installed: pip install 'gradprobe[{package}]'")
