"""Logs steps to Trackio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradprobe.sinks.tracker import Profile, Tracker, library, plain_settings
from gradprobe.snapshot.metrics import PREFIX, Detail


class Trackio(Tracker):
    """Logs steps to a Trackio run: the one that is open when the sink is made, or else a new one.

    Findings become alerts, and profiles become tables. A run that was open before is not finished; if its trainer logs
    without `step=`, Trackio counts on from the newest step of the probe.

    Args:
        run: The run to log to, as from `trackio.init`. None: the one that is open, or a new run.
        project: Project of the new run.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`.

    Raises:
        ArgumentError: trackio is not installed, or an argument is invalid.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        project: str = "gradprobe",
        detail: Detail = "summary",
        every: int = 1,
        profile_every: int = 100,
    ) -> None:
        super().__init__(detail, every, profile_every)
        self._trackio = library("trackio", "Trackio", "trackio")
        # here, since Trackio's current run is that of a context, so of a thread
        current = library("trackio.context_vars", "Trackio", "trackio").current_run.get()
        self._run = current if run is None else run
        self._project = project
        self._is_own_run = False

    def _open(self, about: Mapping[str, object]) -> None:
        if self._run is None:
            config = {"gradprobe": dict(plain_settings(about))}
            self._run = self._trackio.init(project=self._project, config=config, embed=False)
            self._is_own_run = True

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        row: dict[str, object] = dict(numbers)
        for quantity, values in profile.items():
            data = [
                {"depth": depth, "name": name, quantity: value if math.isfinite(value) else str(value)}
                for depth, (name, value) in enumerate(values.items())
            ]
            row[f"{PREFIX}profile/{quantity}"] = self._trackio.Table(data=data)
        self._run.log(row, step=step)

    def _say(self, step: int, title: str, text: str) -> None:
        self._run.alert(title, text, level=self._trackio.AlertLevel.WARN, step=step)

    def _close(self) -> None:
        if self._is_own_run:
            self._run.finish()
