"""Rows that CUDA graphs write.

What a capture records, every replay does again, without Python: to the same rows, and only while a flag on the device
says so. Which of the graphs ran in a step, their rows tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradprobe import ops
from gradprobe.observers.event_rows import PythonEventRows
from gradprobe.ops.rows import ABS_MAX
from gradprobe.snapshot.records import FloatArray, IntArray

_NOT_WRITTEN = -1.0  # no tensor's largest magnitude

_captured: list[GraphRows] = []  # a graph writes there, and asks the flag, for as long as it lives


def is_capturing(device: torch.device) -> bool:
    """Tells whether what runs on a device now is recorded and not done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def can_capture(device: torch.device) -> bool:
    """Tells whether a device has graphs that are captured."""
    return device.type == "cuda"


class GraphRows(PythonEventRows):
    """Rows whose events are noted when a graph is captured, and stay.

    Args:
        device: Where the rows lie.
        n_rows: Number of rows to begin with; more are made in the memory of the graph that needs them.
    """

    fill = _NOT_WRITTEN

    def __init__(self, device: torch.device, n_rows: int) -> None:
        super().__init__(device, n_rows)
        self._flag = torch.ones((), dtype=torch.int32, device=device)
        self._is_on = True
        self._aside: list[torch.Tensor] | None = None  # what was written before the switch went off in this step
        self._sites_there = self._numels_there = torch.empty(0)  # of all events, on the device

    def switch(self, is_on: bool) -> None:
        """Says whether graphs that are replayed from now on take statistics; what others write meanwhile is undone."""
        if is_on == self._is_on:
            return
        self._is_on = is_on
        self._flag.fill_(int(is_on))
        if not is_on:
            self._aside = [block.clone() for block in self._blocks]
            return
        # kernels that ask no flag, and copies of what was left unwritten, have gone on
        aside, self._aside = self._aside, None
        self.forget()
        for block, kept in zip(self._blocks, aside or [], strict=False):  # there may be more blocks now
            block.copy_(kept)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Has the kernels that are captured inside the block ask for the switch whenever they run."""
        if self not in _captured:
            _captured.append(self)
        with ops.counting_if(self._flag):
            yield

    def collect(self, n_sites: int) -> tuple[IntArray, FloatArray, torch.Tensor, torch.Tensor]:
        """Gives what the graphs have written since the last call of `forget`.

        Args:
            n_sites: Number of sites, S.

        Returns:
            The sites of the N events that were ever captured, and the smallest normal numbers of their dtypes; their
            rows, those of graphs that did not run zero; and the number of elements behind each site. [N], [N], [N, 6],
            [S] float64
        """
        sites, numels, of_dtypes, rows = self.events()
        if len(sites) != len(self._sites_there):
            self._sites_there = torch.from_numpy(sites).to(self._device)
            self._numels_there = torch.from_numpy(numels).to(self._device, torch.float64)
        rows = rows[1 : 1 + len(sites)]
        is_written = rows[:, ABS_MAX] != _NOT_WRITTEN
        of_sites = torch.zeros(n_sites, dtype=torch.float64, device=self._device)
        of_sites.index_add_(0, self._sites_there, self._numels_there * is_written)
        return sites, of_dtypes, torch.where(is_written.unsqueeze(1), rows, 0.0), of_sites

    def forget(self) -> None:
        """Takes all rows for not written."""
        self._rows_of.clear()
        self._aside = None
        for block in self._blocks:
            block[:, ABS_MAX].fill_(_NOT_WRITTEN)
