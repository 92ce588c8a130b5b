"""Calls kernels whose PTX runs on the CPU, and says how many bytes they moved."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from emulation.kernels import Kernels


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory that the instructions of all threads load and store."""

    loaded: int
    stored: int


class PtxKernels(Kernels):
    """The kernels of a library built by `ptx.building.build`."""

    def take_traffic(self) -> Traffic:
        """Returns the traffic of all launches since the last call."""
        both = (ctypes.c_int64 * 2)()
        self._library.ptx_take_traffic(both)
        return Traffic(*both)
