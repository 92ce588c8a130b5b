"""Writes steps to an event file of TensorBoard."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gradprobe.sinks.tracker import Profile, Tracker, library, plain_settings
from gradprobe.snapshot.files import create_folder
from gradprobe.snapshot.metrics import PREFIX, Detail

_RUN = "gradprobe"  # the folder's name is the run's
_N_BINS = 30
_numbers = itertools.count()  # of the event files of this process


class TensorBoard(Tracker):
    """Writes steps to a new event file in `FOLDER/gradprobe`; the folder may be the trainer's.

    TensorBoard follows one growing file per folder, so a second one beside the trainer's would stop its charts.
    Profiles become histograms of log10 over the places of the model, and findings become text.

    Args:
        folder: The folder; it is created if it does not exist.
        detail: As for `Tracker`.
        every: As for `Tracker`.
        profile_every: As for `Tracker`.

    Raises:
        ArgumentError: tensorboard is not installed, or an argument is invalid.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        detail: Detail = "summary",
        every: int = 1,
        profile_every: int = 100,
    ) -> None:
        super().__init__(detail, every, profile_every)
        proto = "tensorboard.compat.proto"
        self._events = library(f"{proto}.event_pb2", "TensorBoard", "tensorboard")
        self._summaries = library(f"{proto}.summary_pb2", "TensorBoard", "tensorboard")
        self._texts = library("tensorboard.plugins.text.summary_v2", "TensorBoard", "tensorboard")
        self._records = library("tensorboard.summary.writer.record_writer", "TensorBoard", "tensorboard")
        self._folder = Path(folder) / _RUN
        self._writer: Any = None

    def _open(self, about: Mapping[str, object]) -> None:
        create_folder(self._folder)
        owner = f"{socket.gethostname()}.{os.getpid()}.gradprobe{next(_numbers)}"
        file = (self._folder / f"events.out.tfevents.{time.time():010.0f}.{owner}").open("xb")
        self._writer = self._records.RecordWriter(file)
        self._add(self._events.Event(file_version="brain.Event:2"))
        lines = "\n".join(f"| {key} | {value} |" for key, value in plain_settings(about))
        if lines:
            self._write_text(0, f"{PREFIX}about", f"| setting | value |\n|---|---|\n{lines}")

    def _log(self, step: int, numbers: Mapping[str, float], profile: Profile) -> None:
        summary = self._summaries.Summary()
        for name, value in numbers.items():
            summary.value.add(tag=name, simple_value=value)
        for quantity, values in profile.items():
            numbers_of = np.array([value for value in values.values() if 0 < value < np.inf])
            if len(numbers_of):
                summary.value.add(tag=f"{PREFIX}profile/{quantity}_log10", histo=self._histogram(np.log10(numbers_of)))
        self._add(self._events.Event(step=step, summary=summary))

    def _say(self, step: int, title: str, text: str) -> None:
        self._write_text(step, f"{PREFIX}findings/{title}", text)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()  # errors then come from the step that is not written

    def _write_text(self, step: int, tag: str, text: str) -> None:
        self._add(self._events.Event(step=step, summary=self._texts.text_pb(tag, text)))

    def _histogram(self, values: Any) -> Any:
        counts, edges = np.histogram(values, bins=_N_BINS)
        return self._summaries.HistogramProto(
            min=values.min(),
            max=values.max(),
            num=len(values),
            sum=values.sum(),
            sum_squares=(values**2).sum(),
            # the first bin is everything below the smallest value
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        )
