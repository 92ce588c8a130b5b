"""Synthetic histories: the gradients of a run, and the outputs of its forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.records import Events, Measured, Provenance
from gradprobe.snapshot.signals import Signals, SignalTable

N_VALUES = 1000  # of each output


def snapshot(
    step: int,
    norms: list[float],
    nonfinite: int = 0,
    ndim: int = 2,
    loss: float | None = None,
    zeros: float = 0.0,
    n_classes: int = 0,
) -> Snapshot:
    """Returns a snapshot of weights of one element each with these norms; `zeros` is the zero count of each.

    With classes, the last layer has a bias, without a gradient.
    """
    n_weights, n_biases = len(norms), int(n_classes > 0)
    names = (*(f"layer{k}.weight" for k in range(n_weights)), *[f"layer{n_weights - 1}.bias"] * n_biases)
    rows = np.array([[norm, norm, norm**2, norm, zeros, 0.0] for norm in [*norms, *[0.0] * n_biases]])
    rows[0, 5] = nonfinite
    ndims = (ndim,) * n_weights + (1,) * n_biases
    n_sites = n_weights + n_biases
    return Snapshot(
        step=step,
        loss=loss,
        provenance=Provenance("unscaled", "local", "raw"),
        skipped=False,
        table=SiteTable(names, ("parameter",) * n_sites, ndims, {name: k for k, name in enumerate(names)}),
        rows=rows,
        measured=Measured(np.arange(n_sites) < n_weights, np.where(np.arange(n_sites) < n_weights, 1, n_classes)),
    )


def course(
    losses: list[float], norms: list[float] | None = None, first: int = 0, n_classes: int = 10
) -> list[Snapshot]:
    """Returns a history with these losses."""
    norms = norms or [1.0, 1.0]
    return [snapshot(first + step, norms, loss=loss, n_classes=n_classes) for step, loss in enumerate(losses)]


def rules_of(history: list[Snapshot]) -> list[str]:
    return [finding.rule for finding in diagnose(history)]


FALLING = [2.3 * 0.95**step for step in range(40)]
FLAT = [2.3 + 0.01 * (-1) ** step for step in range(40)]


@dataclass(frozen=True)
class Out:
    """The output of a module, or of a residual add if it has no module type."""

    name: str
    module_type: str
    rms: float
    mean: float = 0.0
    zeros: float = 0.0


def with_outputs(one: Snapshot, outputs: Sequence[Out]) -> Snapshot:
    """Adds outputs of modules and residual adds, in the order of execution."""
    modules = [out for out in outputs if out.module_type]
    junctions = [out for out in outputs if not out.module_type]
    table = SignalTable(
        tuple(out.name for out in modules),
        tuple(out.name for out in junctions),
        tuple(out.module_type for out in modules),
    )
    rows, events = np.zeros((table.n_sites, 6)), []
    for out in outputs:
        kind = "activation" if out.module_type else "junction_y"
        (site,) = [k for k, named in enumerate(zip(table.names, table.kinds, strict=True)) if named == (out.name, kind)]
        rows[site] = [out.mean * N_VALUES, 0.0, out.rms**2 * N_VALUES, out.rms, out.zeros * N_VALUES, 0.0]
        events.append(site)
    present = np.isin(np.arange(table.n_sites), events)
    measured = Measured(present, np.where(present, N_VALUES, 0))
    seen = Events(tuple(events), measured, np.full(table.n_sites, 1.2e-38))
    return replace(one, signals=Signals(table, rows, seen, 1.0))


def layers(rms: Sequence[float], zeros: float = 0.5) -> list[Out]:
    """Returns outputs of layers with the weights of `snapshot`, with a ReLU after each except the last."""
    found = []
    for k, value in enumerate(rms):
        found += [Out(f"layer{k}", "Linear", value), Out(f"relu{k}", "ReLU", value / 2, zeros=zeros)]
    return found[:-1]


def passing(losses: Sequence[float], outputs: Sequence[Out], n_weights: int = 6, first: int = 0) -> list[Snapshot]:
    """Returns a history with these losses, healthy gradients and the same outputs in every step."""
    return [with_outputs(one, outputs) for one in course(list(losses), [1.0] * n_weights, first)]
