"""What observing activations and residual junctions adds to a training step, against the ways of others.

A ResNet-56, batch 64, on handwritten digits enlarged to CIFAR's size: forward, backward, SGD. In each round every way
is installed in turn, in random order, for a step that is not timed and ten that are: as many as every=10 has between
two that it measures. A way's time in a round is the mean of its steps, compared with that of the bare steps of the same
round: medians with the quartiles over the rounds, and the interval that holds the median in 90 % of resampled runs.

Memory that is freed is kept. By default glibc hands much of it back and takes it again, in a pattern that differs from
one process to the next: bare steps then have from none to 18,000 page faults, up to 10 % of the step, with or without a
probe.

    python benchmarks/signals_overhead.py [--rounds 20] [--threads N]
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from _machine import keep_memory, processor
from torch import nn

import gradprobe
from gradprobe.experiments.data import load

BATCH = 64
WARM_UP, TIMED = 1, 10  # steps of a visit

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
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = gradprobe.networks.resnet(56, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    digits = load("digits")
    images = nn.functional.interpolate(digits.train_x[:BATCH], size=32, mode="bilinear")
    labels = digits.train_y[:BATCH]
    print(f"{processor()}, {arguments.threads} threads; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}")

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def attached(**options: object) -> Callable[[], Leave]:
        return lambda: gradprobe.attach(model, optimizer=optimizer, **options).detach  # type: ignore[arg-type]

    ways: dict[str, Callable[[], Leave]] = {
        "bare step": lambda: lambda: None,
        "full backward hooks, .norm().item()": lambda: full_backward_hooks(model),
        "parameters": attached(junctions=False),
        "parameters, junctions": attached(),
        "parameters, junctions, activations": attached(activations=True),
        "all, every=10": attached(activations=True, every=10),
    }
    generator = np.random.default_rng(0)
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    gc.disable()
    for _ in range(arguments.rounds):
        for way in generator.permutation(list(ways)):
            leave = ways[way]()
            steps_ms = []
            for _ in range(WARM_UP + TIMED):
                start = time.perf_counter()
                step()
                steps_ms.append((time.perf_counter() - start) * 1e3)
            times_ms[way].append(statistics.fmean(steps_ms[WARM_UP:]))
            leave()
        gc.collect()
    bare = np.array(times_ms.pop("bare step"))
    resampled = generator.integers(0, len(bare), (2000, len(bare)))
    print(f"\nbare step: {np.median(bare):.1f} ms, {len(bare)} rounds of {TIMED} steps")
    print(f"{'observed':40}{'added: median':>14}{'90 % interval':>20}{'quartiles':>20}")
    for way, taken in times_ms.items():
        added = np.array(taken) / bare - 1
        low, middle, high = np.percentile(added, [25, 50, 75])
        least, most = np.percentile(np.median(added[resampled], axis=1), [5, 95])
        print(f"{way:40}{middle:14.2%}{f'{least:.2%} … {most:.2%}':>20}{f'{low:.2%} … {high:.2%}':>20}")


if __name__ == "__main__":
    main()
