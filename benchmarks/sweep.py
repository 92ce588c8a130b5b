"""Times `gradprobe sweep` from its start to its end, against the script that a person would write without it.

The script is `benchmarks/_plain_sweep.py`: the same cells, recipe and epochs with a DataLoader in one process with
torch's default threads, float32, without a probe, the running training error and the test set in every epoch. The sweep
measures every gradient, in float32 and, where the processor computes in it, in bfloat16. In each round all run once,
in random order, each in a process of its own, so that a drift in the machine's speed affects them alike. Other load
affects the plain script more, since its threads wait for each other: trust the ratio of an otherwise idle machine.

Columns: seconds and CPU seconds (of all processes) as median and range over the rounds. A ratio is the plain script's
time over the sweep's in the same round. Errors are those of the last epoch, in percent, by cell; the training error of
the plain script is the running one.

    python benchmarks/sweep.py [--rounds 3] [--data cifar10:DIR] [--depths 20,56] [--seeds 0] [--epochs 20]
                               [--precisions float32,bfloat16]
    python benchmarks/sweep.py --quick    # seconds: shows that both work, its ratio means nothing
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _machine import processor

from gradprobe.experiments.sweep.store import open_run

HERE = Path(__file__).parent
EPOCH = re.compile(r"^(\S+ seed \d+) epoch (\d+) train error (\S+) test error (\S+)$", re.MULTILINE)

Errors = dict[str, tuple[float, float]]  # training and test error in percent, by cell


@dataclass(frozen=True)
class Timing:
    """One run of one of the two.

    Attributes:
        seconds: From the start of the process to its end.
        cpu_seconds: Of the process and all its children.
        errors: Errors of each cell after the last epoch.
    """

    seconds: float
    cpu_seconds: float
    errors: Errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--families", default="plain,resnet")
    parser.add_argument("--depths", default="20,56")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precisions", default=",".join(precisions()), help="of the sweep; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one round of one small network for one epoch")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.families, options.depths, options.seeds, options.epochs = 1, "plain", "8", "0", 1
    cells = [options.families, options.depths, options.seeds, str(options.epochs)]
    print(f"{processor()}, {len(os.sched_getaffinity(0))} CPUs; torch {torch.__version__}, ", end="")
    print(f"python {platform.python_version()}")
    print(f"{options.data}: {' x '.join(cells[:3])}, epochs {options.epochs}; rounds {options.rounds}; ", end="")
    print(f"load before the first {os.getloadavg()[0]:.1f}\n", flush=True)
    ways: dict[str, Callable[[], Timing]] = {"plain script": lambda: run_plain(options.data, cells)}
    for precision in options.precisions.split(","):
        ways[f"sweep, {precision}"] = partial(run_ours, options.data, cells, precision)
    timings: dict[str, list[Timing]] = {way: [] for way in ways}
    order = random.Random(0)
    for _ in range(options.rounds):
        for way in order.sample(list(ways), len(ways)):
            timings[way].append(ways[way]())
    print_table(timings)


def precisions() -> list[str]:
    """Returns the precisions that this processor has instructions for."""
    return ["float32", "bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["float32"]


def run_plain(data: str, cells: Sequence[str]) -> Timing:
    """Runs the plain script."""
    return timed([str(HERE / "_plain_sweep.py"), data, *cells])


def run_ours(data: str, cells: Sequence[str], precision: str) -> Timing:
    """Runs `gradprobe sweep` into a new file and reads the errors from it."""
    families, depths, seeds, epochs = cells
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.sqlite"
        grid = ["--families", families, "--depths", depths, "--seeds", seeds, "--epochs", epochs]
        grid += ["--precision", precision]
        timing = timed(["-m", "gradprobe.cli", "sweep", "--data", data, *grid, "--out", str(out)])
        with open_run(out) as run:
            last = {f"{cell.name} seed {cell.seed}": run.epochs(cell.id)[-1] for cell in run.cells()}
    errors = {cell: (row.train_error_pct, row.test_error_pct) for cell, row in last.items()}
    return Timing(timing.seconds, timing.cpu_seconds, errors)


def timed(arguments: Sequence[str]) -> Timing:
    """Runs Python with arguments, and reads the errors that it prints.

    Raises:
        RuntimeError: It failed; the message is its error output.
    """
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    errors = {cell: (float(train), float(test)) for cell, _, train, test in EPOCH.findall(done.stdout)}
    return Timing(seconds, cpu_seconds, errors)


def print_table(timings: dict[str, list[Timing]]) -> None:
    """Prints times, ratios and errors."""
    print(f"{'':18}{'seconds':>26}{'CPU seconds':>26}")
    for way, runs in timings.items():
        print(f"{way:18}{spread([run.seconds for run in runs]):>26}{spread([run.cpu_seconds for run in runs]):>26}")
    plain, *sweeps = timings.values()
    print(f"\n{'plain script over':18}")
    for way, ours in list(timings.items())[1:]:
        wall = [one.seconds / other.seconds for one, other in zip(plain, ours, strict=True)]
        cpu = [one.cpu_seconds / other.cpu_seconds for one, other in zip(plain, ours, strict=True)]
        print(f"{way:18}{spread(wall, 2):>26}{spread(cpu, 2):>26}")
    print(f"\n{'errors, train/test':18}" + "".join(f"{way:>22}" for way in timings))
    for cell in plain[-1].errors:
        pairs = [runs[-1].errors[cell] for runs in (plain, *sweeps)]
        print(f"{cell:18}" + "".join(f"{f'{train:.2f} / {test:.2f}':>22}" for train, test in pairs))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Formats median and range.

    Example:
        >>> spread([2.0, 1.0, 4.0])
        '2.0 (1.0 … 4.0)'
    """
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
