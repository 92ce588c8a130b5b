"""Hooks of torch that concern the whole process, such as those around the steps of all optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch.utils.hooks import RemovableHandle

_retired: list[RemovableHandle] = []  # of owners that were collected


class ProcessHooks:
    """Removes hooks with their owner.

    Garbage collection may run while torch goes through its hooks, and removing one then would raise in the training.
    The hooks of an owner that is collected are therefore removed when the next ones are installed or removed. Until
    then they run, and have to do nothing without their owner.

    Args:
        owner: The object that the hooks belong to. Not kept alive.
        handles: The hooks.
    """

    def __init__(self, owner: object, handles: Sequence[RemovableHandle]) -> None:
        _remove_retired()
        self._handles = handles
        self._finalizer = weakref.finalize(owner, _retired.extend, handles)
        self._finalizer.atexit = False

    def remove(self) -> None:
        """Removes the hooks, for good."""
        if self._finalizer.detach() is not None:
            for handle in self._handles:
                handle.remove()
        _remove_retired()


def _remove_retired() -> None:
    while _retired:
        _retired.pop().remove()
