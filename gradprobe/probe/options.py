"""The options of `attach`, and checks of user input. Errors name the argument, what was needed and what was given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.activations import Selection

if TYPE_CHECKING:
    from gradprobe.observers.agreement import ProcessGroups

When = Literal["auto", "step", "backward", "hook"]
WHEN_CHOICES: tuple[When, ...] = ("auto", "step", "backward", "hook")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `attach`, which describes them.

    Raises:
        ArgumentError: An option is invalid.
    """

    optimizer: object
    params: bool
    activations: Selection
    junctions: bool
    updates: bool
    every: int
    activations_every: int
    updates_every: int
    capacity: int
    backend: str
    when: When
    grad_scaler: object
    process_group: ProcessGroups = None
    reduce_activations: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if self.params is not True:
            raise ArgumentError(
                f"params: needed True, since the gradients of parameters mark the steps, got {self.params!r}"
            )
        for name in ("junctions", "updates", "reduce_activations", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: needed True or False, got {getattr(self, name)!r}")
        for name in ("every", "activations_every", "updates_every", "capacity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: needed an integer of at least 1, got {value!r}")
        if self.when not in WHEN_CHOICES:
            raise ArgumentError(f"when: needed one of {', '.join(WHEN_CHOICES)}, got {self.when!r}")
        self._check_process_group()
        _ = self.optimizers, self.grad_scalers  # raises if one is invalid

    def common(self, signals: Sequence[str]) -> dict[str, object]:
        """Returns what must be the same on all ranks that reduce their numbers together.

        Args:
            signals: Names of the activations and residual adds that are reduced.
        """
        digest = hashlib.sha256(repr(tuple(signals)).encode()).hexdigest()[:16]
        names = ("every", "updates", "updates_every", "reduce_activations")
        common: dict[str, object] = {name: getattr(self, name) for name in names}
        if self.reduce_activations:
            common |= {"activations": digest, "activations_every": self.activations_every}
        if self.updates:  # each step of each optimizer takes part
            common["optimizers"] = len(self.optimizers)
        return common

    def _check_process_group(self) -> None:
        given = self.process_group
        groups = tuple(given.values()) if isinstance(given, Mapping) else (given,)
        is_mapping = isinstance(given, Mapping) and all(isinstance(pattern, str) for pattern in given)
        if given is None or given == "local":
            return
        if not (
            torch.distributed.is_available()
            and all(isinstance(group, torch.distributed.ProcessGroup) for group in groups)
            and (is_mapping or not isinstance(given, Mapping))
        ):
            shown = {key: type(group).__name__ for key, group in given.items()} if isinstance(given, Mapping) else given
            raise ArgumentError(
                "process_group: needed None, 'local', a torch.distributed.ProcessGroup, or a mapping of name patterns "
                f"to such groups, got {shown!r}"
            )

    @property
    def measured_at(self) -> When:
        """When gradients are measured, "auto" resolved."""
        return "backward" if self.when == "auto" else self.when

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers given; of a wrapper, itself and those inside it."""
        found: dict[int, torch.optim.Optimizer] = {}
        for one in _listed(self.optimizer):
            inside = _inside(one, torch.optim.Optimizer)
            if not inside:
                raise ArgumentError(
                    f"optimizer: needed a torch.optim.Optimizer, a list of them or None, got {type(one).__name__}"
                )
            found.update({id(optimizer): optimizer for optimizer in inside})
        return tuple(found.values())

    @property
    def grad_scalers(self) -> tuple[torch.amp.GradScaler, ...]:
        """The gradient scalers given, and those that wrappers of the optimizers hold."""
        for one in _listed(self.grad_scaler):
            if not isinstance(one, torch.amp.GradScaler):
                raise ArgumentError(
                    f"grad_scaler: needed a torch.amp.GradScaler, a list of them or None, got {type(one).__name__}"
                )
        everywhere = [*_listed(self.grad_scaler), *_listed(self.optimizer)]
        found = {id(scaler): scaler for one in everywhere for scaler in _inside(one, torch.amp.GradScaler)}
        return tuple(found.values())


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


_Kind = TypeVar("_Kind")
_DEEPEST = 4  # wrappers around each other


def _inside(value: object, kind: type[_Kind], depth: int = 0) -> list[_Kind]:
    """Returns the value itself, if it is of a kind, and what it wraps of that kind."""
    found = [value] if isinstance(value, kind) else []
    if depth < _DEEPEST:
        for name, attribute in getattr(value, "__dict__", {}).items():
            # an optimizer's wrapper holds another optimizer; nothing else leads to one
            if isinstance(attribute, (kind, torch.optim.Optimizer)) and attribute is not value and name != "state":
                found += _inside(attribute, kind, depth + 1)
    return found


def check_model(model: object) -> None:
    """Raises ArgumentError if a model is not a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: needed a torch.nn.Module, got {type(model).__name__}")


def check_loss(loss: object) -> None:
    """Raises ArgumentError if a loss is neither a real number nor a tensor with one."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ArgumentError(
                f"loss: needed one real number, got a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
            )
    elif loss is not None and not _is_number(loss):
        raise ArgumentError(f"loss: needed a number or a tensor of one element, got {type(loss).__name__}")


def check_max_norm(max_norm: object) -> None:
    """Raises ArgumentError if `max_norm` is not a number above zero: a negative one would turn the gradients round."""
    if not _is_number(max_norm) or not max_norm > 0:  # type: ignore[operator]
        raise ArgumentError(f"max_norm: needed a number above 0, got {max_norm!r}")


def _is_number(value: object) -> bool:
    """Returns whether a value is a real number of Python or NumPy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
