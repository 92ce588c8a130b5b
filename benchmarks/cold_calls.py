"""Measures what a call costs when the training's own tensors have pushed its code and data out of the cache.

In a loop of its own a call finds everything in the cache. Between two operators of a training it does not: each of them
reads and writes more than a core's cache holds. Here every call is made right after such an operator, in random order,
on 64 elements, so that nothing but the call itself takes time.

    python benchmarks/cold_calls.py [--rounds 300] [--megabytes 4]

Prints the median time of each call alone and after the operator, µs, with quartiles.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from _machine import keep_memory, processor
from torch import nn

import gradprobe
from gradprobe.ops.statistics import raw_rows

WARM_UP = 50  # calls


def forward(hooks: str) -> Callable[[], object]:
    """Returns the forward pass of a small layer: without hooks, with an empty one, or observed by a probe."""
    layer = nn.Linear(8, 8)
    x = torch.randn(8, 8)
    if hooks == "empty":
        layer.register_forward_hook(lambda module, inputs, output: None)
    if hooks == "observed":
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-9)
        probe = gradprobe.attach(layer, optimizer=optimizer, activations=True)
        return lambda: (layer(x), probe)  # a probe that nobody holds is detached
    return lambda: layer(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--megabytes", type=float, default=4.0, help="size of the operator's input and output")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}")
    small = [torch.randn(64)]
    calls: dict[str, Callable[[], object]] = {
        "Tensor.norm": small[0].norm,
        "six statistics": lambda: raw_rows(small),
        "layer without hooks": forward("none"),
        "layer with an empty hook": forward("empty"),
        "layer observed by a probe": forward("observed"),
    }
    # Many tensors, because one that is used again and again stays in the cache.
    large = [torch.randn(int(arguments.megabytes * 2**18)) for _ in range(20)]
    generator = np.random.default_rng(0)
    taken_us = {name: np.empty((2, arguments.rounds)) for name in calls}
    for name, call in calls.items():
        for k in range(-WARM_UP, arguments.rounds):
            start = time.perf_counter()
            call()
            taken_us[name][0, k] = (time.perf_counter() - start) * 1e6
    for k in range(arguments.rounds):
        for name in generator.permutation([*calls]):
            torch.clamp_min(large[k % 20], 0.0, out=large[(k + 1) % 20])
            start = time.perf_counter()
            calls[name]()
            taken_us[name][1, k] = (time.perf_counter() - start) * 1e6
    print(f"{'call':28}{'alone, µs':>24}{f'after {arguments.megabytes:g} MB, µs':>24}")
    for name, times_us in taken_us.items():
        shown = [" … ".join(f"{q:.1f}" for q in np.quantile(times, [0.25, 0.5, 0.75])) for times in times_us]
        print(f"{name:28}{shown[0]:>24}{shown[1]:>24}")


if __name__ == "__main__":
    main()
