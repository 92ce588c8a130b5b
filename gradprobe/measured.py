"""What the host knows of a measurement at once, without waiting for the device. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


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
    numels: npt.NDArray[np.int64]
