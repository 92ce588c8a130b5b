"""Activations and residual junctions of one step, as frozen host data that needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gradprobe.ops.rows import ABS_MAX, SUM_ABS, SUM_SQ, range_exponent
from gradprobe.snapshot.records import JUNCTION_KINDS, Events, FloatArray
from gradprobe.snapshot.stats import SiteStats, finish_rows, site_stats

ACTIVATION_KINDS = ("activation", "activation_grad")
_GRADIENT_KINDS = frozenset({"activation_grad", "junction_grad", "shortcut_grad", "branch_grad"})
_FORWARD_KINDS = frozenset({"activation", "junction_y"})


@dataclass(frozen=True)
class SignalTable:
    """The sites of M modules, two each, and then of J junctions, one for each of `JUNCTION_KINDS`.

    Attributes:
        activations: Names of the modules. Length M.
        junctions: Names of the junctions. Length J.
        module_types: Names of the modules' classes. Length M.
    """

    activations: tuple[str, ...]
    junctions: tuple[str, ...]
    module_types: tuple[str, ...]

    @property
    def first_junction_site(self) -> int:
        """Number of the sites before those of the junctions."""
        return len(ACTIVATION_KINDS) * len(self.activations)

    @property
    def n_modules(self) -> int:
        """Number of modules and junctions."""
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
        """Which sites are of gradients, that loss scaling scales. Shape [S]."""
        return np.array([kind in _GRADIENT_KINDS for kind in self.kinds], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Activation:
    """A module's output in one step.

    Attributes:
        name: Name of the module.
        module_type: Name of its class, such as "ReLU".
        output: Statistics of what it returned; of all tensors and calls together.
        gradient: Statistics of the gradient that came back to that, None where none did.
    """

    name: str
    module_type: str
    output: SiteStats
    gradient: SiteStats | None


@dataclass(frozen=True, slots=True)
class Junction:
    """A residual junction y = x + F(x), or max(x + F(x), 0), in one step.

    Attributes:
        name: Name of the junction's module.
        x: Statistics of what came by the shortcut.
        f: Statistics of what came out of the branch, F(x).
        y: Statistics of the junction's output.
        gradient: Statistics of the gradient that came in at y, None where none did.
        shortcut: Of the part of the gradient at x that the shortcut brought.
        branch: Of the part that came back through the branch, whatever else takes x. What others take of the branch, as
            two branches behind one normalisation do, brings theirs with it; of a branch that is divided among compiled
            graphs, only what lies in the graph of the sum is seen. None where the branch does not begin at x, as beside
            a projection, or where a compiled graph holds only one of the two.
        cosine: Of the angle between the two parts, to 3e-6; NaN where one is zero or missing, or where one was there in
            only some of several calls.
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
        """Norm of the shortcut's part over the sum of the norms of both parts; NaN where one is missing."""
        if self.shortcut is None or self.branch is None or self.shortcut.numel != self.branch.numel:
            return math.nan
        both = self.shortcut.norm + self.branch.norm
        return self.shortcut.norm / both if both > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Signals:
    """What passed by in one step.

    Attributes:
        table: The sites.
        rows: Raw statistics in the order of `gradprobe.STATS`. [S, 6]
        events: What passed by, in the order of execution.
        scale: Factor on the gradients that undoes loss scaling.
    """

    table: SignalTable
    rows: FloatArray
    events: Events
    scale: float

    @property
    def scaled_abs_mean(self) -> FloatArray:
        """Mean magnitude at each site before loss scaling is undone. For dtypes up to float32. Shape [S]."""
        # Rows of float16, bfloat16 and float32 have no range exponent.
        return self.rows[:, SUM_ABS] / np.maximum(self.events.measured.numels, 1)

    @cached_property
    def columns(self) -> dict[str, FloatArray]:
        """Each statistic for all S sites, absent ones included. Values of shape [S]."""
        scales = np.where(self.table.is_gradient, self.scale, 1.0)
        return finish_rows(self.rows, self.events.measured.numels, scales)

    @property
    def passed(self) -> list[int]:
        """Sites that hold the statistics of a tensor, in the order of execution."""
        return [site for site in dict.fromkeys(self.events.sites) if self.table.kinds[site] != JUNCTION_KINDS[-1]]

    @cached_property
    def activations(self) -> dict[str, Activation]:
        """The modules that returned something, in the order of execution."""
        found = {}
        for site in dict.fromkeys(self.events.sites):
            if self.table.kinds[site] == "activation":
                output, name = self.stats(site), self.table.names[site]
                assert output is not None
                module_type = self.table.module_types[site // len(ACTIVATION_KINDS)]
                found[name] = Activation(name, module_type, output, self.stats(site + 1))
        return found

    @cached_property
    def junctions(self) -> dict[str, Junction]:
        """The junctions that were passed, in the order of execution."""
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

    def sender(self, name: str) -> str:
        """Names the module that ran after another, and so sends the gradient of its output back; "" for the loss.

        Args:
            name: Name of a module.
        """
        ran = [self.table.names[site] for site in self.events.sites if self.table.kinds[site] in _FORWARD_KINDS]
        if name not in ran:  # it ran in an earlier step
            return ""
        others = (other for other in ran[ran.index(name) + 1 :] if other != name and not name.startswith(f"{other}."))
        return next(others, "")

    def stats(self, site: int) -> SiteStats | None:
        """Statistics of a site, None where nothing passed by there.

        Args:
            site: Position of the site.
        """
        if not self.events.measured.present[site]:
            return None
        return site_stats(self.table.names[site], self.table.kinds[site], self.columns, site)

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
