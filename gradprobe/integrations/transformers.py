"""A callback for the Trainer of transformers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gradprobe.errors import warn_user
from gradprobe.integrations.reports import Reports, check_options, missing, sentence
from gradprobe.probe.probe import Probe, attach

try:
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise missing("transformers") from error

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gradprobe.snapshot.metrics import Detail

_log = logging.get_logger("transformers.gradprobe")
_PREFIX = "gradprobe/"


class GradProbeCallback(TrainerCallback):
    """Attaches a probe for the training, and adds what it measures to the trainer's logs, which `report_to` then shows.

    Gradients are those before clipping, of all micro-batches of a step together; the loss of a step is the one that the
    trainer takes, in each process its own. The number of a step is the `global_step` at which the trainer logs it: 1
    for the first, and from a checkpoint on, too. When the trainer logs, every `logging_steps`, the newest measured step
    is added to its logs, with its number as `gradprobe/step`. New findings are logged as warnings, and their number so
    far is `gradprobe/findings`. Only the first rank logs. The numbers are not printed.

    Attributes:
        probe: The probe, None before the training starts. It stays readable afterwards.

    Args:
        detail: Which numbers to log, as in `Snapshot.metrics`.
        options: Further options of `gradprobe.attach`; the trainer gives `optimizer` and `start_step`.

    Raises:
        ArgumentError: An option is given that the trainer knows.

    Example:
        >>> callback = GradProbeCallback(updates=True)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
        >>> print(callback.probe.findings())  # doctest: +SKIP
    """

    def __init__(self, *, detail: Detail = "summary", **options: Any) -> None:
        check_options(options, ("optimizer", "start_step"))
        self.probe: Probe | None = None
        self._detail: Detail = detail
        self._options = options
        self._reports: Reports | None = None
        self._losses: list[torch.Tensor] = []  # the shares of the micro-batches in the loss of the step
        self._give_back: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches the probe."""
        self._end()
        start = state.global_step + 1  # the trainer raises it before it logs a step
        self.probe = attach(kwargs["model"], optimizer=kwargs["optimizer"], start_step=start, **self._options)
        is_strict = self._options.get("strict", False)
        self._reports = Reports(self.probe, state.global_step, self._detail, is_strict)
        trainer = _calling(self)
        if trainer is None:
            warn_user("the Trainer was not found: the steps have no loss, and report_to does not show the numbers")
            return
        self._listen(trainer)
        _put_first(self, trainer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the probe the loss of the step."""
        losses, self._losses = self._losses, []
        if self._reports is not None and losses:
            with self._reports.guarded():
                self._reports.probe.step(sum(losses[1:], start=losses[0]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the newest measured step to the logs, and tells new findings."""
        reports = self._reports
        if reports is None or logs is None or not state.is_world_process_zero:
            return
        with reports.guarded():
            newest = reports.newest()
            if newest is not None:
                step, metrics = newest
                logs.update({f"{_PREFIX}step": step, **metrics})
                self._tell(reports)
                logs[f"{_PREFIX}findings"] = len(reports.told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the findings that are left, and detaches the probe."""
        if self._reports is not None and state.is_world_process_zero:
            with self._reports.guarded():
                self._tell(self._reports)
        self._end()

    def _listen(self, trainer: Any) -> None:
        """Notes what the trainer's `training_step` returns: the loss, already divided as the trainer accumulates."""
        inner = trainer.training_step

        def training_step(*arguments: Any, **options: Any) -> Any:
            loss = inner(*arguments, **options)
            self._losses.append(loss)
            return loss

        def give_back() -> None:
            if vars(trainer).get("training_step") is training_step:
                del trainer.training_step

        self._losses = []
        trainer.training_step, self._give_back = training_step, give_back

    def _tell(self, reports: Reports) -> None:
        for finding in reports.findings():
            _log.warning("%s", sentence(finding))

    def _end(self) -> None:
        if self._give_back is not None:
            self._give_back()
            self._give_back = None
        self._reports = None
        if self.probe is not None:
            self.probe.detach()


class _Unprinted(TrainerCallback):
    """Takes the numbers out of the logs again, before they are printed."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in [name for name in logs or () if name.startswith(_PREFIX)]:
            del (logs or {})[name]


def _calling(callback: TrainerCallback) -> Any:
    """Returns the trainer that calls a callback, which it does not give to it; None if there is none."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and callback in trainer.callback_handler.callbacks:
            return trainer
        frame = frame.f_back
    return None


def _put_first(callback: TrainerCallback, trainer: Any) -> None:
    """Puts a callback in front of those that report and print the logs: the trainer appends what users give."""
    handler = trainer.callback_handler
    others = [other for other in handler.callbacks if other is not callback and not isinstance(other, _Unprinted)]
    printing = [k for k, other in enumerate(others) if isinstance(other, (PrinterCallback, ProgressCallback))]
    if printing:
        others.insert(printing[0], _Unprinted())
    handler.callbacks = [callback, *others]  # a new list: the trainer is iterating over the old one
