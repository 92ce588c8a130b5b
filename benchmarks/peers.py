"""Measures what gradprobe adds to a training step beside what people would use instead, for docs/performance.md.

(attach_overhead.py compares the options of `attach` with one hook, in finer CPU times, for work on gradprobe itself.)

Three networks: 1,000 small parameters (500 Linear(16), the cost per tensor), ResNet-20 on handwritten digits enlarged
to 32x32 pixels, and a GPT of four layers on the README, which is also measured compiled. In each round every way is
installed in turn, in random order, for three steps that warm up and sixteen that count, so that a drift in the
machine's speed affects all alike. A way's time in a round is the mean of its steps, minus that of the bare step of the
same round. A second bare copy shows how large a difference noise alone makes. Times are those of a clock, on one
thread.

The ways do not measure the same. `wandb.watch` makes a histogram of each gradient, the hooks and Lightning's
`grad_norm` one norm, `attach` six statistics; "all signals" adds activations, residual adds and updates. The last two
ways clip. Ways whose library is missing are left out by name. So are, compiled, those that hook modules: each time
they are installed the network would compile anew.

First the tests of the numbers run: a fast measurement of wrong ones is worth nothing. Rounds begin until 14 minutes
are over.

    python benchmarks/peers.py [--rounds N] [--minutes 14] [--json FILE] [--page FILE]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import itertools
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
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from _digits import enlarged_digits
from _machine import keep_memory, processor
from _peers_tables import BARE, CLIP, CLIP_BY_PROBE, OURS, fill, tables
from torch import nn

import gradprobe
from gradprobe.experiments.data import load

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, TIMED = 3, 16  # steps per way and round
MAX_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """A network with its loss and optimizer."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    is_compiled: bool = False


Act = Callable[[], object]  # called between backward and the optimizer's step
Install = Callable[[Training], AbstractContextManager[Act]]


@dataclass(frozen=True)
class Way:
    """A way to see gradients.

    Attributes:
        install: Installs it for a training, until the context ends.
        library: What it needs besides torch and gradprobe.
        hooks_modules: It hooks modules, which torch.compile builds into the graph.
    """

    install: Install
    library: str | None = None
    hooks_modules: bool = False


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


def attached(**options: object) -> Install:
    """Returns the way that attaches a probe with these options."""

    @contextmanager
    def way(training: Training) -> Iterator[Act]:
        with gradprobe.attach(training.model, optimizer=training.optimizer, **options):  # type: ignore[arg-type]
            yield nothing

    return way


SIGNALS = {"activations": True, "updates": True}
WAYS = {
    BARE: Way(bare),
    "a second bare copy": Way(bare),
    OURS: Way(attached(junctions=False)),
    "attach, every=10": Way(attached(junctions=False, every=10)),
    "attach, all signals": Way(attached(**SIGNALS), hooks_modules=True),
    "attach, all signals, every=10": Way(attached(every=10, **SIGNALS), hooks_modules=True),
    "post-accumulate hooks, norm": Way(hooks_on_parameters),
    "full backward hooks, norm and item": Way(hooks_on_modules, hooks_modules=True),
    "_foreach_norm and tolist": Way(foreach_norm),
    "Lightning's grad_norm": Way(lightning_grad_norm, "lightning"),
    "wandb.watch, offline": Way(wandb_watch, "wandb"),
    CLIP: Way(clip),
    CLIP_BY_PROBE: Way(clip_by_probe),
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
    images, classes = enlarged_digits(32)
    small = nn.Sequential(*(nn.Linear(16, 16) for _ in range(500)))
    x = load("digits").train_x[:16].reshape(-1, 16)
    resnet = gradprobe.networks.resnet(20, in_channels=1)
    letters = bytearray((ROOT / "README.md").read_bytes()[: 8 * 65])
    text = torch.frombuffer(letters, dtype=torch.uint8).long().view(8, 65)
    gpt, compiled = _GPT(), _GPT()
    compiled.compile()

    def next_byte(model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return {
        "1,000 small parameters": _training(small, lambda: small(x).square().mean()),
        "ResNet-20, batch 32": _training(resnet, lambda: nn.functional.cross_entropy(resnet(images), classes)),
        "GPT, 4 layers, 8 x 64 tokens": _training(gpt, lambda: next_byte(gpt)),
        "the same GPT, compiled": _training(compiled, lambda: next_byte(compiled), is_compiled=True),
    }


def _training(model: nn.Module, loss: Callable[[], torch.Tensor], is_compiled: bool = False) -> Training:
    return Training(model, loss, torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9), is_compiled)


def mean_step_ms(training: Training, install: Install) -> float:
    """Returns the mean time of a step while a way is installed."""
    steps_ms = []
    with install(training) as act:
        for _ in range(WARM_UP + TIMED):
            start = time.perf_counter()
            training.optimizer.zero_grad()
            training.loss().backward()
            act()
            training.optimizer.step()
            steps_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.fmean(steps_ms[WARM_UP:])


def compare(
    networks: Mapping[str, Training], ways: Mapping[str, Way], is_enough: Callable[[int, float], bool]
) -> dict[str, dict[str, list[float]]]:
    """Times all ways of all networks in turn.

    Args:
        networks: By title.
        ways: By name.
        is_enough: Tells from the number of rounds and the duration of the last, s, whether to end.

    Returns:
        Milliseconds a step, one per round, by network and way.
    """
    generator = np.random.default_rng(0)
    times_ms: dict[str, dict[str, list[float]]] = {}
    for title, training in networks.items():
        training.loss().backward()  # compiles
        chosen = [name for name, way in ways.items() if not (training.is_compiled and way.hooks_modules)]
        times_ms[title] = {name: [] for name in chosen}
    gc.disable()
    for n_rounds in itertools.count(1):
        start = time.monotonic()
        for title, training in networks.items():
            for name in generator.permutation([*times_ms[title]]):
                times_ms[title][name].append(mean_step_ms(training, ways[name].install))
                gc.collect()
        if is_enough(n_rounds, time.monotonic() - start):
            break
    gc.enable()
    return times_ms


def check() -> None:
    """Runs the tests of the numbers, and ends this process if one fails."""
    tests = [str(ROOT / "tests" / "probe" / "test_values.py"), str(ROOT / "tests" / "observers" / "test_gradients.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tests], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit("the numbers are not right, so their cost is not measured")


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="end after so many")
    parser.add_argument("--minutes", type=float, default=14, help="begin no round that would end later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there, ms")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    arguments = parser.parse_args()
    check()
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def is_enough(n_rounds: int, last_s: float) -> bool:
        return n_rounds == arguments.rounds or time.monotonic() - start + last_s > 60 * arguments.minutes

    missing = {way.library for way in WAYS.values() if way.library and find_spec(way.library) is None}
    ways = {name: way for name, way in WAYS.items() if way.library not in missing}
    shown = ("torch", "gradprobe", "wandb", "lightning")
    measured = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, 1 thread",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in shown if name not in missing},
        },
        "left_out": sorted(missing),
        "times_ms": compare(trainings(), ways, is_enough),
    }
    print(tables(measured))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if arguments.page is not None:
        arguments.page.write_text(fill(arguments.page.read_text(encoding="utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main()
