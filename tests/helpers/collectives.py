"""Counts the collectives that a probe adds to the steps of a training."""

from __future__ import annotations

import collections
from typing import Any

import torch
from helpers.layouts import LAYOUTS
from helpers.rank_faults import N_STEPS, Summary, backward, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe


class CountsCollectives(TorchDispatchMode):
    """Counts collectives and their bytes; fails where the value of a tensor is read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        assert "_local_scalar_dense" not in name, "a value was read on the host"
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            self.counts[name] += 1
            if name.startswith("c10d.allreduce_"):
                self.n_bytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def collectives(layout: str, options: dict[str, Any], clips: bool, rank: int, n_ranks: int) -> Summary:
    """Counts per step what the probe adds to the collectives of a training."""
    counted = []
    for attaches in (False, True):
        part, optimizer = build(layout, rank, n_ranks)
        probe = (
            gradprobe.attach(
                part.model, optimizer=optimizer, strict=True, **{"process_group": part.process_group, **options}
            )
            if attaches
            else None
        )
        steps = []
        for step in range(N_STEPS):
            with CountsCollectives() as mode:
                optimizer.zero_grad()
                backward(layout, part, step)
                if clips and probe is not None:
                    probe.clip_grad_norm_(0.1)
                optimizer.step()
            steps.append((mode.counts, mode.n_bytes))
        counted.append(steps)
        if probe is not None:
            probe.detach()
    return _added(*counted)


def collectives_of_many(n_parameters: int, rank: int, n_ranks: int) -> Summary:
    """Counts as `collectives` does, for a number of parameters."""
    counted = []
    for attaches in (False, True):
        torch.manual_seed(0)
        model = Many(n_parameters)
        fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = gradprobe.attach(model, optimizer=optimizer, strict=True) if attaches else None
        steps = []
        for _ in range(3):
            with CountsCollectives() as mode:
                optimizer.zero_grad()
                model(torch.ones(2)).backward()
                optimizer.step()
            steps.append((mode.counts, mode.n_bytes))
        counted.append(steps)
        if probe is not None:
            assert len(probe.history()) == 3
            probe.detach()
    return _added(*counted)


def collectives_of_skipped(rank: int, n_ranks: int) -> Summary:
    """Counts as `collectives` does, with a scaler that skips the second step."""
    layout, counted = "fsdp2", []
    for attaches in (False, True):
        part, optimizer = build(layout, rank, n_ranks)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        probe = gradprobe.attach(part.model, optimizer=optimizer, grad_scaler=scaler, strict=True) if attaches else None
        steps = []
        for step in range(3):
            with CountsAll() as mode:
                optimizer.zero_grad()
                factor = float("inf") if step == 1 else 1.0
                batch = LAYOUTS[layout].batch(torch.Generator().manual_seed(step))
                scaler.scale(part.call(batch).square().mean() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
            steps.append((mode.counts, mode.n_bytes))
        counted.append(steps)
        if probe is not None:
            probe.detach()
    return _added(*counted)


class CountsAll(CountsCollectives):
    """Lets a scaler read whether its gradients were finite."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "_local_scalar_dense" in str(func):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Many(nn.Module):
    """A model of many small parameters."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gains = nn.ParameterList(nn.Parameter(torch.randn(2)) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.stack(list(self.gains)) * x).square().mean()


def _added(bare: list[Any], probed: list[Any]) -> Summary:
    return {
        "counts": [sum((with_ - without).values()) for (without, _), (with_, _) in zip(bare, probed, strict=True)],
        "names": sorted(
            {name for (without, _), (with_, _) in zip(bare, probed, strict=True) for name in with_ - without}
        ),
        "n_bytes": [with_ - without for (_, without), (_, with_) in zip(bare, probed, strict=True)],
    }
