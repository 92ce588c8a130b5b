"""The degradation sweep as a script without gradprobe: a DataLoader, float32, torch's default threads, no probe.

It trains the cells of `gradprobe sweep` one after another with the same networks, recipe, batches per epoch and data,
and prints the running training error and the test error of every epoch. `benchmarks/sweep.py` times it.

    python benchmarks/_plain_sweep.py digits plain,resnet 20,56 0 20
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Block(nn.Module):
    """Two convolutions; the shortcut, if any, takes every second pixel and pads channels with zeros (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.residual, self.stride, self.pad = residual, stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.residual:
            if self.stride > 1:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            out = out + x
        return F.relu(out)


class Net(nn.Module):
    """The CIFAR layout of He et al. 2015, section 4.2."""

    def __init__(self, depth: int, residual: bool, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for width, index in product((16, 32, 64), range((depth - 2) // 6)):
            blocks.append(Block(channels, width, 2 if width > 16 and index == 0 else 1, residual))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))
        return logits


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Pads each image by 4, crops it at random and flips it with probability 1/2."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = F.pad(images, (4, 4, 4, 4)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = self.images[index, :, top : top + 32, left : left + 32]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, self.labels[index]


def digits() -> tuple[Dataset[Any], Dataset[Any]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    labels, mean = torch.tensor(labels), images[train].mean(dim=0)
    return TensorDataset(images[train] - mean, labels[train]), TensorDataset(images[test] - mean, labels[test])


def cifar10(folder: Path) -> tuple[Dataset[Any], Dataset[Any]]:
    def read(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        records = torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073))
        return records[:, 1:].float().view(-1, 3, 32, 32) / 255, records[:, 0].long()

    (images, labels), (test, test_labels) = (
        read(sorted(folder.glob("data_batch_*.bin"))),
        read([folder / "test_batch.bin"]),
    )
    mean = images.mean(dim=0)
    return Augmented(images - mean, labels), TensorDataset(test - mean, test_labels)


def train(
    depth: int, residual: bool, seed: int, epochs: int, sets: tuple[Dataset[Any], Dataset[Any]], size: int
) -> Net:
    """Trains one network and prints the errors of each epoch, in percent."""
    torch.manual_seed(seed)
    loader = DataLoader(sets[0], batch_size=size, shuffle=True, drop_last=True)
    test_loader = DataLoader(sets[1], batch_size=size)
    model = Net(depth, residual, sets[0][0][0].shape[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps, warming = epochs * len(loader), depth >= 110
    for epoch in range(epochs):
        model.train()
        right = seen = 0
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            drops = (2 * step >= steps) + (4 * step >= 3 * steps)
            for group in optimizer.param_groups:
                group["lr"] = (0.01 if warming else 0.1) / 10**drops
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += (logits.argmax(dim=1) == labels).sum().item()
            seen += len(labels)
        train_error = 100 * (1 - right / seen)
        warming = warming and train_error >= 80
        model.eval()
        right = seen = 0
        with torch.no_grad():
            for images, labels in test_loader:
                right += (model(images).argmax(dim=1) == labels).sum().item()
                seen += len(labels)
        name = f"{'resnet' if residual else 'plain'}-{depth} seed {seed}"
        print(f"{name} epoch {epoch + 1} train error {train_error:.2f} test error {100 * (1 - right / seen):.2f}")
    return model


def main(data: str, families: str, depths: str, seeds: str, epochs: str) -> None:
    sets = digits() if data == "digits" else cifar10(Path(data.partition(":")[2]))
    for family, depth, seed in product(families.split(","), depths.split(","), seeds.split(",")):
        train(int(depth), family == "resnet", int(seed), int(epochs), sets, 64 if data == "digits" else 128)


if __name__ == "__main__":
    main(*sys.argv[1:])
