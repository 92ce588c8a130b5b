"""Runs in memory, ordinary and odd, and a parser of the page, for the tests of the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser

from gradprobe.report import html
from gradprobe.report.records import Cell, EpochRow, JunctionRow, LayerRow, Status
from gradprobe.report.summary import summarise

PARAMETERS = {20: 269_722, 56: 853_018, 110: 1_727_962}

# Share of the shortcut at three residual adds; the second one's shortcut changes the shape.
FIRST_SHARES, LATER_SHARES = (0.4, math.nan, 0.5), (0.7, math.nan, 0.9)
UNTRAINED = (90.0, 90.0)  # percent, for ten classes
HEALTHY, VANISHING, EXPLODING = (1.2, 0.8, 0.5), (1e-9, 1e-5, 1e-2), (500.0, 20.0, 0.5)


@dataclass
class Recorded:
    """A run in memory."""

    config: dict[str, object] = field(default_factory=lambda: {"data": "digits", "epochs": 4})
    meta: dict[str, str] = field(default_factory=lambda: {"gradprobe_version": "0.1.0", "torch_version": "2.13.0"})
    rows: list[Cell] = field(default_factory=list)
    epoch_rows: dict[int, list[EpochRow]] = field(default_factory=dict)
    layer_rows: dict[tuple[int, int], list[LayerRow]] = field(default_factory=dict)
    junction_rows: dict[tuple[int, int], list[JunctionRow]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        return self.rows

    def epochs(self, cell_id: int) -> list[EpochRow]:
        return self.epoch_rows.get(cell_id, [])

    def layers(self, cell_id: int, epoch: int) -> list[LayerRow]:
        return self.layer_rows.get((cell_id, epoch), [])

    def junctions(self, cell_id: int, epoch: int) -> list[JunctionRow]:
        return self.junction_rows.get((cell_id, epoch), [])

    def add(
        self,
        family: str,
        depth: int,
        errors: tuple[float, float] = (1.0, 2.0),
        *,
        seed: int = 0,
        first: tuple[float, ...] = HEALTHY,
        end: tuple[float, ...] = HEALTHY,
        epochs: int = 4,
        status: Status = "done",
        loss: float = 0.1,
        nonfinite: int = 0,
        shares: tuple[tuple[float, ...], tuple[float, ...]] = (FIRST_SHARES, LATER_SHARES),
    ) -> Recorded:
        """Adds a cell with final `errors` (train, test), gradient norms `first` and `end`, and `status`.

        A residual one has the shortcut's `shares` in its first step and later.
        """
        cell = len(self.rows) + 1
        self.rows.append(Cell(cell, family, depth, seed, PARAMETERS.get(depth, 1000), status))
        self.epoch_rows[cell] = [EpochRow(e, loss, *(errors if e else UNTRAINED), 1.5) for e in range(epochs + 1)]
        for epoch in range(epochs + 1):
            norms = end if epoch else first
            self.layer_rows[cell, epoch] = [
                LayerRow(epoch, position, f"layers.{position}.weight", norm, norm / 10, norm / 2, 0.0, nonfinite, 144)
                for position, norm in enumerate(norms)
            ]
            if family == "resnet" and epoch < epochs:
                self.junction_rows[cell, epoch] = [
                    JunctionRow(epoch, position, f"stages.{position}.join", 2 * share, 2 * (1 - share), 0.25, share)
                    for position, share in enumerate(shares[min(epoch, 1)])
                ]
        return self


def degraded(seeds: int = 3) -> Recorded:
    """plain-56 with healthy gradients and a high training error, and three networks that train."""
    run = Recorded()
    for seed in range(seeds):
        run.add("plain", 20, (0.3 + 0.1 * seed, 1.6), seed=seed)
        run.add("plain", 56, (65.0 + 2 * seed, 70.0 + seed), seed=seed, first=EXPLODING)
        run.add("resnet", 20, (0.0, 0.7), seed=seed)
        run.add("resnet", 56, (1.4, 3.8), seed=seed)
    return run


def all_nan() -> Recorded:
    nan = math.nan
    return Recorded().add("plain", 20, (nan, nan), first=(nan,) * 3, end=(nan,) * 3, loss=nan, nonfinite=144)


def not_started() -> Recorded:
    run = Recorded()
    run.rows.append(Cell(1, "plain", 20, 0, 269_722, "pending"))
    return run


def no_layers() -> Recorded:
    run = Recorded().add("plain", 20)
    run.layer_rows.clear()
    return run


def interrupted() -> Recorded:
    run = Recorded({"data": "digits", "epochs": 20}).add("plain", 20, epochs=20).add("plain", 56, epochs=7)
    run.rows[1] = Cell(2, "plain", 56, 0, 853_018, "pending")
    run.rows.append(Cell(3, "plain", 110, 0, 1_727_962, "pending"))
    return run


ODD: dict[str, Callable[[], Recorded]] = {
    "no-cells": Recorded,
    "not-started": not_started,
    "zero-epochs": lambda: Recorded({"data": "digits", "epochs": 0}).add("plain", 20, epochs=0),
    "single-cell": lambda: Recorded().add("plain", 20),
    "single-depth": lambda: Recorded().add("plain", 20).add("resnet", 20),
    "all-nan": all_nan,
    "zero-norms": lambda: Recorded().add("plain", 20, first=(0.0,) * 3, end=(0.0,) * 3),
    "infinite-norms": lambda: Recorded().add("plain", 20, first=(math.inf,) * 3, end=(math.inf, 1.0, math.inf)),
    "diverged": lambda: Recorded().add("plain", 20, (math.nan, 90.0), status="diverged", loss=math.inf, epochs=1),
    "no-layers": no_layers,
    "one-layer": lambda: Recorded().add("plain", 20, first=(1.0,), end=(1.0,)),
    "gap": lambda: Recorded().add("plain", 20, end=(1.0, 0.0, 2.0, 3.0)),
    "subnormal": lambda: Recorded().add("plain", 20, first=(1e-320, 1e-45, 1e308), end=HEALTHY),
    "interrupted": interrupted,
    "no-config": lambda: Recorded(config={}, meta={}).add("plain", 20).add("plain", 56),
    "error-zero": lambda: Recorded().add("plain", 20, (0.0, 0.0)),
    "very-deep": lambda: Recorded().add("plain", 20).add("plain", 1202, end=(1.0,) * 1202),
    "other-family": lambda: Recorded().add("fixup", 20).add("dense", 20).add("plain", 20),
}


@cache
def page_of(build: Callable[[], Recorded]) -> str:
    """Returns the page of a run, cached since rendering is slow and several tests use the same page."""
    return html.page(summarise(build()))


class Page(HTMLParser):
    """Parses a page: its table cells, the resources it loads, and whether its tags close in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.labels: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loads.append(f"{tag} {name}={value}")
            if name == "aria-label" and value:
                self.labels.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row_below(self, name: str, head: str) -> list[str]:
        """Returns the first row that starts with `name` below a header row that contains `head`."""
        rows = [[cell.replace("\xa0", " ") for cell in row] for row in self.rows]
        start = next(place for place, row in enumerate(rows) if head in row)
        return next(row for row in rows[start:] if row and row[0] == name)

    def row(self, name: str) -> list[str]:
        return next([cell.replace("\xa0", " ") for cell in row] for row in self.rows if row and row[0] == name)
