"""The part of a measurement that the host knows without waiting for the device. Needs no torch.

A site is one place where statistics are taken: a parameter, the output of a module or its gradient, or one of
`JUNCTION_KINDS` at a residual add.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# The sites of a residual add, y = x + F(x), in order: the operands and the sum, the gradient at y, the parts of the
# gradient at x that come through the shortcut and through the branch, the sum of the products of these two.
JUNCTION_KINDS = (
    "junction_x",
    "junction_f",
    "junction_y",
    "junction_grad",
    "shortcut_grad",
    "branch_grad",
    "shortcut_dot_branch",
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Provenance(NamedTuple):
    """What the gradients of a snapshot are.

    Attributes:
        scale: "unscaled", or "unknown": a scaler is in use that the probe does not know, or has unscaled only a part of
            the gradients. "scaled" does not occur in this version.
        reduction: "local" to one process; "averaged" over the processes by DistributedDataParallel; "global": of the
            whole gradient, reduced over the ranks that hold a part; "shard": of this rank's part of it.
        state: "raw": the optimizer got these very gradients; "clipped": it got these times `Snapshot.clip_factor`;
            "modified": they were changed in another way, or written to before `when="step"` measured them. At most
            eight gradients are compared to tell, by norm and largest magnitude; with `when="hook"`, only the probe's
            own clipping is noticed. Assigning to a gradient's `.data` leaves no trace.
    """

    scale: Literal["unscaled", "scaled", "unknown"]
    reduction: Literal["local", "averaged", "global", "shard"]
    state: Literal["raw", "modified", "clipped"]

    @property
    def clipping(self) -> Literal["pre-clip", "post-clip"]:
        """Deprecated: "post-clip" if the state is "modified", else "pre-clip"."""
        warnings.warn("Provenance.clipping is deprecated; use state", DeprecationWarning, stacklevel=2)
        return "post-clip" if self.state == "modified" else "pre-clip"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Which tensors were measured.

    Attributes:
        present: Whether each site had one. [K]
        numels: Number of elements measured at each site; 0 if there was no tensor. [K]
    """

    present: npt.NDArray[np.bool_]
    numels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """The events of one step at the sites of activations and residual adds. An event is one tensor observed at a site.

    Attributes:
        sites: Site of each event, in order of execution. Length N.
        measured: Which sites had an event, and the number of elements of all their events together.
        smallest_normal: Smallest normal number of the dtype of each site's last tensor, NaN if unknown. [S]
        is_conditional: Some events belong to CUDA graphs that may not have run; only their rows tell.
    """

    sites: tuple[int, ...]
    measured: Measured
    smallest_normal: FloatArray
    is_conditional: bool = False

    def seen(self, numels: IntArray) -> Events:
        """Drops the events of graphs that did not run.

        Args:
            numels: Number of elements observed at each site. [S]

        Returns:
            The events at sites with at least one element.
        """
        present = self.measured.present & (numels > 0)
        sites = tuple(site for site in self.sites if present[site])
        return Events(sites, Measured(present, np.where(present, numels, 0)), self.smallest_normal)
