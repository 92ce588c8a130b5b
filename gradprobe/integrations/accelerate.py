"""A probe for a loop that accelerate prepared."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradprobe.errors import ArgumentError
from gradprobe.integrations.reports import Reports, check_options, missing, sentence
from gradprobe.probe.probe import attach as attach_probe

try:
    from accelerate import Accelerator, DistributedType
    from accelerate.logging import get_logger
except ImportError as error:
    raise missing("accelerate") from error

if TYPE_CHECKING:
    import torch

    from gradprobe.snapshot.metrics import Detail

_log = get_logger("accelerate.gradprobe")
_TAKE_TEXT = ("tensorboard", "wandb")


class AcceleratedProbe:
    """A probe that logs through an accelerator's trackers. Made by `attach`.

    Attributes:
        probe: The probe.
    """

    def __init__(self, accelerator: Accelerator, reports: Reports, log_every: int) -> None:
        self.probe = reports.probe
        self._accelerator = accelerator
        self._reports = reports
        self._log_every = log_every

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Takes the loss of a micro-batch, and logs when it is time. Call it last in each pass of the loop.

        Args:
            loss: The loss as it was given to `accelerator.backward`. The losses of a step's micro-batches are averaged.
        """
        with self._reports.guarded():
            self.probe.step(loss)
            if not self._accelerator.sync_gradients:
                return
            n_steps = self.probe.state_dict()["step"]
            if self._reports.is_due(n_steps, self._log_every) and self._accelerator.is_main_process:
                newest = self._reports.newest()
                if newest is not None:
                    self._log(*newest)
                self._tell()

    def close(self) -> None:
        """Tells the findings that are left, and detaches the probe."""
        if self._accelerator.is_main_process:
            with self._reports.guarded():
                self._tell()
        self.probe.detach()

    def __enter__(self) -> AcceleratedProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self) -> None:
        step = max(self.probe.state_dict()["step"] - 1, 0)
        for finding in self._reports.findings():
            _log.warning("%s", sentence(finding))
            self._log(step, {f"gradprobe/finding/{finding.title}": 1.0})
            for tracker in self._accelerator.trackers:
                if tracker.name in _TAKE_TEXT:
                    tracker.log({"gradprobe/finding": sentence(finding)}, step=step)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self._accelerator.trackers:
            self._accelerator.log(metrics, step=step)


def attach(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    *,
    start_step: int = 0,
    log_every: int = 10,
    detail: Detail = "summary",
    **options: Any,
) -> AcceleratedProbe:
    """Attaches a probe to what `accelerator.prepare` has returned. Every process calls it.

    Gradients are those before clipping, of all micro-batches of a step together. The newest measured step is logged
    through the accelerator's trackers at its own number, counted from `start_step`, by the first process only. New
    findings are logged as warnings, as the metric `gradprobe/finding/<name>`, and as text where the tracker takes text.

    Args:
        accelerator: The accelerator.
        model: The model, prepared or not.
        optimizer: The optimizer, prepared or not, or a list of them.
        start_step: Number of optimizer steps that the training has made before.
        log_every: Number of optimizer steps from one log to the next. Logging waits for the device.
        detail: Which numbers to log, as in `Snapshot.metrics`.
        options: Further options of `gradprobe.attach`.

    Returns:
        The probe, to be given the loss of each micro-batch. It is also a context manager that closes it.

    Raises:
        ArgumentError: An argument is invalid, as in `gradprobe.attach`.
    """
    if not isinstance(accelerator, Accelerator):
        raise ArgumentError(f"accelerator: needed an accelerate.Accelerator, got {type(accelerator).__name__}")
    if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1:
        raise ArgumentError(f"log_every: needed an integer of at least 1, got {log_every!r}")
    if accelerator.scaler is not None:
        check_options(options, ("grad_scaler",))
        options["grad_scaler"] = accelerator.scaler
    is_sharded = accelerator.distributed_type == DistributedType.FSDP  # what wraps the model then holds parameters
    observed = model if is_sharded else accelerator.unwrap_model(model, keep_torch_compile=True)
    probe = attach_probe(observed, optimizer=optimizer, start_step=start_step, **options)
    reports = Reports(probe, start_step, detail, options.get("strict", False))
    return AcceleratedProbe(accelerator, reports, log_every)
