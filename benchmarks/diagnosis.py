"""Measures precision and recall of the diagnosis on short runs that are healthy or have a planted fault.

Each run trains a small network on scikit-learn's digits with a probe attached; the rules see only the probe's history.
Runs with an exploding gradient use small learning rates, since larger ones flatten the gradient over depth within the
first steps. A run counts once for each fault, as found or not. Consequences of the planted fault, such as a loss that
blows up and becomes NaN, are listed with the run and count neither way. Thresholds are those of the cited source if
there is one. Seeds below 400 were used while the rules were written; the table uses others.

    python benchmarks/diagnosis.py [--seeds 1000 1001 1002 1003]
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from _machine import processor
from _run import Fault, Run, train
from _runs import RUNS

from gradprobe.diagnosis.rules import RULES
from gradprobe.diagnosis.rules.replicas import REPLICAS_DIFFER

HELD_OUT = (1000, 1001, 1002, 1003)  # seeds on which no threshold and no run was tuned


def found_in(run: Run, seed: int) -> set[Fault]:
    """Trains one run and diagnoses it.

    Args:
        run: The run.
        seed: Seed of the weights and of the order of the images.

    Returns:
        Titles of the findings. Symptoms that another finding explains are left out, except for the planted fault.
    """
    with train(run, seed) as probe:
        return {found.title for found in probe.findings() if not found.follows or found.title == run.fault}


@dataclass
class Score:
    """Counts for one fault; `wrong` lists the misjudged runs."""

    hits: int = 0
    false_alarms: int = 0
    misses: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        """Share of the findings that were right."""
        return self.hits / (self.hits + self.false_alarms) if self.hits + self.false_alarms else math.nan

    @property
    def recall(self) -> float:
        """Share of the planted faults that were found."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else math.nan


def scores(seeds: Sequence[int]) -> dict[Fault, Score]:
    """Trains all runs and counts.

    Args:
        seeds: Every run is trained once with each seed.

    Returns:
        The counts by fault.
    """
    table = {rule.title: Score() for rule in RULES if rule is not REPLICAS_DIFFER}  # needs several processes
    for run in RUNS:
        for seed in seeds:
            found = found_in(run, seed)
            for rule, score in table.items():
                if rule == run.fault and rule in found:
                    score.hits += 1
                elif rule == run.fault:
                    score.misses += 1
                    score.wrong.append(f"missed: {run.name}, seed {seed}")
                elif rule in found and rule not in run.follows:
                    score.false_alarms += 1
                    score.wrong.append(f"false alarm: {run.name}, seed {seed}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(HELD_OUT))
    seeds = parser.parse_args().seeds
    start = time.perf_counter()
    table = scores(seeds)
    lengths = sorted({run.n_steps for run in RUNS})
    n_healthy = sum(run.fault is None for run in RUNS) * len(seeds)
    print(f"{processor()}; torch {torch.__version__}, python {platform.python_version()}")
    print(f"{len(RUNS) * len(seeds)} runs, {n_healthy} of them healthy; steps {lengths}; seeds {seeds}")
    print(f"{'fault':22}{'planted':>9}{'found':>8}{'missed':>8}{'false alarms':>14}{'precision':>11}{'recall':>8}")
    for rule, score in table.items():
        planted = score.hits + score.misses
        numbers = f"{planted:9}{score.hits:8}{score.misses:8}{score.false_alarms:14}"
        print(f"{rule:22}{numbers}{score.precision:11.3f}{score.recall:8.3f}")
    for rule, score in table.items():
        for line in score.wrong:
            print(f"{rule}: {line}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
