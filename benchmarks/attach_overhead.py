"""Measures the time that `gradprobe.attach` adds to a training step, against a hook written by hand.

For work on gradprobe itself: it resolves what an option of `attach` costs. peers.py compares with other tools.

There are two models: 1,000 small parameters (500 Linear(16), which show the cost per tensor) and a ResNet-20. In each
round, every way of measuring is installed in turn, in random order, for two warm-up steps and sixteen timed ones, so
that a drift in the machine's speed affects all ways alike. (Sixteen, because finished steps are searched for NaN in
batches of sixteen.) Times are CPU times of the only thread, with Python's cyclic garbage collector off. A way's time in
a round is the mean of its timed steps, minus the bare step of the same round.

Columns: time added to the bare step in ms (median over the rounds, and quartiles), and that median as a share of the
bare step. "skipped" are steps that `every` does not measure. The last line is the ratio of attach, with parameters
only, to the hook written by hand, with a bootstrapped 90 % interval.

    python benchmarks/attach_overhead.py [--rounds 150]
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
from _intervals import interval
from _machine import processor
from numpy.typing import NDArray
from torch import nn

import gradprobe
from gradprobe.ops.libraries import native_hooks

WARM_UP, TIMED = 2, 16  # steps per way and round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=150)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}; C++ hooks: {native_hooks()[1]}")
    small = nn.Sequential(*(nn.Linear(16, 16) for _ in range(500)))
    compare("1,000 small parameters", small, torch.randn(4, 16), rounds)
    compare("ResNet-20, batch 32", gradprobe.networks.resnet(20), torch.randn(32, 3, 32, 32), max(10, rounds // 4))


def compare(title: str, model: nn.Module, x: torch.Tensor, rounds: int) -> None:
    """Times the ways in turn and prints the time that each adds to the bare step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "bare step": lambda: lambda: None,
        "Python hook, grad.norm()": lambda: python_hooks(model),
        "attach": lambda: gradprobe.attach(model, optimizer=optimizer, junctions=False).detach,
        "attach, updates too": lambda: (
            gradprobe.attach(model, optimizer=optimizer, junctions=False, updates=True).detach
        ),
        "attach, skipped": lambda: gradprobe.attach(model, optimizer=optimizer, every=WARM_UP + TIMED).detach,
    }
    if any(isinstance(module, gradprobe.nn.ResidualAdd) for module in model.modules()):
        ways["attach, junctions"] = lambda: gradprobe.attach(model, optimizer=optimizer).detach
    generator = np.random.default_rng(0)
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    gc.disable()
    for _ in range(rounds):
        for way in generator.permutation(list(ways)):
            leave = ways[way]()
            steps_ms = []
            for _ in range(WARM_UP + TIMED):
                start = time.thread_time()
                step()
                steps_ms.append((time.thread_time() - start) * 1e3)
            times_ms[way].append(statistics.fmean(steps_ms[WARM_UP:]))
            leave()
        gc.collect()
    gc.enable()
    bare = np.array(times_ms["bare step"])
    added = {way: np.array(times_ms[way]) - bare for way in list(ways)[1:]}  # [rounds] each
    print(f"\n{title}: bare step {np.median(bare):.2f} ms, {rounds} rounds")
    print(f"{'way':32}{'added, ms: median':>20}{'quartiles':>18}{'of the step':>14}")
    for way, difference in added.items():
        low, middle, high = np.percentile(difference, [25, 50, 75])
        print(f"{way:32}{middle:20.3f}{f'{low:.3f} … {high:.3f}':>18}{middle / np.median(bare):14.1%}")
    ours, by_hand = added["attach"], added["Python hook, grad.norm()"]
    low, high = interval(np.stack([ours, by_hand], axis=1), ratio_of_medians)
    print(f"attach / Python hook with grad.norm(): {np.median(ours) / np.median(by_hand):.3f} ({low:.3f} … {high:.3f})")


def ratio_of_medians(pairs: NDArray[np.float64]) -> float:
    """Divides the medians of two columns. [n_rounds, 2]."""
    first, second = np.median(pairs, axis=0)
    return float(first / second)


def python_hooks(model: nn.Module) -> Callable[[], None]:
    """Registers the hook that most scripts use, which keeps the norm of each gradient."""
    norms: dict[int, torch.Tensor] = {}

    def keep(parameter: torch.Tensor) -> None:
        norms[id(parameter)] = parameter.grad.norm()

    handles = [parameter.register_post_accumulate_grad_hook(keep) for parameter in model.parameters()]

    def leave() -> None:
        for handle in handles:
            handle.remove()

    return leave


if __name__ == "__main__":
    main()
