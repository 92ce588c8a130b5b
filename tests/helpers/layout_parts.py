"""Small models, and one rank's part in a training of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Gradients = dict[str, torch.Tensor]
LossOf = Callable[[torch.Tensor], torch.Tensor]
"""Returns the loss of an output, a mean over its rows."""


class Tied(nn.Module):
    """Shares one matrix between its first and its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.hidden(self.embed(tokens))))
        return y


class Normed(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return y


class Unused(nn.Module):
    """Has a layer that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.extra = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def uneven() -> nn.Sequential:
    """Sizes that two and four do not divide; ranks without a row of the last weight."""
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def numbers(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, 8, generator=generator)


def sequences(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, 4, 8, generator=generator)


def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 7, (8,), generator=generator)  # three rows of the embedding stay unused


@dataclass
class Part:
    """One rank's part in a training.

    Attributes:
        model: What the probe is attached to.
        call: The forward pass.
        share: This rank takes every n-th row of the batch, counted from this one.
        process_group: Argument of `attach`.
        around: Entered around each pass; its argument says whether it is the last one of the step.
        gather: Returns the whole gradients, by the name of the parameter, the same on every rank.
        clip: Clips with torch's own function and returns the total norm; None if torch has none that is right here.
        run: Runs forward and backward pass itself, if it is not the usual one.
        parts: Names of the parameters of the model in one process that make up a parameter, if not that of its name.
    """

    model: nn.Module
    call: Callable[[torch.Tensor], torch.Tensor]
    share: tuple[int, int] = (0, 1)
    process_group: Any = None
    around: Callable[[bool], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext()
    gather: Callable[[], Gradients] | None = None
    clip: Callable[[float], torch.Tensor] | None = None
    run: Callable[[torch.Tensor, LossOf], None] | None = None
    parts: Mapping[str, tuple[str, ...]] | None = None

    def backward(self, batch: torch.Tensor, loss_of: LossOf, is_last: bool) -> None:
        """Adds to the gradients those of the loss of this rank's rows of a batch."""
        rows = batch[self.share[0] :: self.share[1]]
        with self.around(is_last):
            if self.run is not None:
                self.run(rows, loss_of)
            else:
                loss_of(self.call(rows)).backward()

    def gradients(self) -> Gradients:
        """Returns the whole gradients, by the name of the parameter. Every rank must call it."""
        return self.gather() if self.gather is not None else gathered(self.model)


def gathered(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
    return found


def clipper(model: nn.Module) -> Callable[[float], torch.Tensor]:
    def clip(max_norm: float) -> torch.Tensor:
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return total.full_tensor() if isinstance(total, DTensor) else total

    return clip


def plain_name(name: str) -> str:
    """Returns the name that a parameter has in the model of one process."""
    for prefix in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name
