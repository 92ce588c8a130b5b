"""Times the networks' own layers on the CPU, each alone and in a training step, against torch's.

Layers: the 3x3 convolution of `gradprobe.nn.convolution`, and batch normalisation with ReLU, with or without a residual
add, in one pass (`gradprobe.nn.batch_norm.BatchNorm2d.in_one_pass`). torch's are `torch.nn.Conv2d`,
`torch.nn.BatchNorm2d` and then `torch.relu` or `residual_add`. "control" is a second copy of torch's: its ratio shows
the noise. The networks are `gradprobe.networks.resnet`; they train in channels-last memory, and a probe, if there is
one, observes every step's gradients and no other signal.

Times are CPU times of all threads, which other load on the machine hardly affects. The variants run in turn within each
round, and ratios are taken within a round.

Columns: CPU time in ms per forward and backward pass, or per training step (median over the rounds, and quartiles), and
its ratio to that of torch's (median and quartiles).

    python benchmarks/layers.py [--rounds 100] [--threads 1] [--depth 56] [--size 8]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from _machine import keep_memory, processor
from torch import Tensor, nn
from torch.nn import functional as F

import gradprobe
from gradprobe import networks
from gradprobe.nn.batch_norm import BatchNorm2d
from gradprobe.nn.convolution import Conv2d
from gradprobe.ops.residual import residual_add

SHAPES = ((128, 16, 8, 8), (128, 32, 4, 4), (128, 64, 2, 2), (128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))
BATCH = 128
OURS, TORCH, CONTROL = "ours", "torch", "control"
KINDS = (OURS, TORCH, CONTROL)
# In a training step: which of the layers are torch's.
WITHOUT: dict[str, tuple[type[nn.Module], ...]] = {
    OURS: (),
    "without convolution": (Conv2d,),
    "without normalisation": (BatchNorm2d,),
    TORCH: (Conv2d, BatchNorm2d),
    CONTROL: (Conv2d, BatchNorm2d),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--size", type=int, default=8, help="height and width of the images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    print(f"{processor()}, {options.threads} threads; torch {torch.__version__}, python {platform.python_version()}")
    print(f"backends: {gradprobe.backends()}\n")
    print(f"{'':44}{'ms: median':>12}{'quartiles':>18}{'to torch':>24}")
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        compare(f"{name} convolution", {kind: convolution(kind, shape) for kind in KINDS}, options.rounds, 8)
        for adds in (False, True):
            title = f"{name} {'norm, add, relu' if adds else 'norm, relu'}"
            compare(title, {kind: normalisation(kind, shape, adds) for kind in KINDS}, options.rounds, 8)
    for probed in (False, True):
        title = f"resnet-{options.depth}, {BATCH} x {options.size} x {options.size}{', probe' if probed else ''}"
        steps = {kind: training(kind, options.depth, options.size, probed) for kind in WITHOUT}
        compare(title, steps, options.rounds, 1)


def drawn(shape: tuple[int, ...]) -> Tensor:
    """Returns random numbers in channels-last memory."""
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def convolution(kind: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """Returns a function that runs a convolution forward and backward."""
    x, grad = drawn(shape).requires_grad_(), drawn(shape)
    made = (Conv2d if kind == OURS else nn.Conv2d)(shape[1], shape[1], 3, padding=1, bias=False)
    conv = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    node = conv(x).grad_fn.name()
    if (node == "ConvolutionBackward") != (kind == OURS):
        raise SystemExit(f"{kind} is computed by {node}: see gradprobe doctor")

    def both_ways() -> None:
        torch.autograd.grad(conv(x), (x, conv.weight), grad)

    return both_ways


def normalisation(kind: str, shape: tuple[int, ...], adds: bool) -> Callable[[], None]:
    """Returns a function that runs a normalisation with ReLU forward and backward."""
    x, shortcut, grad = (drawn(shape) for _ in range(3))
    leaves = [x.requires_grad_(), *([shortcut.requires_grad_()] if adds else [])]
    norm = BatchNorm2d(shape[1]) if kind == OURS else nn.BatchNorm2d(shape[1])

    def once() -> Tensor:
        if isinstance(norm, BatchNorm2d):
            y = norm.in_one_pass(x, shortcut if adds else None, relu=True)
            if y is None:
                raise SystemExit("the C++ hooks are needed: see gradprobe doctor")
            return y
        return residual_add(shortcut, norm(x), relu=True) if adds else torch.relu(norm(x))

    def both_ways() -> None:
        torch.autograd.grad(once(), [*leaves, *norm.parameters()], grad)

    return both_ways


def training(kind: str, depth: int, size: int, probed: bool) -> Callable[[], None]:
    """Returns a function that runs a training step."""
    torch.manual_seed(0)
    model = networks.resnet(depth, in_channels=1).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, WITHOUT[kind]):
            module.__class__ = nn.Conv2d if isinstance(module, Conv2d) else nn.BatchNorm2d
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    probe = gradprobe.attach(model, optimizer=optimizer, activations_every=10**9) if probed else None
    images = torch.rand(BATCH, 1, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step.__dict__["probe"] = probe  # lives as long as the function
    return step


def compare(title: str, ways: dict[str, Callable[[], None]], rounds: int, repeats: int) -> None:
    """Times the variants in turn, in an order that rotates, and prints each against torch's."""
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for k in range(len(ways)):
            way = list(ways)[(number + k) % len(ways)]
            ways[way]()
            start = time.process_time()
            for _ in range(repeats):
                ways[way]()
            times_ms[way].append((time.process_time() - start) * 1e3 / repeats)
    base = np.array(times_ms[TORCH])
    for way, taken in times_ms.items():
        low, middle, high = np.percentile(taken, [25, 50, 75])
        ratios = np.percentile(np.array(taken) / base, [25, 50, 75])
        print(
            f"{title + ', ' + way:44}{middle:12.3f}{f'{low:.3f} … {high:.3f}':>18}"
            f"{f'{ratios[1]:.3f} ({ratios[0]:.3f} … {ratios[2]:.3f})':>24}"
        )
    print()


if __name__ == "__main__":
    main()
