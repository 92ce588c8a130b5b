"""Checks of what a user hands to `attach` and to a probe: each error names the argument, the need and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from gradprobe.errors import ArgumentError

When = Literal["auto", "step", "backward", "hook"]
MOMENTS: tuple[When, ...] = ("auto", "step", "backward", "hook")


def check_attach(
    model: object,
    optimizer: object,
    params: object,
    junctions: object,
    updates: object,
    every: object,
    activations_every: object,
    updates_every: object,
    capacity: object,
    when: object,
    grad_scaler: object,
) -> None:
    """Raises ArgumentError where an argument of `attach` is not of its kind."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: need a torch.nn.Module; got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer: need a torch.optim.Optimizer or None; got {type(optimizer).__name__}")
    if params is not True:
        raise ArgumentError(f"params: need True, since steps are told by the gradients of parameters; got {params!r}")
    if not isinstance(junctions, bool):
        raise ArgumentError(f"junctions: need True or False; got {junctions!r}")
    if not isinstance(updates, bool):
        raise ArgumentError(f"updates: need True or False; got {updates!r}")
    if updates and optimizer is None:
        raise ArgumentError("updates: need the optimizer that makes them, as optimizer=; got None")
    counts = {
        "every": every,
        "activations_every": activations_every,
        "updates_every": updates_every,
        "capacity": capacity,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}: need an integer of at least 1; got {value!r}")
    if when not in MOMENTS:
        raise ArgumentError(f"when: need one of {', '.join(MOMENTS)}; got {when!r}")
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise ArgumentError(f"grad_scaler: need a torch.amp.GradScaler or None; got {type(grad_scaler).__name__}")


def check_shares_parameters(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    """Raises ArgumentError where an optimizer steps none of the parameters."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if stepped.isdisjoint(id(parameter) for parameter in parameters):
        raise ArgumentError("optimizer: need one that steps parameters of the model; it steps none of them")


def check_loss(loss: object) -> None:
    """Raises ArgumentError where a loss is no real number, nor a tensor of one."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ArgumentError(f"loss: need one real number; got a tensor of shape {tuple(loss.shape)}, {loss.dtype}")
    elif loss is not None and (isinstance(loss, bool) or not isinstance(loss, (int, float))):
        raise ArgumentError(f"loss: need a number or a tensor of one element; got {type(loss).__name__}")


def check_max_norm(max_norm: object) -> None:
    """Raises ArgumentError where `max_norm` is no number."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
        raise ArgumentError(f"max_norm: need a number; got {max_norm!r}")
