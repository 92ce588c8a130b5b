"""What observing activations and residual junctions adds to a training step, against the ways of others.

A ResNet-56, batch 64, on random images of CIFAR's size: forward, backward, SGD. The ways take turns step by step, so
that they meet the same machine; each is compared with the bare steps beside it; medians with the quartiles.

    python benchmarks/signals_overhead.py [--rounds 12] [--threads N]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from _machine import processor
from torch import nn

import gradprobe

BLOCK = 10  # steps in a row for each way: as many as every=10 has between two that it measures

Leave = Callable[[], object]


def full_backward_hooks(model: nn.Module) -> Leave:
    """Registers what most people write to see gradients between layers."""
    norms: dict[int, float] = {}

    def keep(module: nn.Module, grad_input: object, grad_output: tuple[torch.Tensor, ...]) -> None:
        norms[id(module)] = grad_output[0].norm().item()

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_full_backward_hook(keep) for module in leaves]
    return lambda: [handle.remove() for handle in handles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = gradprobe.networks.resnet(56)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    print(f"{processor()}, {arguments.threads} threads; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}")

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return (time.perf_counter() - start) * 1e3

    def attached(**options: object) -> Callable[[], Leave]:
        return lambda: gradprobe.attach(model, optimizer=optimizer, **options).detach  # type: ignore[arg-type]

    ways: dict[str, Callable[[], Leave]] = {
        "full backward hooks, .norm().item()": lambda: full_backward_hooks(model),
        "parameters": attached(junctions=False),
        "parameters, junctions": attached(),
        "parameters, junctions, activations": attached(activations=True),
        "all, every=10": attached(activations=True, every=10),
    }
    bare: list[float] = []
    added: dict[str, list[float]] = {way: [] for way in ways}  # of the step, one entry for each round
    step()
    for _ in range(arguments.rounds):
        for way, enter in ways.items():
            before = [step() for _ in range(BLOCK)]
            leave = enter()
            during = [step() for _ in range(BLOCK)]
            leave()
            bare.append(float(np.median(before)))
            # the mean of one way's steps, of which not all do the same, against the mean of the bare ones
            added[way].append(float(np.mean(during) / np.mean(before) - 1))
    print(f"\nbare step: {np.median(bare):.1f} ms")
    print(f"{'observed':40}{'added: median':>14}{'quartiles':>22}")
    for way, shares in added.items():
        low, middle, high = np.percentile(shares, [25, 50, 75])
        print(f"{way:40}{middle:14.2%}{f'{low:.2%} … {high:.2%}':>22}")


if __name__ == "__main__":
    main()
