"""Measures what gradprobe adds to a training step beside what people would use instead.

Three networks: 1,000 small parameters (500 Linear(16), the cost per tensor), ResNet-20 on handwritten digits enlarged
to 32x32 pixels, and a GPT of four layers on the README. In each round every way is installed in turn, in random order,
for three steps that warm up and sixteen that count, so that a drift in the machine's speed affects all alike. A way's
time in a round is the mean of its steps, minus that of the bare step of the same round. A second bare copy shows how
large a difference noise alone makes.

The ways do not measure the same. `wandb.watch` makes a histogram of each gradient, the hooks and Lightning's
`grad_norm` one norm, `attach` six statistics; "all signals" adds activations, residual adds and updates. The last two
ways clip. Ways whose library is missing are left out by name.

First the tests of the numbers run: a fast measurement of wrong ones is worth nothing.

    python benchmarks/peers.py [--rounds 20] [--json peers.json]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from _machine import keep_memory, processor
from torch import nn

import gradprobe
from gradprobe.experiments.data import load

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, TIMED = 3, 16  # steps per way and round
BARE, CONTROL = "bare step", "a second bare copy"
MAX_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """A network with its loss and optimizer."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer


Act = Callable[[], object]  # called between backward and the optimizer's step
Way = Callable[[Training], AbstractContextManager[Act]]


def nothing() -> None:
    """Does nothing between backward and the optimizer's step."""


@contextmanager
def bare(training: Training) -> Iterator[Act]:
    yield nothing


