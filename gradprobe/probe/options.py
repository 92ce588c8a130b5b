"""The options of `attach`, and checks of user input. Errors name the argument, what was needed and what was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.activations import Selection

When = Literal["auto", "step", "backward", "hook"]
WHEN_CHOICES: tuple[When, ...] = ("auto", "step", "backward", "hook")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `attach`, which describes them.

    Raises:
        ArgumentError: An option is invalid.
    """

    optimizer: torch.optim.Optimizer | None
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
    grad_scaler: torch.amp.GradScaler | None

    def __post_init__(self) -> None:
        if self.optimizer is not None and not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer: needed a torch.optim.Optimizer or None, got {type(self.optimizer).__name__}"
            )
        if self.params is not True:
            raise ArgumentError(
                f"params: needed True, since the gradients of parameters mark the steps, got {self.params!r}"
            )
        for name in ("junctions", "updates"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: needed True or False, got {getattr(self, name)!r}")
        if self.updates and self.optimizer is None:
            raise ArgumentError("updates: needed optimizer=, the optimizer that makes them, got None")
        for name in ("every", "activations_every", "updates_every", "capacity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: needed an integer of at least 1, got {value!r}")
        if self.when not in WHEN_CHOICES:
            raise ArgumentError(f"when: needed one of {', '.join(WHEN_CHOICES)}, got {self.when!r}")
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise ArgumentError(
                f"grad_scaler: needed a torch.amp.GradScaler or None, got {type(self.grad_scaler).__name__}"
            )

    @property
    def measured_at(self) -> When:
        """When gradients are measured, "auto" resolved."""
        if self.when != "auto":
            return self.when
        return "step" if self.optimizer is not None else "backward"


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
    elif loss is not None and (isinstance(loss, bool) or not isinstance(loss, (int, float))):
        raise ArgumentError(f"loss: needed a number or a tensor of one element, got {type(loss).__name__}")


def check_max_norm(max_norm: object) -> None:
    """Raises ArgumentError if `max_norm` is not a number."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
        raise ArgumentError(f"max_norm: needed a number, got {max_norm!r}")
