"""Magnitudes counted in float64, and what attached probes say of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

import gradprobe
from gradprobe.snapshot import FloatArray, Snapshot

EDGES = np.concatenate(([0.0], np.exp2(np.arange(-150, 129)), [math.inf]))


def counts_of(tensor: torch.Tensor, edges: FloatArray = EDGES) -> list[int]:
    """Counts in float64 how many values of a tensor lie in each bin."""
    x = tensor.detach().double().abs().numpy().ravel()
    x = x[np.isfinite(x) & (x > 0)]
    return np.bincount(np.searchsorted(edges, x) - 1, minlength=len(edges) - 1).tolist()


def kurtosis_of(tensor: torch.Tensor) -> float:
    """Computes the kurtosis about zero in extended precision; NaN if all values are zero or one is not finite."""
    x = np.abs(tensor.detach().double().numpy().ravel().astype(np.longdouble))
    if not np.isfinite(x).all() or not x.any():
        return math.nan
    y = x / x.max()
    return float(len(y) * (y**4).sum() / (y**2).sum() ** 2)


def attach(model: nn.Module, **options: Any) -> gradprobe.Probe:
    """Attaches a strict probe that counts magnitudes, in every step unless told otherwise."""
    return gradprobe.attach(model, magnitudes=True, strict=True, **{"magnitudes_every": 1, **options})


def newest(probe: gradprobe.Probe) -> Snapshot:
    snapshot = probe.latest(wait=True)
    assert snapshot is not None
    return snapshot
