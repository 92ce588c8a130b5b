"""Times a training step of a ResNet-50 and of a small GPT on a GPU, with a probe and without one.

    python benchmarks/gpu_steps.py [--rounds 15] [--batch 64] [--device cuda]

In each round every way is installed in turn, in random order, for two warm-up steps and eight timed ones; a way's time
in a round is the mean of its timed steps, from an idle device to an idle device. Models train with AdamW under bfloat16
autocast. `--device cpu` tries the script where there is no GPU; its times say nothing about one.

Prints one JSON object per model and way: the median of the step in ms, and the median and the quartiles of the
difference to the bare step of the same round. "bare again" is a second copy of the bare step and shows the noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import gradprobe

WARM_UP, TIMED = 2, 8  # steps per way and round
VOCABULARY, CONTEXT = 8192, 256  # of the GPT


class SmallGPT(nn.Module):
    """Six causal transformer blocks of width 384."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 384)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, 384))
        block = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] to [B, T, vocabulary]."""
        return self.head(self.blocks(self.embed(tokens) + self.positions, mask=self.mask, is_causal=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return 0
    device, batch = torch.device(arguments.device), arguments.batch
    torch.manual_seed(0)
    images, classes = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    resnet = gradprobe.networks.resnet(50, num_classes=1000).to(device)
    compare("ResNet-50", resnet, images, classes, arguments.rounds)
    tokens = torch.randint(VOCABULARY, (batch, CONTEXT + 1), device=device)
    compare("small GPT", SmallGPT().to(device), tokens[:, :-1], tokens[:, 1:], arguments.rounds)
    return 0


def compare(name: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, rounds: int) -> None:
    """Times the ways in turn and prints a line for each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).flatten(0, -2), target.flatten())
        loss.backward()
        optimizer.step()

    def attach(**options: bool) -> Callable[[], Callable[[], None]]:
        return lambda: gradprobe.attach(model, optimizer=optimizer, **options).detach

    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "bare": lambda: lambda: None,
        "bare again": lambda: lambda: None,
        "parameters": attach(junctions=False),
        "parameters, activations, residual adds": attach(activations=True),
    }
    generator = np.random.default_rng(0)
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in generator.permutation(list(ways)):
            leave = ways[way]()
            for _ in range(WARM_UP):
                step()
            synchronize(x.device)
            start = time.perf_counter()
            for _ in range(TIMED):
                step()
            synchronize(x.device)
            times_ms[way].append((time.perf_counter() - start) * 1e3 / TIMED)
            leave()
    bare = np.array(times_ms["bare"])
    for way, times in times_ms.items():
        low, added, high = np.percentile(np.array(times) - bare, [25, 50, 75])
        result = {
            "model": name,
            "way": str(way),
            "step_ms": float(np.median(times)),
            "added_ms": added,
            "added_low_ms": low,
            "added_high_ms": high,
            "added_share": added / float(np.median(bare)),
        }
        print(json.dumps(result), flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
