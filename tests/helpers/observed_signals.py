"""The signals of a model observed without the rest of a probe, and one step of training by hand."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import gradprobe
from gradprobe.observers import junctions
from gradprobe.observers.activations import select_modules
from gradprobe.observers.fence import Fence
from gradprobe.observers.signals import SignalObserver
from gradprobe.snapshot.records import Events
from gradprobe.snapshot.signals import Signals, SignalTable


class Observed:
    """The signals of a model, step by step, without the rest of a probe."""

    def __init__(self, model: nn.Module, strict: bool = False) -> None:
        joined, _ = junctions.junction_modules(model)
        chosen = select_modules(model, True, elsewhere=joined)
        self.table = SignalTable(tuple(chosen), tuple(joined), tuple(type(one).__name__ for one in chosen.values()))
        self.fence = Fence(strict)
        self.observer = SignalObserver(self.table, chosen, joined, torch.device("cpu"), "auto", self.fence)
        self.messages: list[str] = []

    def close(self) -> Signals | None:
        rows = torch.full((self.table.n_sites, 6), 7.0, dtype=torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            events: Events | None = self.observer.close(rows)
        self.messages += [str(one.message) for one in caught if issubclass(one.category, gradprobe.GradprobeWarning)]
        return None if events is None else Signals(self.table, rows.numpy(), events, 1.0)


def step(model: nn.Module, k: int, x: torch.Tensor | None = None) -> None:
    """One step of training by hand."""
    generator = torch.Generator().manual_seed(k)
    (model(torch.randn(5, 3, generator=generator) if x is None else x)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def names_of(signals: Signals | None) -> tuple[list[str], list[str]]:
    return ([], []) if signals is None else (list(signals.activations), list(signals.junctions))
