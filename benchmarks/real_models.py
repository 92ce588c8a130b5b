"""Shows that a probe changes no bit of a training, and that its numbers are those of float64 before clipping.

Small real models with random weights (torchvision, timm, transformers, diffusers, PyG) and three trainers (Lightning's,
transformers' and accelerate) are trained twice from the same seed: bare, and with `gradprobe.attach`. Afterwards every
parameter, buffer, optimizer state, loss and random number generator must have the same bits. The bare run notes
every gradient in float64 before it is clipped; each snapshot of the probed run must hold the same statistics to 1e-6,
exact counts, the total norm before clipping, the right labels and the clip factor. There must be one snapshot per
optimizer step.

    pip install torchvision timm transformers diffusers torch_geometric lightning accelerate     (or: make real-models)
    python benchmarks/real_models.py [PATTERN ...] [--settings plain observed …] [--no-clip] [--json]

Patterns choose models, such as "timm/*" or "trainer/*". Each model is trained in each setting:

    plain         SGD; attach(model, optimizer=optimizer)
    alone         AdamW; attach(model)
    observed      AdamW; activations, residual adds and updates observed too
    accumulated   AdamW; two backward passes per step
    amp           AdamW; bf16 autocast and a gradient scaler, which skips the second step

Models of packages that are not installed are listed and left out. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _compare import MAX_NORM, Check, Difference, Training, bits_of, changed, differences, seed_all, truth_of
from _machine import processor
from _real_models import REAL_MODELS, RealModel, prepare_imports
from _trainers import TRAINER_CHECKS

import gradprobe

N_STEPS = 4
POISONED = 1  # step whose scaled loss is infinite

PACKAGES = ("torchvision", "timm", "transformers", "diffusers", "torch_geometric", "lightning", "accelerate")


@dataclass(frozen=True)
class Setting:
    """How a model is trained, and how the probe is attached.

    Attributes:
        name: Name in the table.
        optimizer: Makes the optimizer.
        options: Options of `attach`, given the optimizer and the gradient scaler.
        n_parts: Backward passes per step.
        amp: bf16 autocast and a gradient scaler.
    """

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    options: Callable[[torch.optim.Optimizer, torch.amp.GradScaler], dict[str, Any]]
    n_parts: int = 1
    amp: bool = False


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
OBSERVED = {"activations": True, "updates": True}
SETTINGS = (
    Setting("plain", SGD, lambda optimizer, scaler: {"optimizer": optimizer}),
    Setting("alone", ADAMW, lambda optimizer, scaler: {}),
    Setting("observed", ADAMW, lambda optimizer, scaler: {"optimizer": optimizer, **OBSERVED}),
    Setting("accumulated", ADAMW, lambda optimizer, scaler: {"optimizer": optimizer}, n_parts=2),
    Setting("amp", ADAMW, lambda optimizer, scaler: {"optimizer": optimizer, "grad_scaler": scaler}, amp=True),
)


@dataclass(frozen=True)
class Result:
    """What came of one check.

    Attributes:
        name: As in `Check`.
        setting: As in `Check`.
        n_steps: Optimizer steps compared.
        n_numbers: Statistics compared.
        differences: What differs.
        warnings: What the probe warned of.
    """

    name: str
    setting: str
    n_steps: int
    n_numbers: int
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]


def train(real: RealModel, setting: Setting, attached: bool, clips: bool) -> Training:
    """Trains one model for a few steps.

    Args:
        real: The model.
        setting: How to train it.
        attached: Attach a probe; otherwise note the truths.
        clips: Clip the gradients.

    Returns:
        What the training left.
    """
    seed_all()
    model, loss_of = real.build()
    model.train()
    optimizer = setting.optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=setting.amp)
    training, losses = Training(max_norm=MAX_NORM if clips else None), []
    probe = gradprobe.attach(model, **setting.options(optimizer, scaler)) if attached else None
    for step in range(N_STEPS):
        optimizer.zero_grad()
        for part in range(setting.n_parts):
            generator = torch.Generator().manual_seed(1000 * step + part)
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.amp):
                loss = loss_of(model, generator) / setting.n_parts
            losses.append(loss.item())
            is_poisoned = setting.amp and step == POISONED
            scaler.scale(loss * float("inf") if is_poisoned else loss).backward()
        scaler.unscale_(optimizer)
        if not attached:
            training.truths.append(truth_of(model, skipped=is_poisoned))
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
    training.bits = bits_of(model, optimizer, losses)
    if probe is not None:
        training.history = probe.history()
        probe.detach()
    return training


def compare(check: Check, clips: bool) -> Result:
    """Runs one check.

    Args:
        check: The check.
        clips: Clip the gradients.

    Returns:
        What came of it.
    """
    bare, found = Training(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradprobe.GradprobeWarning)
        try:
            bare = check.train(False, clips)
            found = differences(bare, check.train(True, clips))
            if any(each.kind == "training" for each in found) and changed(bare, check.train(False, clips)):
                found.append(Difference("training", "the bare training differs from itself"))
        except Exception as error:  # noqa: BLE001
            whose = "with a probe" if bare.truths else "without a probe"
            found.append(Difference("error", f"{whose}: {type(error).__name__}: {error}"))
    n_numbers = sum(len(stats) for truth in bare.truths for stats in truth.gradients.values())
    ours = [each.message for each in caught if issubclass(each.category, gradprobe.GradprobeWarning)]
    return Result(check.name, check.setting, len(bare.truths), n_numbers, tuple(found), tuple(map(str, ours)))


def checks(patterns: Sequence[str], settings: Sequence[str]) -> list[Check]:
    """Lists the chosen checks.

    Args:
        patterns: Patterns of model and trainer names; none means all.
        settings: Names of settings.

    Returns:
        The checks, in the order of the tables.
    """
    every = [
        Check(real.name, setting.name, (real.library,), partial(train, real, setting))
        for real in REAL_MODELS
        for setting in SETTINGS
        if setting.name in settings and (real.amp or not setting.amp)
    ]
    every += TRAINER_CHECKS
    return [check for check in every if not patterns or any(fnmatch(check.name, pattern) for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="models and trainers, such as 'timm/*'")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="how the models are trained")
    parser.add_argument("--no-clip", action="store_true", help="train without clipping")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args()
    chosen = checks(arguments.patterns, arguments.settings)
    if not chosen:
        parser.error(f"patterns: needed some that match a model, got {arguments.patterns}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    prepare_imports()
    warnings.filterwarnings("ignore")
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if find_spec(name)}
    print_line = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    print_line(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}")
    print_line(", ".join(f"{name} {version}" for name, version in installed.items()))
    missing = sorted({package for check in chosen for package in check.packages} - installed.keys())
    start, results = time.perf_counter(), []
    print_line(f"{'model':48}{'setting':14}{'steps':>6}{'numbers':>9}  result")
    for check in chosen:
        if any(package in missing for package in check.packages):
            continue
        result = compare(check, not arguments.no_clip)
        results.append(result)
        print_result(result, arguments.json)
    n_wrong = sum(bool(result.differences) for result in results)
    kinds = Counter(kind for result in results for kind in {each.kind for each in result.differences})
    n_models, n_numbers = len({result.name for result in results}), sum(result.n_numbers for result in results)
    print_line(
        f"{n_models} models and trainers, {len(results)} trainings, {n_numbers} numbers, "
        f"{time.perf_counter() - start:.0f} s: {n_wrong} trainings differ"
        + "".join(f"; {kind}: {n}" for kind, n in kinds.items())
    )
    if missing:
        print_line(f"left out, not installed: {', '.join(missing)}")
    sys.exit(1 if n_wrong else 0)


def print_result(result: Result, as_json: bool) -> None:
    """Prints one result.

    Args:
        result: The result.
        as_json: As a line of JSON.
    """
    if as_json:
        found = [{"kind": each.kind, "message": each.message} for each in result.differences]
        print(json.dumps({**vars(result), "differences": found}), flush=True)
        return
    kinds = sorted({each.kind for each in result.differences})
    verdict = f"differs: {', '.join(kinds)}" if kinds else "same"
    print(f"{result.name:48}{result.setting:14}{result.n_steps:6}{result.n_numbers:9}  {verdict}", flush=True)
    for kind in kinds:
        first, *others = (each.message for each in result.differences if each.kind == kind)
        print(f"    {kind}: {first}" + (f" … and {len(others)} more" if others else ""))
    for message in result.warnings:
        print(f"    warning: {message}")


if __name__ == "__main__":
    main()
