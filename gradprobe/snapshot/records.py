"""What the host knows of a measurement at once, without waiting for the device. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# What is measured at a residual junction, y = x + F(x), in the order of its sites: the operands and the sum, the
# gradient that comes in at y, the parts of the gradient at x that come by the shortcut and through the branch, the sum
# of their products.
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
    """How the gradients of a snapshot came to be what they are."""

    scale: Literal["scaled", "unscaled"]
    reduction: Literal["local", "averaged"]
    clipping: Literal["pre-clip", "post-clip"]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What one pass saw.

    Attributes:
        present: Which sites had a gradient. [K]
        numels: Elements measured for each site; 0 where there was no gradient. [K]
    """

    present: npt.NDArray[np.bool_]
    numels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """What passed by in one step at the sites of activations and junctions.

    Attributes:
        sites: Site of each event, in the order of execution. Length N.
        measured: Which sites had an event, and the elements of all of their events.
        smallest_normal: Smallest normal number of the dtype that a site had last; NaN where none is known. [S]
        is_conditional: Some events are those of CUDA graphs that may not have run; the record tells.
    """

    sites: tuple[int, ...]
    measured: Measured
    smallest_normal: FloatArray
    is_conditional: bool = False

    def seen(self, numels: IntArray) -> Events:
        """Gives the events of the graphs that ran.

        Args:
            numels: Elements observed at each site. [S]

        Returns:
            The events at sites where there were any.
        """
        sites = tuple(site for site in self.sites if numels[site] > 0)
        return Events(sites, Measured(numels > 0, numels), self.smallest_normal)
