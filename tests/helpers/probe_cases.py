"""What the tests of the probe share: a small network, its loss and optimizer, and the norms of its gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def loss_of(model: nn.Module, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return model(x).square().mean()


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def true_norms(model: nn.Module) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(parameter.grad.detach().double().numpy().ravel()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def norms_of(snapshot: gradprobe.Snapshot | None) -> dict[str, float]:
    assert snapshot is not None
    return {name: stats.norm for name, stats in snapshot.sites.items()}


class RejectReads(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, which would stop a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in str(func), "a value was read on the host"
        return func(*args, **(kwargs or {}))


def run_through(model: nn.Module) -> None:
    model.zero_grad()
    x = torch.ones(2, 6)
    for k in range(5):
        x = model[k](x)
    x.sum().backward()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args: object) -> object:
        calls.append(None)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return lambda: len(calls)
