"""Parameters that start at zero, or close to it, and so block or damp the gradient behind them.

A head whose weight starts at zero, the last scale of a residual branch, LayerScale at 1e-6: such a model trains from
its first step, although most of its gradients are zero at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import Node

from gradprobe.probe.flow.graph import LossGraph

_SMALL = 0.1  # largest constant that counts as a gate


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """A parameter that starts at zero or at one small constant, and multiplies.

    Attributes:
        name: Name of the parameter.
        parameter: The parameter.
        value: Its value.
        node: The node of the graph that multiplies by it.
    """

    name: str
    parameter: nn.Parameter
    value: float
    node: Node


def find_gates(model: nn.Module, graph: LossGraph, silent: Collection[str]) -> list[Gate]:
    """Finds the gates of a model: weights of zeros, and vectors of one small constant, that multiply something.

    Args:
        model: The model.
        graph: The graph of its loss.
        silent: Names of the parameters whose gradient is exactly zero. A zero counts as a gate only if it will open: if
            it has a gradient, or is behind another gate.

    Returns:
        The gates, in model order.
    """
    candidates = []
    for name, parameter in model.named_parameters():
        value = None if name.rpartition(".")[2].endswith("bias") else _constant(parameter)
        node = None if value is None else graph.factor_of(parameter)
        if value is None or node is None or node not in graph:
            continue
        if value == 0 or node.name().startswith("Mul"):
            candidates.append(Gate(name, parameter, value, node))
    gates: list[Gate] = []
    for one in sorted(candidates, key=lambda gate: graph.depth(gate.node)):
        is_behind = any(graph.dominates(gate.node, one.node) for gate in gates)
        if one.name not in silent or is_behind:
            gates.append(one)
    return [gate for gate in candidates if gate in gates]


def blocked_by(gates: Sequence[Gate], silent: Collection[str], model: nn.Module, graph: LossGraph) -> dict[str, str]:
    """Explains gradients that are exactly zero.

    Args:
        gates: The gates of the model.
        silent: Names of the parameters whose gradient is exactly zero.
        model: The model.
        graph: The graph of its loss.

    Returns:
        The name of each parameter behind a gate of zeros, and the name of that gate; of several, the one next to the
        loss.
    """
    closed = sorted((gate for gate in gates if gate.value == 0), key=lambda gate: graph.depth(gate.node))
    named = dict(model.named_parameters())
    found = {}
    for name in silent:
        users = [node for node, _ in graph.users.get(id(named.get(name)), ()) if node in graph]
        for gate in closed if users else ():
            if gate.name != name and all(graph.dominates(gate.node, node) for node in users):
                found[name] = gate.name
                break
    return found


@contextmanager
def opened(gates: Sequence[Gate]) -> Iterator[None]:
    """Gives the gates the values of an ordinary layer while the block runs: weights random ones, vectors ones.

    The tensors of the model are exchanged, not written to.
    """
    before = [gate.parameter.data for gate in gates]
    try:
        for gate, values in zip(gates, before, strict=True):
            if _is_vector(gate.parameter):
                gate.parameter.data = torch.ones_like(values)
            else:
                fan_in = values.numel() // len(values)
                gate.parameter.data = torch.randn_like(values) * fan_in**-0.5
        yield
    finally:
        for gate, values in zip(gates, before, strict=True):
            gate.parameter.data = values


def _constant(parameter: nn.Parameter) -> float | None:
    """Returns the value that all elements have if it makes the parameter a gate, else None."""
    if parameter.numel() == 0 or parameter.is_complex() or type(parameter.data) is not torch.Tensor:
        return None
    first = parameter.detach().flatten()[0]
    value = float(first)
    if abs(value) > _SMALL or (value != 0 and not _is_vector(parameter)) or not bool((parameter == first).all()):
        return None
    return value


def _is_vector(parameter: torch.Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) <= 1
