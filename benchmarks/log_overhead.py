"""Measures what a run on disk and two sinks add to a training, at every=10.

The step is that of signals_overhead.py: forward, backward and SGD of a ResNet-56, batch 64, on handwritten digits
enlarged to CIFAR's size. Every way has its own copy of the network. The ways take blocks of ten steps in turn, in
random order; a block ends when all its steps are stored and handed to the sinks, so what other threads do counts in
full. Each block is divided by the bare block of the same round.

Columns: median of the share of the bare block that a way adds, its bootstrapped 90 % interval, and the same of the
processor time of the training's thread alone. A second bare copy shows how large a difference noise alone makes. The
last column is the processor time of all other threads, as a share of the bare block: what the log's thread does is the
difference to the bare copy, whatever the noise of the other columns. It means that with `--threads 1` only.

The time that a way adds hardly depends on the batch: small images show it in milliseconds, with less noise.

A round takes half a minute.

    python benchmarks/log_overhead.py [--rounds 10] [--threads N] [--every 10] [--batch-size 64] [--image-size 32]
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _digits import enlarged_digits
from _intervals import interval
from _machine import keep_memory, processor
from torch import nn

import gradprobe
from gradprobe.sinks import CSV, JSONL

STEPS = 10  # per way and round
BARE = "bare block"


def attach(way: str, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, every: int) -> gradprobe.Probe:
    """Attaches what a way stands for."""
    if way == "attach":
        return gradprobe.attach(model, optimizer=optimizer, every=every)
    if way == "attach, log":
        return gradprobe.attach(model, optimizer=optimizer, every=every, log_dir=folder / "log")
    sinks = [JSONL(folder / "steps.jsonl"), CSV(folder / "steps.csv")]
    return gradprobe.attach(model, optimizer=optimizer, every=every, log_dir=folder / "all", sinks=sinks)


def clocks() -> np.ndarray:
    """Returns the time of the wall, of this thread and of the process, s."""
    return np.array([time.perf_counter(), time.thread_time(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network = gradprobe.networks.resnet(56, in_channels=1)
    images, labels = enlarged_digits(arguments.batch_size, arguments.image_size)
    print(f"{processor()}, {arguments.threads} threads; torch {torch.__version__}, python {platform.python_version()}")

    ways = [BARE, "a second bare copy", "attach", "attach, log", "attach, log, two sinks"]
    taken = {way: np.empty((arguments.rounds + 1, 3)) for way in ways}  # wall, thread and process time, s
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        copies = {}
        for k, way in enumerate(ways):
            model = copy.deepcopy(network)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            probe = None if k < 2 else attach(way, model, optimizer, Path(name), arguments.every)
            copies[way] = model, optimizer, probe
        gc.disable()
        for number in range(arguments.rounds + 1):
            for way in generator.permutation(ways):
                model, optimizer, probe = copies[way]
                start = clocks()
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(images), labels)
                    loss.backward()
                    optimizer.step()
                    if probe is not None:
                        probe.step(loss)
                if probe is not None:
                    probe.flush()
                taken[way][number] = clocks() - start
            gc.collect()
        for _, _, probe in copies.values():
            if probe is not None:
                probe.detach()

    bare = taken.pop(BARE)[1:]  # the first round warms up
    print(f"\nbare step: {np.median(bare[:, 0]) / STEPS * 1e3:.1f} ms, {len(bare)} rounds of {STEPS} steps")
    print(f"{'way':28}{'added':>10}{'90 % interval':>20}{'ms a step':>12}{'its thread':>14}{'other threads':>16}")
    for way, all_rounds in taken.items():
        added = all_rounds[1:] / bare - 1  # [rounds, 3]
        least, most = interval(added[:, 0])
        wall, thread, _ = np.median(added, axis=0)
        added_ms = np.median(all_rounds[1:, 0] - bare[:, 0]) / STEPS * 1e3
        others = np.median((all_rounds[1:, 2] - all_rounds[1:, 1]) / bare[:, 1])
        print(f"{way:28}{wall:10.2%}{f'{least:.2%} … {most:.2%}':>20}{added_ms:12.2f}{thread:14.2%}{others:16.3%}")


if __name__ == "__main__":
    main()
