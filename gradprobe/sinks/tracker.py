"""What the sinks of this folder share: how much of each step they write, and how often."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from gradprobe.errors import ArgumentError, printable
from gradprobe.snapshot.metrics import PREFIX, Detail, quantities

if TYPE_CHECKING:
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.snapshot.snapshot import Snapshot

Profile = Mapping[str, Mapping[str, float]]  # quantity -> place -> value, in order of depth


class Tracker(ABC):
    """A sink that writes `Snapshot.metrics()` of each step, now and then a profile over depth, and findings as text.

    A subclass writes the numbers in its tool's way.

    Args:
        detail: "summary" or "all", as for `Snapshot.metrics`.
        every: Write each n-th of the steps that the probe measured.
        profile_every: Add the profile to each n-th of the steps written, from the first on; 0: to none.

    Raises:
        ArgumentError: An argument is invalid.
    """

    _has_exact_names: ClassVar[bool] = False  # otherwise control characters in names are spelled out

    def __init__(self, detail: Detail = "summary", every: int = 1, profile_every: int = 100) -> None:
        if detail not in ("summary", "all"):
            raise ArgumentError(f"detail: needed 'summary' or 'all', got {detail!r}")
        for name, value, least in (("every", every, 1), ("profile_every", profile_every, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name}: needed an integer of at least {least}, got {value!r}")
        self._detail = detail
        self._every = every
        self._profile_every = profile_every
        self._n_seen = 0

    def open(self, about: Mapping[str, object]) -> None:
        """Opens the file or run; see `Sink`."""
        self._open(about)

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Writes a finished step, if it is its turn; see `Sink`."""
        turn, rest = divmod(self._n_seen, self._every)
        self._n_seen += 1
        if rest:
            return
        shown = str if self._has_exact_names else printable
        profile: Profile = {}
        if self._profile_every and turn % self._profile_every == 0:
            profile = {
                quantity: dict(zip(map(shown, names), values.tolist(), strict=True))
                for quantity, names, values in quantities(snapshot)
            }
        numbers = {shown(name): value for name, value in snapshot.metrics(self._detail).items()}
        self._log(step, numbers, profile)

    def tell(self, step: int, finding: Finding) -> None:
        """Writes a finding; see `Sink`."""
        message = finding.message[:1].upper() + finding.message[1:]
        text = f"{message}. Usual cause: {finding.cause}."
        if finding.remedies:
            text += f" Try first: {finding.remedies[0]}."
        self._say(step, finding.title, text if self._has_exact_names else printable(text))

    def close(self) -> None:
        """Closes the file, or the run unless it was open before; see `Sink`."""
        self._close()

    @abstractmethod
    def _open(self, about: Mapping[str, object]) -> None: ...

    @abstractmethod
    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        """Writes the numbers of a step, and its profile if it is not empty."""

    @abstractmethod
    def _say(self, step: int, title: str, text: str) -> None:
        """Writes a finding's title and text."""

    @abstractmethod
    def _close(self) -> None: ...


def library(name: str, sink: str, extra: str) -> Any:
    """Imports the library that a sink needs.

    Args:
        name: Name of the module.
        sink: Name of the sink.
        extra: The extra of gradprobe that installs it.

    Raises:
        ArgumentError: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"sinks: {sink} needs {name.partition('.')[0]}; install it with: pip install 'gradprobe[{extra}]'"
        ) from error


def with_places(numbers: Mapping[str, float], profile: Profile) -> dict[str, float]:
    """Returns the numbers of a step together with those of a profile, under the names of `Snapshot.metrics("all")`."""
    places = {f"{PREFIX}{quantity}/{name}": v for quantity, values in profile.items() for name, v in values.items()}
    return {**numbers, **places}


def plain_settings(about: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Yields the strings, numbers and truth values among the settings of a run, for trackers that keep such.

    Lists, such as the names of the parameters, are left out.

    Example:
        >>> dict(plain_settings({"every": 1, "versions": {"torch": "2.13"}, "parameters": ["0.weight"]}))
        {'every': 1, 'versions/torch': '2.13'}
    """
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from plain_settings(value, f"{prefix}{key}/")
        elif isinstance(value, (str, int, float)):
            yield f"{prefix}{key}", value
