"""Measures the time that observing activations and residual adds adds to a training step, against ordinary hooks.

The step is forward, backward and SGD of a ResNet-56, batch 64, on handwritten digits enlarged to CIFAR's size. Every
way of observing has its own copy of the network, and the ways take steps in turn, in random order, so that other load
on the machine affects all of them alike. A round is ten steps of each way: the distance between measured steps of
every=10. Each step is divided by the bare step of the same turn. Each of the ten positions takes its median over the
rounds, since a single step may stall for long; the result is the mean of the ten medians.

Columns: the share of the bare step that a way adds, and its bootstrapped 90 % interval. A second bare copy shows how
large a difference noise alone makes.

Freed memory is kept. By default glibc returns much of it to the system and requests it again, in a pattern that differs
between processes: bare steps then have between 0 and 18,000 page faults, up to 10 % of the step, with or without a
probe. The addresses of a step's tensors are randomised by blocks of random size allocated before it, since backward
takes up to 10 % longer at some addresses than at others (Mytkowicz et al. 2009, "Producing Wrong Data Without Doing
Anything Obviously Wrong!").

    python benchmarks/signals_overhead.py [--rounds 20] [--threads N] [--ways "all, every=10" ...]
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from _digits import enlarged_digits
from _intervals import interval
from _machine import keep_memory, processor
from numpy.typing import NDArray
from torch import nn

import gradprobe
from gradprobe.observers.activations import select_modules
from gradprobe.observers.junctions import junction_modules

BATCH = 64
STEPS = 10  # per way and round
LARGEST_SHIFT = 2**18  # float32 elements

Install = Callable[[nn.Module, torch.optim.Optimizer], object]


def empty_forward_hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Registers empty hooks on the modules that a probe hooks: the cost of hooks in torch itself."""

    def ignore(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        pass

    for module in select_modules(model, True, elsewhere=junction_modules(model)[0]).values():
        module.register_forward_hook(ignore)


def full_backward_hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Registers the hooks that most scripts use to see gradients between layers."""
    norms: dict[int, float] = {}

    def keep(module: nn.Module, grad_input: object, grad_output: tuple[torch.Tensor, ...]) -> None:
        norms[id(module)] = grad_output[0].norm().item()

    for module in model.modules():
        if not any(module.children()):
            module.register_full_backward_hook(keep)


def attach(**options: object) -> Install:
    """Installs a probe with these options."""
    return lambda model, optimizer: gradprobe.attach(model, optimizer=optimizer, **options)  # type: ignore[arg-type]


BARE = "bare step"
WAYS: dict[str, Install] = {
    BARE: lambda model, optimizer: None,
    "a second bare copy": lambda model, optimizer: None,
    "forward hooks that do nothing": empty_forward_hooks,
    "full backward hooks, .norm().item()": full_backward_hooks,
    "parameters": attach(junctions=False),
    "parameters, residual adds": attach(),
    "parameters, residual adds, activations": attach(activations=True),
    "all, every=10": attach(activations=True, every=10),
    "parameters, magnitudes_every=10": attach(junctions=False, magnitudes=True, magnitudes_every=10),
    "all, magnitudes_every=10": attach(activations=True, magnitudes=True, magnitudes_every=10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ways to compare; all by default"
    )
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network = gradprobe.networks.resnet(56, in_channels=1)
    images, labels = enlarged_digits(BATCH)
    print(f"{processor()}, {arguments.threads} threads; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}")

    contestants = {}
    ways = list(dict.fromkeys([BARE, *arguments.ways]))
    for way in ways:
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        contestants[way] = (model, optimizer, WAYS[way](model, optimizer))

    generator = np.random.default_rng(0)

    def step_ms(way: str) -> float:
        model, optimizer, _ = contestants[way]
        shift = [torch.empty(n) for n in generator.integers(LARGEST_SHIFT, size=8)]
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        taken = (time.perf_counter() - start) * 1e3
        del shift
        return taken

    taken_ms = {way: np.empty((arguments.rounds + 1, STEPS)) for way in ways}
    gc.disable()
    for number in range(arguments.rounds + 1):
        for k in range(STEPS):
            for way in generator.permutation(ways):
                taken_ms[way][number, k] = step_ms(way)
        gc.collect()
    taken_ms = {way: taken[1:] for way, taken in taken_ms.items()}  # the first round warms up
    bare = taken_ms.pop(BARE)
    print(f"\nbare step: {np.median(bare):.1f} ms, {len(bare)} rounds of {STEPS} steps")
    print(f"{'way':40}{'added':>10}{'90 % interval':>20}")
    for way, taken in taken_ms.items():
        added = taken / bare - 1  # [rounds, STEPS]
        least, most = interval(added, mean_of_medians)
        print(f"{way:40}{mean_of_medians(added):10.2%}{f'{least:.2%} … {most:.2%}':>20}")


def mean_of_medians(added: NDArray[np.float64]) -> float:
    """Averages the medians of the steps. [n_rounds, STEPS]."""
    return float(np.median(added, axis=0).mean())


if __name__ == "__main__":
    main()
