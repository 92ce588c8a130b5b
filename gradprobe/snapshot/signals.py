"""Activations and residual adds of one step, as frozen host data. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradprobe.ops.rows import ABS_MAX, SUM_ABS, SUM_SQ, range_exponent
from gradprobe.snapshot.magnitudes import ActivationMagnitudes, Magnitudes, count_in, edges_of, magnitudes_of
from gradprobe.snapshot.records import JUNCTION_KINDS, Events, FloatArray
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats

ACTIVATION_KINDS = ("activation", "activation_grad")
_GRADIENT_KINDS = frozenset({"activation_grad", "junction_grad", "shortcut_grad", "branch_grad"})
_FORWARD_KINDS = frozenset({"activation", "junction_y"})


@dataclass(frozen=True)
class SignalTable:
    """The sites of M modules, by `ACTIVATION_KINDS`, followed by those of J residual adds, by `JUNCTION_KINDS`.

    Attributes:
        activations: Names of the modules. Length M.
        junctions: Names of the residual adds. Length J.
        module_types: Names of the modules' classes. Length M.
    """

    activations: tuple[str, ...]
    junctions: tuple[str, ...]
    module_types: tuple[str, ...]

    @property
    def first_junction_site(self) -> int:
        """Number of sites in front of those of the residual adds."""
        return len(ACTIVATION_KINDS) * len(self.activations)

    @property
    def n_modules(self) -> int:
        """Number of modules and residual adds."""
        return len(self.activations) + len(self.junctions)

    @property
    def n_sites(self) -> int:
        """Number of sites, S."""
        return self.first_junction_site + len(JUNCTION_KINDS) * len(self.junctions)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of the module of each site. Length S."""
        return tuple(
            [name for name in self.activations for _ in ACTIVATION_KINDS]
            + [name for name in self.junctions for _ in JUNCTION_KINDS]
        )

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each site. Length S."""
        return ACTIVATION_KINDS * len(self.activations) + JUNCTION_KINDS * len(self.junctions)

    @cached_property
    def is_gradient(self) -> npt.NDArray[np.bool_]:
        """Whether each site observes a gradient, which loss scaling scales. Shape [S]."""
        return np.array([kind in _GRADIENT_KINDS for kind in self.kinds], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Activation:
    """A module's output in one step.

    Attributes:
        name: Name of the module.
        module_type: Name of its class, such as "ReLU".
        output: Statistics of its output, over all tensors and calls together.
        gradient: Statistics of the gradient of the output, None if there was none.
    """

    name: str
    module_type: str
    output: SiteStats
    gradient: SiteStats | None


@dataclass(frozen=True, slots=True)
class Junction:
    """A residual add y = x + F(x), or max(x + F(x), 0), in one step.

    Attributes:
        name: Name of the module.
        x: Statistics of the shortcut, x.
        f: Statistics of the branch's output, F(x).
        y: Statistics of the sum.
        gradient: Statistics of the gradient at y, None if there was none.
        shortcut: Statistics of the part of the gradient at x that comes through the shortcut.
        branch: Statistics of the part that comes through the branch, without other uses of x. If the branch shares a
            module with another branch, such as a normalisation, the other's gradient is included. If it is split over
            several compiled graphs, only the gradient within the graph of the sum is seen. None if the branch does not
            start at x, as with a projection shortcut, or if a compiled graph contains only x or only the sum.
        cosine: Cosine of the angle between the two parts, to 3e-6; NaN if one is zero or missing, or was missing in
            some of several calls.
    """

    name: str
    x: SiteStats
    f: SiteStats
    y: SiteStats
    gradient: SiteStats | None
    shortcut: SiteStats | None
    branch: SiteStats | None
    cosine: float

    @property
    def shortcut_share(self) -> float:
        """Norm of the shortcut's part over the sum of the norms of both parts; NaN if one is missing."""
        if self.shortcut is None or self.branch is None or self.shortcut.numel != self.branch.numel:
            return math.nan
        both = self.shortcut.norm + self.branch.norm
        return self.shortcut.norm / both if both > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Signals:
    """Statistics of the activations and residual adds of one step.

    Attributes:
        table: The sites.
        rows: Raw statistics in the order of `gradprobe.STATS`. [S, 6]
        events: The events, in order of execution.
        scale: Factor that undoes loss scaling on the gradients.
        reduction: "local": of this process; "global": of the elements on all ranks together, copies included.
        magnitude_rows: Rows of magnitudes, of which those of activations are read; None if they were not counted in
            this step. [S, 285]
    """

    table: SignalTable
    rows: FloatArray
    events: Events
    scale: float
    reduction: Literal["local", "global"] = "local"
    magnitude_rows: FloatArray | None = None

    @property
    def scaled_abs_mean(self) -> FloatArray:
        """Mean magnitude at each site, with loss scaling not undone. For dtypes up to float32. Shape [S]."""
        # rows of float16, bfloat16 and float32 have a range exponent of 0
        return self.rows[:, SUM_ABS] / np.maximum(self.events.measured.numels, 1)

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Each statistic of `COLUMNS` for all S sites, with or without an event. Values of shape [S]."""
        scales = np.where(self.table.is_gradient, self.scale, 1.0)
        return finish_rows(self.rows, self.events.measured.numels, scales)

    @property
    def observed(self) -> list[int]:
        """The sites that hold the statistics of a tensor, in order of execution."""
        return [site for site in dict.fromkeys(self.events.sites) if self.table.kinds[site] != JUNCTION_KINDS[-1]]

    @cached_property
    def activations(self) -> dict[str, Activation]:
        """The modules that returned tensors, in order of execution."""
        found = {}
        for site in dict.fromkeys(self.events.sites):
            if self.table.kinds[site] == "activation":
                output, name = self.stats(site), self.table.names[site]
                assert output is not None
                module_type = self.table.module_types[site // len(ACTIVATION_KINDS)]
                found[name] = Activation(name, module_type, output, self.stats(site + 1))
        return found

    @cached_property
    def activation_magnitudes(self) -> dict[str, ActivationMagnitudes]:
        """How the magnitudes of outputs and their gradients spread, by module, in order of execution."""
        unscaled, scaled = edges_of(1.0), edges_of(self.scale)
        found = {}
        for site in dict.fromkeys(self.events.sites):
            output = self._magnitudes(site, 1.0, unscaled) if self.table.kinds[site] == "activation" else None
            if output is not None:
                found[output.name] = ActivationMagnitudes(output, self._magnitudes(site + 1, self.scale, scaled))
        return found

    @cached_property
    def junctions(self) -> dict[str, Junction]:
        """The residual adds that were called, in order of execution."""
        found = {}
        for first in dict.fromkeys(self.events.sites):
            if self.table.kinds[first] == JUNCTION_KINDS[0]:
                x, f, y, gradient, shortcut, branch = (self.stats(first + k) for k in range(6))
                assert x is not None
                assert f is not None
                assert y is not None
                name = self.table.names[first]
                found[name] = Junction(name, x, f, y, gradient, shortcut, branch, self._cosine(first))
        return found

    @cached_property
    def shortcut_shares(self) -> dict[str, float]:
        """`Junction.shortcut_share` of the residual adds that were called, in order of execution."""
        table, measured, norms = self.table, self.events.measured, self.columns["norm"]
        ran = [site for site in dict.fromkeys(self.events.sites) if table.kinds[site] == JUNCTION_KINDS[0]]
        shortcut = np.array(ran, dtype=np.int64) + JUNCTION_KINDS.index("shortcut_grad")
        branch = np.array(ran, dtype=np.int64) + JUNCTION_KINDS.index("branch_grad")
        is_known = measured.present[shortcut] & measured.present[branch]
        is_known &= measured.numels[shortcut] == measured.numels[branch]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(is_known, norms[shortcut] / (norms[shortcut] + norms[branch]), math.nan)
        return dict(zip((table.names[site] for site in ran), shares.tolist(), strict=True))

    def sender(self, name: str) -> str:
        """Names the module that ran after another and so computed the gradient of its output; "" for the loss.

        Args:
            name: Name of a module.
        """
        ran = [self.table.names[site] for site in self.events.sites if self.table.kinds[site] in _FORWARD_KINDS]
        if name not in ran:  # it ran in an earlier step
            return ""
        others = (other for other in ran[ran.index(name) + 1 :] if other != name and not name.startswith(f"{other}."))
        return next(others, "")

    def stats(self, site: int) -> SiteStats | None:
        """Returns the statistics of a site, None if it had no event.

        Args:
            site: Position of the site.
        """
        if not self.events.measured.present[site]:
            return None
        return site_stats(self.table.names[site], self.table.kinds[site], self.columns, site)

    def all_stats(self) -> Iterator[SiteStats]:
        """Yields the statistics of every observed tensor, in order of execution."""
        yield from (stats for site in self.observed if (stats := self.stats(site)) is not None)

    def _magnitudes(self, site: int, scale: float, edges: FloatArray) -> Magnitudes | None:
        """Reads the magnitudes at a site, None unless all of its values were counted."""
        measured = self.events.measured
        if self.magnitude_rows is None or not measured.present[site]:
            return None
        row = self.magnitude_rows[site]
        if count_in(row) != measured.numels[site]:
            return None
        return magnitudes_of(self.table.names[site], row, scale, edges)

    def _cosine(self, first: int) -> float:
        shortcut, branch, dot = (first + JUNCTION_KINDS.index(kind) for kind in JUNCTION_KINDS[4:])
        measured = self.events.measured
        if not measured.present[dot] or measured.numels[shortcut] != measured.numels[branch]:
            return math.nan
        sums, abs_max = self.rows[[shortcut, branch, dot], SUM_SQ], self.rows[[shortcut, branch, dot], ABS_MAX]
        norms = np.sqrt(sums[:2])
        exponents = range_exponent(abs_max)
        if not norms.all():
            return math.nan
        with np.errstate(invalid="ignore", over="ignore"):
            cosine = np.ldexp(sums[2] / norms[0] / norms[1], 2 * exponents[2] - exponents[0] - exponents[1])
        return float(np.clip(cosine, -1.0, 1.0))
