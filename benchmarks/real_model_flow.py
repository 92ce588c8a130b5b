"""Checks the gradient flow of published models, and looks for false findings in healthy trainings.

    pip install torchvision timm transformers diffusers torch_geometric     (or: make real-models)
    python benchmarks/real_model_flow.py [PATTERN ...] [--json]
    python benchmarks/real_model_flow.py [PATTERN ...] --train 25 [--fresh | --published]

Without `--train`, every model of _published_models.py is built at its published width with random weights, and checked
with `gradprobe.check_gradient_flow`. These architectures train, so each verdict should be "healthy". The table of
docs/check.md is made of the output.

With `--train N`, the small models of _real_models.py (or the published ones) are trained for N steps with AdamW and a
probe that observes everything, on one batch, which they can learn. Then `Probe.findings` should be empty; what it finds
is printed with its evidence. With `--fresh`, every step brings new random labels: nothing can be learnt, and "not
learning" is right.

Models of packages that are not installed are left out. Exits with 1 if anything was found.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _compare import seed_all
from _machine import processor
from _published_models import PUBLISHED_MODELS, PublishedModel
from _real_models import REAL_MODELS, RealModel, prepare_imports
from torch import nn
from torch.nn import functional

import gradprobe
from gradprobe.probe.flow.inputs import given_batch, tensors_of

LEARNING_RATE, LEARNING_RATE_PUBLISHED = 1e-3, 1e-4  # wide models take smaller steps

Training = tuple[nn.Module, Callable[[], torch.Tensor]]  # a model, and a function that computes its loss


def check(real: PublishedModel) -> dict[str, Any]:
    """Checks the flow of one model.

    Args:
        real: The model.

    Returns:
        The verdict, its numbers and what explains them.
    """
    seed_all()
    model, inputs = real.build()
    model.train()
    report = gradprobe.check_gradient_flow(model, inputs=inputs)
    ends = [(trunk[0].sensitivity, trunk[-1].sensitivity) for trunk in report.trunks]
    return {
        "millions": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "verdict": report.verdict,
        "points": [len(trunk) for trunk in report.trunks],
        "ratios": [first / last if last else float("nan") for first, last in ends],
        "last": report.layers[-1].name,
        "findings": [finding.message for finding in report.findings],
        "notes": list(report.notes),
    }


def train(build: Callable[[], Training], n_steps: int, learning_rate: float) -> dict[str, Any]:
    """Trains one model with AdamW and a probe that observes everything.

    Args:
        build: Returns a model, and a function that computes its loss.
        n_steps: Number of steps.
        learning_rate: Learning rate.

    Returns:
        The findings, and the first and the last loss.
    """
    seed_all()
    model, loss_of = build()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    with gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True) as probe:
        for _ in range(n_steps):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            losses.append(float(loss))
            optimizer.step()
            probe.step(loss.detach())
        findings = probe.findings()
    return {
        "verdict": ", ".join(finding.title for finding in findings) or "healthy",
        "losses": [losses[0], losses[-1]],
        "findings": [f"{finding.title}: {finding.message}; {finding.evidence}" for finding in findings],
    }


def small_training(real: RealModel, fresh: bool) -> Training:
    """Prepares the training of a small model, on one batch or on a fresh one in each step."""
    model, loss_of = real.build()
    generator = torch.Generator()

    def loss() -> torch.Tensor:
        if not fresh:
            generator.manual_seed(0)
        return loss_of(model, generator)

    return model, loss


def published_training(real: PublishedModel) -> Training:
    """Prepares the training of a published model on one batch: its own loss, or random targets for its outputs."""
    model, inputs = real.build()
    batch, seed = given_batch(inputs), 1

    def loss() -> torch.Tensor:
        output = batch.run(model)
        own = getattr(output, "loss", None)
        if own is not None:
            return own
        generator = torch.Generator().manual_seed(seed)
        outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        if all(tensor.numel() == 1 for tensor in outputs):  # the losses of a detector
            return torch.stack(outputs).sum()
        return sum(
            (functional.mse_loss(tensor, torch.randn(tensor.shape, generator=generator)) for tensor in outputs),
            start=torch.zeros(()),
        )

    return model, loss


def rows(patterns: list[str], n_steps: int, published: bool, fresh: bool) -> Iterator[dict[str, Any]]:
    """Checks or trains every chosen model, one row each."""
    for real in PUBLISHED_MODELS if published or not n_steps else REAL_MODELS:
        if (patterns and not any(fnmatch(real.name, pattern) for pattern in patterns)) or not find_spec(real.library):
            continue
        start = time.perf_counter()
        try:
            if not n_steps:
                row = check(real)
            else:
                prepare = published_training if published else partial(small_training, fresh=fresh)
                rate = LEARNING_RATE_PUBLISHED if published else LEARNING_RATE
                row = train(partial(prepare, real), n_steps, rate)
        except Exception as error:  # noqa: BLE001
            row = {"verdict": "error", "findings": [f"{type(error).__name__}: {error}"]}
        gc.collect()
        yield {"model": real.name, **row, "seconds": round(time.perf_counter() - start, 1)}


def line_of(row: dict[str, Any]) -> str:
    """Formats a row of the table."""
    if "losses" in row:
        numbers = f"loss {row['losses'][0]:.3g} to {row['losses'][1]:.3g}"
    elif "ratios" in row:
        ratios = ", ".join(f"{n} points: {ratio:.2g}" for n, ratio in zip(row["points"], row["ratios"], strict=True))
        numbers = f"{row['millions']:.1f} M, {ratios}"
    else:
        numbers = ""
    details = [f"    {text}" for text in (*row["findings"], *row.get("notes", ()))]
    return "\n".join([f"{row['model']:48}{row['verdict']:14}{row['seconds']:6} s  {numbers}", *details])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="models, such as 'timm/*'")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="train for N steps in place of checking")
    parser.add_argument("--published", action="store_true", help="train the published models, not the small ones")
    parser.add_argument("--fresh", action="store_true", help="a fresh batch with random labels in each step")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare_imports()
    warnings.filterwarnings("ignore")
    print(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}", file=sys.stderr)
    n_rows = n_wrong = 0
    for row in rows(arguments.patterns, arguments.train, arguments.published, arguments.fresh):
        n_rows += 1
        n_wrong += row["verdict"] != "healthy"
        print(json.dumps(row) if arguments.json else line_of(row), flush=True)
    print(f"{n_rows} models, {n_wrong} not healthy", file=sys.stderr)
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
