"""Logs steps to MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from gradprobe.sinks.tracker import Profile, Tracker, library, plain_settings
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.metrics import PREFIX, Detail

_REFUSED = re.compile(r"[^\w.\- ]")  # characters that names of metrics and tags may not hold
_LONGEST_NAME = 250
_LONGEST_TEXT = 5000
_BATCH = 1000
_TAG_BATCH = 100


class MLflow(Tracker):
    """Logs steps to an MLflow run: the one that is active when the sink is made, or else a new one.

    Findings become tags, and profiles become JSON artifacts. Characters that MLflow does not allow in names are
    replaced by underscores. A run that was active before is not ended.

    Args:
        run_id: The run to log to. None: `mlflow.active_run()`, or a new run.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`.

    Raises:
        ArgumentError: mlflow is not installed, or an argument is invalid.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        detail: Detail = "summary",
        every: int = 1,
        profile_every: int = 100,
    ) -> None:
        super().__init__(detail, every, profile_every)
        self._mlflow = library("mlflow", "MLflow", "mlflow")
        # here, since MLflow's active run is that of a thread
        active = self._mlflow.active_run() if run_id is None else None
        self._run_id = run_id if active is None else active.info.run_id
        self._is_own_run = False

    def _open(self, about: Mapping[str, object]) -> None:
        self._client = self._mlflow.MlflowClient()
        if self._run_id is None:
            # named, since MLflow's own names would take numbers from Python's generator, which the training may use
            self._run_id = self._mlflow.start_run(run_name=time.strftime("gradprobe-%Y%m%d-%H%M%S")).info.run_id
            self._is_own_run = True
        tags = [self._mlflow.entities.RunTag(*_tag(key, str(value))) for key, value in plain_settings(about)]
        for first in range(0, len(tags), _TAG_BATCH):
            self._client.log_batch(self._run_id, tags=tags[first : first + _TAG_BATCH])

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        now = int(time.time() * 1000)
        entities = self._mlflow.entities
        metrics = [entities.Metric(_allowed(name), value, now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _BATCH])
        if profile:
            values = {quantity: strict(dict(places)) for quantity, places in profile.items()}
            self._client.log_dict(self._run_id, {"step": step, **values}, f"{PREFIX}profile_{step:08d}.json")

    def _say(self, step: int, title: str, text: str) -> None:
        self._client.set_tag(self._run_id, *_tag(f"finding/{title}", f"Step {step}: {text}"))

    def _close(self) -> None:
        if self._is_own_run:
            self._mlflow.end_run()


def _tag(name: str, text: str) -> tuple[str, str]:
    return _allowed(PREFIX + name), text[:_LONGEST_TEXT]


def _allowed(name: str) -> str:
    """Replaces what MLflow refuses in `gradprobe/quantity/place`, and slashes in the place: names can be file paths."""
    parts = (_REFUSED.sub("_", part) for part in name.split("/", 2))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_LONGEST_NAME]
