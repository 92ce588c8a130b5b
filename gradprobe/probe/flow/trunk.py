"""Measures how much the loss depends on the outputs of modules along the trunk of a model.

The trunk is the chain of module outputs that all of the gradient passes on its way to the first layer: the blocks of a
residual network, but not the layers inside their branches. It is read from the graph of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from gradprobe.observers.observable import measurable_part, tensors_in
from gradprobe.ops import grad_stats, norms
from gradprobe.ops.transforms import in_transform
from gradprobe.probe.flow.graph import LossGraph

_LEAST = 2  # points that a trunk needs
_BESIDE = 0.75  # share of a tower's outputs from which another start belongs to it


@dataclass(frozen=True, slots=True)
class TrunkPoint:
    """The output of a module on the trunk.

    Attributes:
        module: Name of the module, "" for the whole model.
        sensitivity: Standard deviation of the change of the loss, per unit of noise, if every element of the output is
            changed by independent noise whose standard deviation is the noise times the output's RMS: norm of the
            gradient times RMS of the output. Does not depend on the scale of the output.
    """

    module: str
    sensitivity: float


@dataclass(slots=True)
class Output:
    """One tensor that a module returned.

    Attributes:
        module: Name of the module.
        node: The node of the graph that made the tensor.
        row: Raw statistics of the tensor. [1, 6]
        numel: Number of elements.
        gradient: Raw statistics of the gradient, None before it arrived. [1, 6]
    """

    module: str
    node: Node
    row: torch.Tensor
    numel: int
    gradient: torch.Tensor | None = None

    @property
    def gradient_norm(self) -> float:
        """Norm of the gradient; NaN if there was none."""
        return math.nan if self.gradient is None else float(norms(self.gradient))

    @property
    def rms(self) -> float:
        """Root mean square of the tensor."""
        return float(norms(self.row)) / math.sqrt(max(self.numel, 1))


class Outputs:
    """Records the outputs of all modules during a forward pass, and their gradients during the backward pass."""

    def __init__(self) -> None:
        self.found: list[Output] = []
        self.called: dict[str, int] = {}  # name of a module -> a sequence number of the graph at its first call

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Records while the block runs."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._on_call, name)))
            handles.append(module.register_forward_hook(partial(self._on_output, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradient_norm(self, module: str) -> float:
        """Returns the norm of the gradient at the outputs of a module, all calls together; NaN if there is none."""
        found = [one.gradient_norm for one in self.found if one.module == module]
        return math.hypot(*found) if found else math.nan

    def _on_call(self, name: str, _module: nn.Module, _inputs: Any) -> None:
        if name in self.called or in_transform():
            return
        with torch.enable_grad():
            clock = torch.ones((), requires_grad=True).neg().grad_fn
        assert clock is not None
        self.called[name] = clock._sequence_nr()

    def _on_output(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or in_transform():
            return
        for tensor in tensors_in(output):
            part = measurable_part(tensor)
            if tensor.grad_fn is None or part is None or part is not tensor:
                continue
            one = Output(name, tensor.grad_fn, grad_stats([tensor.detach()]), tensor.numel())
            self.found.append(one)
            tensor.register_hook(partial(_note_gradient, one))


def trunks(outputs: Sequence[Output], graph: LossGraph) -> list[list[TrunkPoint]]:
    """Finds and measures the trunks of a model: one, or one per tower.

    A trunk starts at an output that depends on no other and leads to the loss. If several start side by side and soon
    become one, such as embeddings that are added, or queries, keys and values, it is enough if the gradient gets
    through to one of them: the one whose sensitivity is closest to that of the end.

    Args:
        outputs: The outputs of all modules, in order of execution.
        graph: The graph of the loss, after the backward pass.

    Returns:
        The points of each trunk, from the input to the loss, at least two. If several modules return one tensor, the
        outermost counts.
    """
    named = {one.node: one for one in outputs if one.node in graph and one.numel > 1}  # the loss itself is no output
    lengths, starts = graph.count_on_path(named), graph.lowest(named)
    least = max((lengths[node] for node in starts), default=0) / 2
    towers: list[tuple[set[Node], list[list[TrunkPoint]]]] = []
    for start in named:  # in order of execution
        if start not in starts or lengths[start] < least:
            continue
        nodes = [node for node in graph.path(start) if node in named]
        points = _measured([named[node] for node in nodes])
        shared = [sum(node in tower for node in nodes) for tower, _ in towers]
        beside = [k for k, n_shared in enumerate(shared) if n_shared >= _BESIDE * len(towers[k][0])]
        if len(points) < _LEAST:
            continue
        if beside:
            towers[beside[0]][1].append(points)
        elif all(2 * n_shared < len(nodes) for n_shared in shared):
            towers.append((set(nodes), [points]))
    return [min(starting, key=_change) for _, starting in towers]


def _measured(trunk: Sequence[Output]) -> list[TrunkPoint]:
    """Returns the points whose gradient was seen, without those whose output is zero.

    Of several calls of a module, as in a recurrent network, only the one counts that the loss depends on most: its
    parameters get the gradients of all.
    """
    points = [TrunkPoint(one.module, one.gradient_norm * one.rms) for one in trunk if one.rms > 0]
    points = [point for point in points if not math.isnan(point.sensitivity)]
    largest: dict[str, int] = {}
    for k, point in enumerate(points):
        if point.module not in largest or point.sensitivity >= points[largest[point.module]].sensitivity:
            largest[point.module] = k
    return [points[k] for k in sorted(largest.values())]


def _change(trunk: Sequence[TrunkPoint]) -> float:
    first, last = trunk[0].sensitivity, trunk[-1].sensitivity
    return abs(math.log(first / last)) if first > 0 and last > 0 and math.isfinite(first / last) else math.inf


def _note_gradient(output: Output, gradient: torch.Tensor) -> None:
    part = measurable_part(gradient)
    if part is not None:
        output.gradient = grad_stats([part])
