"""Cases in which a sharded model has frozen parameters, or a probe of it is read by another thread."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gradprobe

Summary = dict[str, Any]
_N_STEPS = 6


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def frozen_unit(keeps_names: bool, rank: int, n_ranks: int) -> Summary:
    """FSDP1 manages a layer of which nothing is trained."""
    model = _net()
    model[0].requires_grad_(requires_grad=False)
    for k in (0, 2, 4):
        model[k] = FullyShardedDataParallel(model[k], use_orig_params=keeps_names, device_id=torch.device("cpu"))
    wrapped = FullyShardedDataParallel(model, use_orig_params=keeps_names, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    with gradprobe.attach(wrapped, optimizer=optimizer, strict=True) as probe:
        _loss(wrapped, rank, 0).backward()
        parts = [p.grad.double().square().sum() for p in wrapped.parameters() if p.grad is not None]
        truth = torch.stack([*parts, torch.zeros((), dtype=torch.float64)]).sum()
        dist.all_reduce(truth)
        optimizer.step()
        snapshot = probe.latest(wait=True)
        assert snapshot is not None
        return {"norm": snapshot.total_norm, "truth": truth.sqrt().item(), "n_observed": len(snapshot)}


def unfrozen(rank: int, n_ranks: int) -> Summary:
    """A layer of FSDP2 is unfrozen while the probe is attached."""
    model = _net()
    model[0].requires_grad_(requires_grad=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = gradprobe.attach(model, optimizer=optimizer)
        for step in range(4):
            if step == 2:
                model[0].requires_grad_(requires_grad=True)
            optimizer.zero_grad()
            _loss(model, rank, step).backward()
            optimizer.step()
        observed = [sorted(snapshot.sites) for snapshot in probe.history()]
        coverage = probe.coverage()
        probe.detach()
    told = [str(each.message) for each in caught if issubclass(each.category, gradprobe.GradprobeWarning)]
    return {"observed": observed, "unknown": coverage.unknown, "failures": coverage.failures, "told": told}


def read_by_a_thread(rank: int, n_ranks: int) -> Summary:
    """Another thread reads all the time."""
    model = _net()
    fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    errors: list[str] = []
    is_over = threading.Event()
    with gradprobe.attach(model, optimizer=optimizer, strict=True) as probe:

        def read() -> None:
            try:
                while not is_over.is_set():
                    probe.latest()
            except Exception as error:  # noqa: BLE001
                errors.append(repr(error))

        reader = threading.Thread(target=read)
        reader.start()
        for step in range(_N_STEPS):
            optimizer.zero_grad()
            _loss(model, rank, step).backward()
            optimizer.step()
            probe.step(float(step))
        is_over.set()
        reader.join()
        return {"errors": errors, "steps": [(one.step, one.loss, len(one)) for one in probe.history()]}


def reduced_activations(rank: int, n_ranks: int) -> Summary:
    """Activations of a data-parallel model, reduced over the ranks, beside those of all ranks put together."""
    model = _net()
    fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
    outputs: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    with gradprobe.attach(model, activations=True, reduce_activations=True, strict=True) as probe:
        _loss(model, rank, 0).backward()
        probe.step()
        snapshot = probe.latest(wait=True)
        assert snapshot is not None
        assert snapshot.signals is not None
        parts = [torch.empty_like(outputs[0]) for _ in range(n_ranks)]
        dist.all_gather(parts, outputs[0])
        whole = torch.cat(parts).double()
        seen = snapshot.activations["1"].output
        return {
            "seen": [seen.norm, seen.mean, seen.abs_max, float(seen.numel)],
            "truth": [whole.norm().item(), whole.mean().item(), whole.abs().max().item(), float(whole.numel())],
            "reduction": snapshot.signals.reduction,
        }
