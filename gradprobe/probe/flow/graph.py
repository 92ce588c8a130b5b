"""The autograd graph behind a loss: when each parameter was used, and which nodes every gradient must pass."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch.autograd.graph import Node

# Operators that only rearrange or convert a parameter before it is used.
_VIEWS = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand", "Slice",
          "Select", "ToCopy", "Alias", "Clone", "AsStrided", "Repeat")  # fmt: skip
_SUMS = ("Add", "Sub", "Cat", "Stack", "IndexPut")


class LossGraph:
    """The graph from a loss back to the parameters.

    A node dominates another one if every path from the loss to the other leads through it: all of the gradient at the
    other has then passed it. The immediate dominators form a tree whose root is the loss.

    Args:
        loss: A tensor that requires a gradient.
    """

    def __init__(self, loss: torch.Tensor) -> None:
        self.users: dict[int, list[tuple[Node, int]]] = {}  # id of a parameter -> nodes that use it, at which input
        self._above: dict[Node, Node] = {}
        self._depth: dict[Node, int] = {}
        self._uppers: dict[Node, list[tuple[Node, int]]] = {}  # node -> nodes that it gets a gradient from, and where
        if loss.grad_fn is not None:
            self._find_dominators(self._sorted(loss.grad_fn))

    def __contains__(self, node: object) -> bool:
        return node in self._depth

    def first_use(self, parameter: torch.Tensor) -> int | None:
        """Returns the sequence number of the first operation that used a parameter, None if none did."""
        users = self.users.get(id(parameter))
        return min(node._sequence_nr() for node, _ in users) if users else None

    def path(self, node: Node) -> Iterator[Node]:
        """Yields a node and its dominators, the loss last."""
        yield node
        while self._above[node] is not node:
            node = self._above[node]
            yield node

    def dominates(self, upper: Node, lower: Node) -> bool:
        """Returns whether all of the gradient at `lower` has passed `upper`."""
        while self._depth[lower] > self._depth[upper]:
            lower = self._above[lower]
        return lower is upper

    def factor_of(self, parameter: torch.Tensor) -> Node | None:
        """Returns the node that multiplies by a parameter.

        Returns:
            The node, behind any views of the parameter; None if the parameter has several users, or is only added.
        """
        users = self.users.get(id(parameter), ())
        if len(users) != 1:
            return None
        node, position = users[0]
        while _is_any(node, _VIEWS):
            uppers = self._uppers.get(node, [])
            if len(uppers) != 1:
                return None
            node, position = uppers[0]
        is_bias = node.name().startswith("Addmm") and position == 0
        return None if is_bias or _is_any(node, _SUMS) else node

    def depth(self, node: Node) -> int:
        """Returns how many nodes dominate a node."""
        return self._depth[node]

    def count_on_path(self, chosen: Container[Node]) -> dict[Node, int]:
        """Counts, for each node, how many of the chosen nodes are on its path, itself included."""
        counts: dict[Node, int] = {}
        for node, above in self._above.items():  # a node stands behind its dominators
            counts[node] = (counts[above] if above is not node else 0) + (node in chosen)
        return counts

    def lowest(self, chosen: Container[Node]) -> set[Node]:
        """Returns those of the chosen nodes that no other chosen node sends its result to, directly or not."""
        fed: set[Node] = set()  # nodes that a chosen node sends its result to
        for node in reversed(self._above):
            if any(lower in fed or lower in chosen for lower, _ in node.next_functions if lower is not None):
                fed.add(node)
        return {node for node in self._above if node in chosen and node not in fed}

    def _sorted(self, root: Node) -> list[Node]:
        """Sorts the nodes so that each stands behind all nodes that it gets a gradient from."""
        n_uppers, waiting = {root: 0}, [root]
        while waiting:
            node = waiting.pop()
            for position, (lower, _) in enumerate(node.next_functions):
                if lower is None:
                    continue
                if hasattr(lower, "variable"):
                    self.users.setdefault(id(lower.variable), []).append((node, position))
                    continue
                if lower not in n_uppers:
                    n_uppers[lower] = 0
                    waiting.append(lower)
                n_uppers[lower] += 1
                self._uppers.setdefault(lower, []).append((node, position))
        ready, found = [root], []
        while ready:
            node = ready.pop()
            found.append(node)
            for lower, _ in node.next_functions:
                if lower in n_uppers:
                    n_uppers[lower] -= 1
                    if n_uppers[lower] == 0:
                        ready.append(lower)
        return found

    def _find_dominators(self, nodes: list[Node]) -> None:
        """Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm (2001), for a graph without cycles."""
        self._above[nodes[0]], self._depth[nodes[0]] = nodes[0], 0
        for node in nodes[1:]:
            above = self._uppers[node][0][0]
            for other, _ in self._uppers[node][1:]:
                while above is not other:
                    if self._depth[above] >= self._depth[other]:
                        above = self._above[above]
                    else:
                        other = self._above[other]
            self._above[node], self._depth[node] = above, self._depth[above] + 1


def _is_any(node: Node, names: tuple[str, ...]) -> bool:
    return node.name().rstrip("0123456789").removesuffix("Backward") in names
