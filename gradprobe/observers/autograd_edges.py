"""Finds the edges of an autograd graph through which a residual branch's part of the gradient reaches x."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

_MOST_NODES = 10_000
_NO_SEQUENCE = 2**64 - 1  # sequence number of a leaf's node


def edges_into(x: Tensor, start: Node | None, outputs: Collection[int] | None = None) -> list[tuple[Node, int]]:
    """Finds the edges through which a graph reaches the gradient at a tensor.

    Args:
        x: The tensor.
        start: Node at which the search starts; None if there is no graph.
        outputs: Positions among the node's outputs to follow; None for all.

    Returns:
        Nodes, and which of their outputs goes to x; empty if the graph does not reach x or is too large.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = x + x.exp().sin()
        >>> [(found.name(), k) for found, k in edges_into(x, y.grad_fn, [1])]
        [('ExpBackward0', 0)]
    """
    if start is None or not x.requires_grad:
        return []
    target = x.grad_fn if x.grad_fn is not None else get_gradient_edge(x).node
    sequence = target._sequence_nr()
    oldest = -1 if sequence == _NO_SEQUENCE else sequence  # nodes that lead to the target were created after it
    found = []
    seen = {start}
    waiting = [(start, k) for k in (range(len(start.next_functions)) if outputs is None else outputs)]
    while waiting:
        node, output = waiting.pop()
        following, input_nr = node.next_functions[output]
        if following is None:
            continue
        if following is target and input_nr == x.output_nr:
            found.append((node, output))
        elif following not in seen and following._sequence_nr() > oldest:
            seen.add(following)
            waiting += [(following, k) for k in range(len(following.next_functions))]
            if len(seen) > _MOST_NODES:
                return []
    return found
