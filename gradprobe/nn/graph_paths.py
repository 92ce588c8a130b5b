"""What autograd's graph knows of a tensor: the tensors that it was made from, and the layers in between."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from gradprobe.nn.shortcuts import Origins, Path

_LEAF = "torch::autograd::AccumulateGrad"
# Operations that take rows of a parameter: a residual stream may start there.
_LOOKUPS = ("Embedding", "Index", "Gather")
# Operations that are layers: the first without parameters, since they mix elements.
_MIXING = ("Bmm", "Mm", "GroupedMm", "Fft", "ScaledDot")
_LAYERS = (*_MIXING, "Addmm", "Baddbmm", "Convolution", "Native", "Cudnn", "Miopen", "Mkldnn", "FusedRms")
_BENDING = (
    *("Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Glu", "Softplus", "Hardswish", "Hardtanh"),
    *("Hardsigmoid", "Tanh", "Sigmoid", "LogSigmoid", "Softmax", "LogSoftmax", "ScaledDot"),
)


class GraphPaths:
    """Follows the graph of a forward from a tensor backwards.

    Args:
        parameters: The tensors that stand for the model's parameters.

    Example:
        >>> x, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
        >>> max(GraphPaths([weight]).origins((x @ weight).relu(), since=0).values())
        Path(layers=1, bends=1, gates=0)
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {id(parameter) for parameter in parameters}
        self._weights: dict[Node, bool] = {}  # whether a node is computed from parameters alone

    def origins(self, tensor: Tensor, since: int) -> Origins:
        """Returns the tensors that a tensor was made from, with the shortest path from each.

        Args:
            tensor: The tensor.
            since: Age of the running module's arguments. What is reached within the module is its own and stands by
                itself; everything else by a number.
        """
        start = _node_of(tensor)
        return {**self._paths(start, since), **self._paths(start, None)}

    def pieces(self, tensor: Tensor, since: int) -> list[Origins]:
        """Returns the origins of each piece of a tensor that was concatenated, and then passed through no layer.

        Args:
            tensor: The tensor.
            since: As for `origins`.
        """
        node = _node_of(tensor)
        while node is not None and not node.name().startswith("CatBackward"):
            used = [one for one, _ in node.next_functions if one is not None]
            made_from = [one for one in used if not self._is_weight(one)]
            is_layer = _step(node.name(), len(made_from), len(used) > len(made_from)).layers > 0
            node = made_from[0] if len(made_from) == 1 and not is_layer else None
        parts = [] if node is None else [one for one, _ in node.next_functions]
        return [{**self._paths(one, since), **self._paths(one, None)} for one in parts]

    def _paths(self, start: Node | None, since: int | None) -> dict[Hashable, Path]:
        paths: dict[Hashable, Path] = {}
        order = itertools.count()
        heap: list[tuple[Path, int, Node | None]] = [(Path(), next(order), start)]
        while heap:
            path, _, node = heapq.heappop(heap)
            origin = node if since is not None else id(node)
            if node is None or origin in paths:
                continue
            paths[origin] = path
            if since is not None and node._sequence_nr() < since:
                continue
            used = [one for one, _ in node.next_functions if one is not None]
            made_from = [one for one in used if not self._is_weight(one)]
            step = _step(node.name(), len(made_from), len(used) > len(made_from))
            if not made_from and (step.layers or self._is_weight(node)):  # a stream that starts at a parameter
                made_from = [one for one in used if one.name() != _LEAF]
            for one in made_from:
                heapq.heappush(heap, (path.then(step), next(order), one))
        return paths

    def _is_weight(self, node: Node) -> bool:
        """Returns whether a node stands for a parameter, or for something computed from parameters alone."""
        unknown = [node]
        while unknown:
            one = unknown[-1]
            used = [other for other, _ in one.next_functions if other is not None]
            missing = [other for other in used if other not in self._weights]
            if one.name() == _LEAF:
                self._weights[one] = id(one.variable) in self._parameters  # type: ignore[attr-defined]
            elif one.name().startswith((*_LOOKUPS, *_LAYERS)) or not used:
                self._weights[one] = False
            elif missing:
                unknown += missing
                continue
            else:
                self._weights[one] = all(self._weights[other] for other in used)
            unknown.pop()
        return self._weights[node]


def _node_of(tensor: Tensor) -> Node | None:
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def graph_age() -> int:
    """Returns the number that autograd gives to its next node."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def _step(name: str, n_operands: int, uses_weight: bool) -> Path:
    """Returns what an operation adds to a path.

    Args:
        name: Name of its node.
        n_operands: Number of its operands that depend on more than parameters.
        uses_weight: Whether another operand depends on parameters alone.
    """
    is_custom = name.endswith("Backward")  # an autograd.Function; those of torch end with a digit
    is_layer = name.startswith(_MIXING) or (uses_weight and (is_custom or name.startswith(_LAYERS)))
    is_attention = is_layer and n_operands > 1  # a product of two functions of the input is not linear
    return Path(
        layers=int(is_layer),
        bends=int(is_attention or name.startswith(_BENDING)),
        gates=int(name == "MulBackward0" and n_operands + uses_weight > 1),
    )
