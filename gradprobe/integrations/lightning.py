"""A callback for Lightning's Trainer."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradprobe.integrations.reports import Reports, check_options, missing, sentence
from gradprobe.probe.probe import Probe, attach

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from gradprobe.diagnosis.finding import Finding
    from gradprobe.snapshot.metrics import Detail
else:
    # the package has two names, and a trainer of one takes the callbacks of that one
    _NAMES = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for _name in _NAMES:
        try:
            Callback = importlib.import_module(_name).Callback
            break
        except ImportError:
            continue
    else:
        raise missing("lightning")

_log = logging.getLogger(f"{Callback.__module__.removesuffix('.callbacks.callback')}.gradprobe")


class GradProbeCallback(Callback):
    """Attaches a probe for the training, and logs what it measures through the trainer's loggers.

    Gradients are those before clipping, of all micro-batches of a step together; the loss of a step is the mean over
    its micro-batches, in each process its own. The number of a step is the trainer's `global_step` in its training
    step, from a checkpoint on, too. Every `log_every_n_steps` steps of the trainer, the newest measured step is logged
    at its number, where `self.log` logs that step. New findings are logged as warnings, as the metric
    `gradprobe/finding/<name>`, and as text where the logger takes text. Only the first rank logs.

    Attributes:
        probe: The probe, None before the training starts. It stays readable afterwards.

    Args:
        detail: Which numbers to log, as in `Snapshot.metrics`.
        options: Further options of `gradprobe.attach`; the trainer gives `optimizer` and `start_step`.

    Raises:
        ArgumentError: An option is given that the trainer knows.

    Example:
        >>> callback = GradProbeCallback(updates=True, every=10)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
        >>> print(callback.probe.findings())  # doctest: +SKIP
    """

    def __init__(self, *, detail: Detail = "summary", **options: Any) -> None:
        check_options(options, ("optimizer", "start_step"))
        self.probe: Probe | None = None
        self._detail: Detail = detail
        self._options = options
        self._reports: Reports | None = None
        self._told: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the probe."""
        self._end()
        model, start = _observed(trainer, pl_module), trainer.global_step
        self.probe = attach(model, optimizer=trainer.optimizers, start_step=start, **self._options)
        is_strict = self._options.get("strict", False)
        self._reports = Reports(self.probe, start, self._detail, is_strict, self._told)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gives the probe the loss of the micro-batch, and logs when the trainer does."""
        reports = self._reports
        if reports is None:
            return
        with reports.guarded():
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, torch.Tensor):  # the trainer has divided it by the number of micro-batches
                reports.probe.step(loss.detach() * trainer.accumulate_grad_batches)
            if reports.is_due(trainer.global_step, trainer.log_every_n_steps) and trainer.is_global_zero:
                self._report(trainer, reports)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the findings that are left."""
        if self._reports is not None and trainer.is_global_zero:
            with self._reports.guarded():
                self._tell(trainer, self._reports)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detaches the probe."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches the probe."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: which findings were told."""
        return {"told": sorted(self._told if self._reports is None else self._reports.told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what a checkpoint has kept."""
        self._told = list(state_dict["told"])

    def _report(self, trainer: Trainer, reports: Reports) -> None:
        newest = reports.newest()
        if newest is not None:
            step, metrics = newest
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self._tell(trainer, reports)

    def _tell(self, trainer: Trainer, reports: Reports) -> None:
        for finding in reports.findings():
            _log.warning("%s", sentence(finding))
            for logger in trainer.loggers:
                _tell_logger(logger, finding, max(trainer.global_step - 1, 0))

    def _end(self) -> None:
        if self._reports is not None:
            self._told = sorted(self._reports.told)
            self._reports = None
        if self.probe is not None:
            self.probe.detach()


def _observed(trainer: Trainer, module: LightningModule) -> torch.nn.Module:
    """Returns the module itself, so that names have no prefix, or what FSDP1 has wrapped around it."""
    wrapped: object = trainer.strategy.model
    is_fsdp = type(wrapped).__name__ == "FullyShardedDataParallel"  # holds parameters of the module
    return wrapped if is_fsdp and isinstance(wrapped, torch.nn.Module) else module


def _tell_logger(logger: Any, finding: Finding, step: int) -> None:
    logger.log_metrics({f"gradprobe/finding/{finding.title}": 1.0}, step=step)
    experiment = logger.experiment
    if hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text("gradprobe/finding", sentence(finding), global_step=step)
    elif hasattr(experiment, "alert"):  # Weights & Biases
        experiment.alert(title=f"gradprobe: {finding.title}", text=sentence(finding))
