"""Reads gradient scalers, without changing them: by how much a loss was scaled, and whether a step was skipped."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.amp.grad_scaler import GradScaler, OptState


@dataclass(frozen=True, slots=True)
class LossScale:
    """The state of a scaler at the end of a backward pass, when every gradient still carries the scale.

    Attributes:
        scaler: The scaler.
        scale: A copy of its scale, 0-d float64 on its device.
        n_updates: A number that changes with every `update` of the scaler.
    """

    scaler: weakref.ref[GradScaler]
    scale: torch.Tensor
    n_updates: int

    @property
    def inverse(self) -> torch.Tensor:
        """The factor that unscales, 0-d."""
        return self.scale.reciprocal()

    def was_updated(self) -> bool:
        """Returns whether `update` was called since: the step that it belongs to is over."""
        scaler = self.scaler()
        return scaler is not None and scaler._scale is not None and scaler._scale._version != self.n_updates

    def has_fallen(self) -> torch.Tensor:
        """Returns whether the scale has fallen since, because a gradient was not finite; 0-d bool on the device."""
        scaler = self.scaler()
        if scaler is None or scaler._scale is None:
            return torch.zeros_like(self.scale, dtype=torch.bool)
        return scaler._scale < self.scale

    def is_removed_from(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Returns whether the gradients that an optimizer steps have been unscaled; None stands for any optimizer."""
        scaler = self.scaler()
        if scaler is None:
            return False
        states = scaler._per_optimizer_states
        stages = [state["stage"] for key, state in states.items() if optimizer is None or key == id(optimizer)]
        return any(stage is not OptState.READY for stage in stages)

    def belongs_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the scaler is stepping an optimizer."""
        scaler = self.scaler()
        return scaler is not None and id(optimizer) in scaler._per_optimizer_states


class Scalers:
    """The gradient scalers of a training.

    Args:
        given: Those that the user has named.
    """

    def __init__(self, given: Sequence[GradScaler]) -> None:
        self._known = [weakref.ref(scaler) for scaler in given]

    def adopt(self, scaler: GradScaler) -> None:
        """Adds a scaler that was seen to step an optimizer of the model."""
        if all(known() is not scaler for known in self._known):
            self._known.append(weakref.ref(scaler))

    def read(self) -> list[LossScale]:
        """Returns the state of the scalers in use; the scales are copied on their devices."""
        scales = []
        for known in self._known:
            scaler = known()
            if scaler is not None and scaler.is_enabled() and scaler._scale is not None:
                scales.append(LossScale(known, scaler._scale.detach().double(), scaler._scale._version))
        return scales


_found: list[weakref.ref[GradScaler]] = []  # all of the process, when it was searched
_n_references_then = -1


def any_in_use() -> bool:
    """Returns whether the process has a gradient scaler that has scaled a loss; searches only if there may be more."""
    global _found, _n_references_then
    n_references = _n_references(GradScaler)
    if n_references != _n_references_then or any(known() is None for known in _found):
        # not isinstance, which would run the code of proxy objects
        _found = [weakref.ref(one) for one in gc.get_objects() if issubclass(type(one), GradScaler)]
        _n_references_then = n_references
    alive = (known() for known in _found)
    return any(one is not None and one.is_enabled() and one._scale is not None for one in alive)


def _n_references(cls: type[GradScaler]) -> int:
    """Counts the references to a class and its subclasses: every object holds one to its class."""
    return sys.getrefcount(cls) + sum(_n_references(one) for one in cls.__subclasses__())
