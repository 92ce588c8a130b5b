"""Draws a run with three planted faults, each of which the heatmap must show: the picture of the README.

The first layers are plain sigmoid layers, through which the gradient vanishes. Behind them are residual blocks; one of
them dies at step 180, and one batch, at step 90, has a loss that is far too large.

    python benchmarks/run_picture.py docs/img run.html
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import gradprobe
from gradprobe.nn.residual import ResidualAdd
from gradprobe.report.chart_parts import png

WIDTH, N_SIGMOID, N_BLOCKS = 48, 8, 8
STEPS, SPIKE_AT, DIES_AT, DYING = 300, 90, 180, 4


class Block(nn.Module):
    """y = x + W2 ReLU(W1 LayerNorm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.relu = nn.ReLU()
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.add = ResidualAdd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of input and branch."""
        joined: torch.Tensor = self.add(x, self.outer(self.relu(self.inner(self.norm(x)))))
        return joined


def network() -> nn.Sequential:
    plain = [part for _ in range(N_SIGMOID) for part in (nn.Linear(WIDTH, WIDTH), nn.Sigmoid())]
    return nn.Sequential(*plain, nn.LayerNorm(WIDTH), *(Block() for _ in range(N_BLOCKS)), nn.Linear(WIDTH, 10))


def train() -> gradprobe.Probe:
    torch.manual_seed(0)
    model = network()
    teacher = torch.randn(WIDTH, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True)
    dying = model[2 * N_SIGMOID + 1 + DYING]
    assert isinstance(dying, Block)
    for step in range(STEPS):
        inputs = torch.randn(64, WIDTH)
        labels = (inputs @ teacher).argmax(dim=1)
        if step == DIES_AT:
            with torch.no_grad():
                dying.inner.bias.fill_(-100.0)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        (loss * 200 if step == SPIKE_AT else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        probe.step(loss)
    probe.detach()
    return probe


if __name__ == "__main__":
    picture = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/img") / "heatmap.png"
    probe = train()
    print(probe.findings())
    picture.write_bytes(png(probe.plot("heatmap")))
    if len(sys.argv) > 2:
        probe.report(sys.argv[2])
