"""One call of an observed residual add: brings the two parts of the gradient at x together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradprobe.observers.autograd_edges import edges_into


def fenced(method: Callable[..., None]) -> Callable[..., None]:
    """Makes a method of a `JunctionCall` switch off the residual add if it fails."""

    @wraps(method)
    def fenced(call: JunctionCall, *arguments: Any) -> None:
        try:
            method(call, *arguments)
        except Exception as error:  # noqa: BLE001
            call.fail(error)

    return fenced


class JunctionCall(ABC):
    """Computes and measures one call of a residual add, through `ResidualSum`.

    Args:
        first: Site of x; those of the other `JUNCTION_KINDS` follow.
    """

    __slots__ = ("_n_arrivals", "_open", "first")

    def __init__(self, first: int) -> None:
        self.first = first
        self._n_arrivals = 0  # gradients that the branch sends to x in one backward pass
        # The running backward pass, the shortcut's part and the branch's gradients so far. Replaced as a whole: another
        # thread may run another backward pass.
        self._open: tuple[int, Tensor, list[Tensor | None]] | None = None

    @abstractmethod
    def add(self, x: Tensor, f: Tensor, relu: bool) -> Tensor:
        """Computes the sum."""

    @abstractmethod
    def gradient(self, incoming: Tensor, y: Tensor | None = None) -> Tensor:
        """Computes the gradient of both operands; there is no y without a ReLU."""

    @abstractmethod
    def on_branch(self, parts: Sequence[Tensor], shortcut: Tensor) -> None:
        """Measures the branch's part of the gradient, the sum of `parts`, and its product with the shortcut's part."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """Switches off the residual add after an error in measuring it; raises the error if the buffer is strict."""

    @fenced
    def hook_branch(self, x: Tensor, start: Node | None, outputs: Sequence[int] | None = None) -> None:
        """Hooks the nodes from which the branch's part of the gradient reaches x; see `edges_into`."""
        edges = edges_into(x, start, outputs)
        self._n_arrivals = len(edges)
        for node, output in edges:
            node.register_hook(partial(self._on_arrival, output))

    def keep_shortcut(self, gradient: Tensor) -> None:
        """Keeps the shortcut's part of the gradient, which comes first in each backward pass."""
        self._open = (torch._C._current_graph_task_id(), gradient, []) if self._n_arrivals > 0 else None

    @fenced
    def _on_arrival(self, output: int, grad_inputs: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        opened = self._open
        if opened is None or opened[0] != torch._C._current_graph_task_id():
            return
        shortcut, arrived = opened[1:]
        arrived.append(grad_inputs[output])
        if len(arrived) < self._n_arrivals:
            return
        # Drop the references before the engine sums the parts: it adds in place only if no one else holds the tensor.
        if self._open is opened:
            self._open = None
        parts = [part for part in arrived if part is not None]
        if parts:
            self.on_branch(parts, shortcut)