@contextmanager
def hooks_on_parameters(training: Training) -> Iterator[Act]:
    norms: dict[torch.Tensor, torch.Tensor] = {}

    def keep(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            norms[parameter] = parameter.grad.norm()

    handles = [one.register_post_accumulate_grad_hook(keep) for one in training.model.parameters()]
    yield nothing
    for handle in handles:
        handle.remove()


@contextmanager
def hooks_on_modules(training: Training) -> Iterator[Act]:
    norms: dict[nn.Module, float] = {}

    def keep(module: nn.Module, _: object, gradients: tuple[torch.Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            norms[module] = gradients[0].norm().item()

    leaves = [module for module in training.model.modules() if not [*module.children()]]
    handles = [module.register_full_backward_hook(keep) for module in leaves]
    yield nothing
    for handle in handles:
        handle.remove()


@contextmanager
def foreach_norm(training: Training) -> Iterator[Act]:
    def act() -> list[float]:
        gradients = [one.grad for one in training.model.parameters() if one.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).tolist()

    yield act


@contextmanager
def lightning_grad_norm(training: Training) -> Iterator[Act]:
    utilities = importlib.import_module("lightning.pytorch.utilities")
    yield lambda: utilities.grad_norm(training.model, norm_type=2)


@contextmanager
def wandb_watch(training: Training) -> Iterator[Act]:
    wandb = importlib.import_module("wandb")
    with tempfile.TemporaryDirectory() as folder, wandb.init(mode="offline", dir=folder) as run:
        run.watch(training.model, log="gradients", log_freq=1)
        yield lambda: run.log({"step": 0})
        run.unwatch(training.model)


@contextmanager
def clip(training: Training) -> Iterator[Act]:
    yield lambda: nn.utils.clip_grad_norm_(training.model.parameters(), MAX_NORM)


@contextmanager
def clip_by_probe(training: Training) -> Iterator[Act]:
    with gradprobe.attach(training.model, optimizer=training.optimizer, junctions=False) as probe:
        yield lambda: probe.clip_grad_norm_(MAX_NORM)


def attached(**options: object) -> Way:
    """Returns the way that attaches a probe with these options."""

    @contextmanager
    def way(training: Training) -> Iterator[Act]:
        with gradprobe.attach(training.model, optimizer=training.optimizer, **options):  # type: ignore[arg-type]
            yield nothing

    return way


SIGNALS = {"activations": True, "updates": True}
WAYS: dict[str, tuple[str | None, Way]] = {  # and the library that a way needs
    BARE: (None, bare),
    CONTROL: (None, bare),
    "attach": (None, attached(junctions=False)),
    "attach, every=10": (None, attached(junctions=False, every=10)),
    "attach, all signals": (None, attached(**SIGNALS)),
    "attach, all signals, every=10": (None, attached(every=10, **SIGNALS)),
    "post-accumulate hooks, norm": (None, hooks_on_parameters),
    "full backward hooks, norm and item": (None, hooks_on_modules),
    "_foreach_norm and tolist": (None, foreach_norm),
    "Lightning's grad_norm": ("lightning", lightning_grad_norm),
    "wandb.watch, offline": ("wandb", wandb_watch),
    "clip_grad_norm_": (None, clip),
    "attach and probe.clip_grad_norm_": (None, clip_by_probe),
}


class _GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        logits: torch.Tensor = self.head(self.layers(self.embed(tokens), mask=mask, is_causal=True))
        return logits


def trainings() -> dict[str, Training]:
    """Makes the networks, their data and optimizers."""
    digits = load("digits")
    images = nn.functional.interpolate(digits.train_x[:32], size=32, mode="bilinear")
    classes = digits.train_y[:32]
    small = nn.Sequential(*(nn.Linear(16, 16) for _ in range(500)))
    x = digits.train_x[:16].reshape(-1, 16)
    resnet = gradprobe.networks.resnet(20, in_channels=1)
    text = (
        torch.frombuffer(bytearray((ROOT / "README.md").read_bytes()[: 8 * 65]), dtype=torch.uint8).long().view(8, 65)
    )
    gpt = _GPT()
    return {
        "1,000 small parameters": _training(small, lambda: small(x).square().mean()),
        "ResNet-20, batch 32": _training(resnet, lambda: nn.functional.cross_entropy(resnet(images), classes)),
        "GPT, 4 layers, 8 x 64 tokens": _training(
            gpt, lambda: nn.functional.cross_entropy(gpt(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        ),
    }


def _training(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Training:
    return Training(model, loss, torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9))


def mean_step_ms(training: Training, way: Way) -> float:
    """Returns the mean time of a step while a way is installed."""
    steps_ms = []
    with way(training) as act:
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            training.optimizer.zero_grad()
            training.loss().backward()
            act()
            training.optimizer.step()
            steps_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.fmean(steps_ms[WARM_UP:])


def compare(training: Training, ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Times all ways in turn; returns milliseconds a step, one per round."""
    generator = np.random.default_rng(0)
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    gc.disable()
    for _ in range(rounds):
        for name in generator.permutation([*ways]):
            times_ms[name].append(mean_step_ms(training, ways[name]))
            gc.collect()
    gc.enable()
    return times_ms


def table(title: str, times_ms: Mapping[str, list[float]]) -> str:
    """Formats the results as Markdown: what each way adds to the bare step, with bootstrapped 90 % intervals."""
    generator = np.random.default_rng(1)
    without = np.array(times_ms[BARE])
    resampled = generator.integers(0, len(without), (2000, len(without)))
    lines = [f"{title}: bare step {np.median(without):.2f} ms, {len(without)} rounds", ""]
    lines += ["| way | added, ms | 90 % interval | of the step |", "|---|---|---|---|"]
    for name in [*times_ms][1:]:
        added = np.array(times_ms[name]) - without  # [rounds]
        low, high = np.percentile(np.median(added[resampled], axis=1), [5, 95])
        middle = np.median(added)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} … {high:.2f} | {middle / np.median(without):.1%} |")
    return "\n".join(lines)


def check() -> None:
    """Runs the tests of the numbers, and ends this process if one fails."""
    tests = [str(ROOT / "tests" / "probe" / "test_values.py"), str(ROOT / "tests" / "observers" / "test_gradients.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tests], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit("the numbers are not right, so their cost is not measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there, ms")
    arguments = parser.parse_args()
    check()
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missing = {library for library, _ in WAYS.values() if library and find_spec(library) is None}
    ways = {name: way for name, (library, way) in WAYS.items() if library not in missing}
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "wandb", "lightning") if name not in missing
    }
    machine = f"{processor()}, 1 thread, python {platform.python_version()}"
    print(f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"left out: {', '.join(sorted(missing)) or 'nothing'}")
    results = {}
    for title, training in trainings().items():
        results[title] = compare(training, ways, arguments.rounds)
        print(f"\n{table(title, results[title])}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "times_ms": results}, indent=1))


if __name__ == "__main__":
    main()
