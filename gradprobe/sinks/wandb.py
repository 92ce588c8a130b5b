"""Logs steps to Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradprobe.errors import warn_user
from gradprobe.sinks.tracker import Profile, Tracker, library, plain_settings
from gradprobe.snapshot.metrics import PREFIX, Detail

_STEP = f"{PREFIX}step"
_LONGEST_TITLE = 63  # characters of an alert's title
_PATIENCE = 100  # steps without a row of the trainer


class WandB(Tracker):
    """Logs steps to the W&B run that is open when the first step is written, or else to a run of its own.

    The charts have an axis of their own, `gradprobe/step`. Findings become alerts, and profiles become line charts of
    log10 over depth.

    W&B drops rows whose step is behind the newest row's, so a row that the sink adds can cost the trainer one of its
    own. In a run that was open before, the numbers therefore join the row that the trainer logs next, without a step:
    each row of the trainer gets the newest step of the probe. Such a run is not closed.

    Args:
        run: The run to log to. None: `wandb.run`, or a new run.
        own_rows: In a run that was open before, write a row for each step. Only for trainers that never call
            `log(..., step=...)`.
        project: Project of the new run. None: W&B's default.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`.

    Raises:
        ArgumentError: wandb is not installed, or an argument is invalid.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        own_rows: bool = False,
        project: str | None = None,
        detail: Detail = "summary",
        every: int = 1,
        profile_every: int = 100,
    ) -> None:
        super().__init__(detail, every, profile_every)
        self._wandb = library("wandb", "WandB", "wandb")
        # W&B ends its process at exit: started before the training, it ends after whatever the probe registers
        self._wandb.setup()
        self._run = run
        self._has_own_rows = own_rows
        self._project = project
        self._is_own_run = False
        self._n_waiting = 0  # steps since the trainer's newest row
        self._row = -1

    def _open(self, about: Mapping[str, object]) -> None:
        if self._run is None:
            self._run = self._wandb.run
        if self._run is None:
            # "create_new" leaves wandb.run alone, which a trainer may set later
            self._run = self._wandb.init(project=self._project, job_type="gradprobe", reinit="create_new")
            self._is_own_run = True
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric(f"{PREFIX}*", step_metric=_STEP)
        self._run.config.update({"gradprobe": dict(plain_settings(about))}, allow_val_change=True)

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        row: dict[str, object] = {**numbers, _STEP: step}
        for quantity, values in profile.items():
            data = [
                [depth, name, math.log10(value) if 0 < value < math.inf else None, value]
                for depth, (name, value) in enumerate(values.items())
            ]
            table = self._wandb.Table(columns=["depth", "name", f"log10 {quantity}", quantity], data=data)
            title = f"{quantity} over depth"
            row[f"{PREFIX}profile/{quantity}"] = self._wandb.plot.line(table, "depth", f"log10 {quantity}", title=title)
        if self._is_own_run or self._has_own_rows:
            self._run.log(row)
            return
        self._run.log(row, commit=False)
        self._n_waiting = self._n_waiting + 1 if self._run.step == self._row else 0
        self._row = self._run.step
        if self._n_waiting == _PATIENCE:
            warn_user(
                f"the sink WandB waits for a row of the trainer for {_PATIENCE} steps, and only the newest is kept. "
                "With WandB(own_rows=True), each step gets a row of its own"
            )

    def _say(self, step: int, title: str, text: str) -> None:
        self._run.alert(title[:_LONGEST_TITLE], f"Step {step}: {text}", level=self._wandb.AlertLevel.WARN)

    def _close(self) -> None:
        if self._is_own_run:
            self._run.finish()
