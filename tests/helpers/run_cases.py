"""Synthetic runs for the page of a run: gradients, outputs, residual adds and updates of a deep network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gradprobe.ops.rows import ABS_MAX, N_ZERO, SUM_ABS, SUM_SQ
from gradprobe.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.records import Events, FloatArray, Measured, Provenance
from gradprobe.snapshot.signals import Signals, SignalTable
from gradprobe.snapshot.updates import Updates

N = 100  # elements of each tensor


def rows_of(norms: FloatArray, zeros: float = 0.0) -> FloatArray:
    """Raw rows of tensors of N elements with these norms."""
    rows, rms = np.zeros((len(norms), 6)), norms / np.sqrt(N)
    rows[:, SUM_ABS], rows[:, SUM_SQ], rows[:, ABS_MAX], rows[:, N_ZERO] = N * rms, norms**2, 3 * rms, zeros * N
    return rows


def run(
    n_steps: int = 20,
    n_weights: int = 6,
    n_adds: int = 2,
    name: Callable[[int], str] = "layer{}".format,
    every: int = 1,
    smallest_normal: float = 2.0**-126,
) -> list[Snapshot]:
    """Returns a run whose gradient norms grow from 1e-3 at the input to 1 at the output, with noise."""
    generator = np.random.default_rng(0)
    names = tuple(f"{name(k)}.weight" for k in range(n_weights))
    table = SiteTable(names, ("parameter",) * n_weights, (2,) * n_weights, {one: k for k, one in enumerate(names)})
    modules, adds = tuple(name(k) for k in range(n_weights)), tuple(f"{name(k)}.add" for k in range(n_adds))
    signals = SignalTable(modules, adds, ("ReLU",) * n_weights)
    everything = Measured(np.ones(n_weights, dtype=np.bool_), np.full(n_weights, N))
    present = np.ones(signals.n_sites, dtype=np.bool_)
    order = tuple(range(signals.n_sites))
    events = Events(order, Measured(present, np.full(signals.n_sites, N)), np.full(signals.n_sites, smallest_normal))
    snapshots = []
    for step in range(n_steps):
        norms = 10.0 ** (np.linspace(-3, 0, n_weights) + 0.1 * generator.standard_normal(n_weights))
        outputs = 10.0 ** (0.1 * generator.standard_normal(signals.n_sites))
        snapshots.append(
            Snapshot(
                step=every * step,
                loss=2.3 * 0.99**step,
                provenance=Provenance("unscaled", "local", "raw"),
                skipped=False,
                table=table,
                rows=rows_of(norms),
                measured=everything,
                signals=Signals(signals, rows_of(outputs, 0.5), events, 1.0),
                parameter_updates=Updates(names, rows_of(np.ones(n_weights)), rows_of(1e-3 * norms), everything),
            )
        )
    return snapshots
