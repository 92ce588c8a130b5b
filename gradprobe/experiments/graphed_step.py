"""A training step as a CUDA graph: its hundreds of kernels start with one call, without Python in between.

A graph repeats the kernels of the step on the same memory. So it reads the batch from a tensor of its own, and it is
captured again when the learning rate changes, which happens at most three times in a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradprobe.errors import BackendError, GradprobeWarning, warn_user
from gradprobe.experiments.step import TrainingStep
from gradprobe.observers import cuda_graphs
from gradprobe.ops import resolve
from gradprobe.probe.probe import Probe

# As in PyTorch's own examples: libraries allocate their memory, and the optimizer its state, in the first steps.
_WARM_UP = 3


class Captured(NamedTuple):
    """A captured step: the function that runs it again, and its result, which each run overwrites."""

    replay: Callable[[], None]
    result: Tensor


def capture(run: Callable[[], Tensor], device: torch.device) -> Captured:
    """Captures the kernels that a function starts on the current stream; they do not run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        result = run()
    return Captured(graph.replay, result)


def may_capture(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Returns whether a step may be captured: on a device with graphs, if a replay equals an eager step, else warns."""
    if not cuda_graphs.can_capture(device):
        return False
    if not isinstance(optimizer, torch.optim.SGD) and not optimizer.param_groups[0].get("capturable"):
        reason = f"{type(optimizer).__name__} counts its steps outside the device"
    elif resolve("auto", device).name == "triton":
        reason = "the Triton kernels, with which gradients are measured here, cannot be captured"
    else:
        return True
    warn_user(f"the training step runs without a CUDA graph: {reason}")
    return False


class GraphedStep:
    """Runs a training step eagerly a few times, then captures it and replays it, with the probe's measurements inside.

    If capturing fails, so does the training: torch can leave the random numbers and the memory of the device as they
    are during a capture, so that no step is safe in this process any more.

    Args:
        step: The step; `may_capture` must hold for its optimizer.
        probe: The probe of its network. Its steps are closed here: an optimizer in a graph does not.
    """

    def __init__(self, step: TrainingStep, probe: Probe) -> None:
        self._step = step
        self._probe = probe
        self._n_eager = 0
        self._rates: list[float] = []
        self._batch: Tensor | None = None  # the graph reads the batch here
        self._captured: Captured | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """Trains on a batch, as `TrainingStep` does; the result is overwritten by the next call.

        Raises:
            BackendError: The step cannot be captured.
        """
        if self._n_eager < _WARM_UP:
            self._n_eager += 1
            return self._close(self._step(batch))
        if self._batch is None:
            self._batch = torch.empty_like(batch)
        self._batch.copy_(batch)
        rates = [float(group["lr"]) for group in self._step.optimizer.param_groups]
        if self._captured is None or rates != self._rates:
            self._captured = None  # frees the memory of the old graph
            self._captured = self._capture(self._batch)
            self._rates = rates
        self._captured.replay()
        return self._close(self._captured.result)

    def _close(self, result: Tensor) -> Tensor:
        self._probe.step()  # if the optimizer has closed the step, this adds nothing
        return result

    def _capture(self, batch: Tensor) -> Captured:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GradprobeWarning)  # a captured step does not close itself
                return capture(lambda: self._step(batch), batch.device)
        except Exception as error:
            # An error in the step mostly makes the end of the capture fail as well, with a message that says nothing.
            reasons = [error] if error.__context__ is None else [error.__context__, error]
            raise BackendError(
                "the training step cannot be captured in a CUDA graph; train with --no-graph. "
                + "; then ".join(f"{type(one).__name__}: {str(one).strip().partition(chr(10))[0]}" for one in reasons)
            ) from error
