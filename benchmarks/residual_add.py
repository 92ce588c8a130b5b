"""Times `residual_add` with a ReLU, forward and backward, against `torch.relu(x + f)`, with and without statistics.

The statistics are the six of `gradprobe.STATS`, of three tensors: the result in the forward pass, and the incoming and
outgoing gradients in the backward pass. "separate" computes them in two calls of `grad_stats_into`; "fused" computes
them in the same pass as the sum, as in a residual add that a probe observes. The operands count as outputs of other
modules, whose statistics the probe already has.

Times are CPU times of one thread, which other load on the machine hardly affects. The variants run in turn within each
round, and ratios are taken within a round.

Columns: time per forward and backward pass in µs (median over the rounds, and quartiles), and its ratio to that of
`relu(x + f)` without and with separate statistics (median and quartiles).

    python benchmarks/residual_add.py [--rounds 200]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _machine import keep_memory, processor
from torch import Tensor

import gradprobe
from gradprobe import ops
from gradprobe.observers.event_rows import MOST_EVENTS
from gradprobe.ops.libraries import native_hooks
from gradprobe.snapshot.records import JUNCTION_KINDS

SHAPES = ((64, 16, 32, 32), (64, 64, 8, 8))
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_memory()
    print(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}")
    for shape in SHAPES:
        for name, memory_format in FORMATS.items():
            compare(f"{'x'.join(map(str, shape))} float32 {name}", shape, memory_format, rounds)


def compare(title: str, shape: tuple[int, ...], memory_format: torch.memory_format, rounds: int) -> None:
    """Times the variants in turn and prints each against bare torch and against torch with statistics."""
    leaf_x, leaf_f, grad_y = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3))
    leaf_x.requires_grad_()
    leaf_f.requires_grad_()
    rows = torch.empty(3, len(gradprobe.STATS), dtype=torch.float64)  # [3, 6]
    backend = ops.resolve("auto", leaf_x.device)
    module, reason = native_hooks()
    if module is None:
        raise SystemExit(f"the C++ hooks are needed: {reason}")
    log = module.EventRows(MOST_EVENTS, len(JUNCTION_KINDS), False)
    hooks = module.JunctionHooks(log, 1, 0)

    def operands() -> tuple[Tensor, Tensor]:
        return leaf_x.view_as(leaf_x), leaf_f.view_as(leaf_f)

    def torch_alone() -> None:
        x, f = operands()
        torch.autograd.grad(torch.relu(x + f), (x, f), grad_y)

    def torch_and_statistics() -> None:
        x, f = operands()
        y = torch.relu(x + f)
        ops.grad_stats_into([y.detach()], rows[:1], backend)
        grad_x, _ = torch.autograd.grad(y, (x, f), grad_y)
        ops.grad_stats_into([grad_y, grad_x], rows[1:], backend)

    def ours_alone() -> None:
        x, f = operands()
        torch.autograd.grad(gradprobe.residual_add(x, f, relu=True), (x, f), grad_y)

    def ours_and_statistics() -> None:
        x, f = operands()
        hooks.start_step()
        log.clear()
        log.remember(x, rows[:1])
        log.remember(f, rows[1:2])
        torch.autograd.grad(hooks.join(0, x, f, True), (x, f), grad_y)

    ways: dict[str, Callable[[], None]] = {
        "relu(x + f)": torch_alone,
        "relu(x + f), separate statistics": torch_and_statistics,
        "residual_add": ours_alone,
        "residual_add, fused statistics": ours_and_statistics,
    }
    repeats = max(1, 2**21 // leaf_x.numel())
    times_us: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            run()
            start = time.process_time()
            for _ in range(repeats):
                run()
            times_us[way].append((time.process_time() - start) * 1e6 / repeats)
    print(f"\n{title}")
    print(
        f"{'forward + backward':34}{'µs: median':>12}{'quartiles':>18}"
        f"{'to bare torch':>24}{'to torch + statistics':>26}"
    )
    bare, separate = (np.array(times_us[way]) for way in list(ways)[:2])
    for way, taken in times_us.items():
        low, middle, high = np.percentile(taken, [25, 50, 75])
        columns = [ratio(np.array(taken) / other) for other in (bare, separate)]
        print(f"{way:34}{middle:12.0f}{f'{low:.0f} … {high:.0f}':>18}{columns[0]:>24}{columns[1]:>26}")


def ratio(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    """Formats the median and quartiles of one ratio per round."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} … {high:.2f})"


if __name__ == "__main__":
    main()
