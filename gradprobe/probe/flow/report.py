"""The result of a check, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe.diagnosis.diagnose import Verdict
from gradprobe.diagnosis.finding import Finding, card
from gradprobe.errors import printable
from gradprobe.probe.flow.trunk import TrunkPoint
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.markup import BROKEN, HEALTHY, Cells, form, grid, log_bars, paragraph
from gradprobe.text.words import counted

BAR_WIDTH = 24
# Longest name, and longest message with names in it, that the table shows in full.
NAME_WIDTH = 60
MESSAGE_WIDTH = 500
_STYLES = {"healthy": "green", "vanishing": "bold red", "exploding": "bold red", "non-finite": "bold red"}


@dataclass(frozen=True, slots=True)
class LayerFlow:
    """The gradient of one parameter.

    Attributes:
        depth: Position of its module in order of execution.
        name: Name of the parameter.
        norm: Euclidean norm.
        rms: Root of the mean square.
        abs_max: Largest magnitude.
        zero_fraction: Share of exact zeros.
        nonfinite: Number of NaN and infinite elements.
        numel: Number of elements.
        status: "healthy"; "vanishing" or "exploding" if the model's verdict says so and the norm shows it, compared
            with the last parameter of the same role; "non-finite"; "starts at 0" if a parameter that starts at zero
            blocks the gradient; "cancels" for a bias whose gradient is zero by mathematics; "zero" if it is exactly
            zero for another reason; "no gradient" if none arrived.
    """

    depth: int
    name: str
    norm: float
    rms: float
    abs_max: float
    zero_fraction: float
    nonfinite: int
    numel: int
    status: str


@dataclass(frozen=True, slots=True)
class FlowReport:
    """The result of `check_gradient_flow`. Prints as a table.

    Attributes:
        model: Class name of the model.
        layers: Parameters in order of execution.
        findings: What is wrong.
        verdict: The most severe rule that fired, such as "vanishing" or "exploding", or "healthy". For an untrained
            model, the verdict at initialisation.
        snapshot: The measurement.
        loss: In words, the scalar whose gradient was measured.
        trunks: How much the loss depends on the outputs of modules along each trunk of the model, from the input to the
            loss; empty if the model is too shallow, or its graph cannot be read.
        notes: What is peculiar, and no fault: such as a head that starts at zero.
    """

    model: str
    layers: tuple[LayerFlow, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict
    snapshot: Snapshot
    loss: str = ""
    trunks: tuple[tuple[TrunkPoint, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain data. NaN and infinity stay Python floats."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "loss": self.loss,
            "layers": [asdict(layer) for layer in self.layers],
            "trunks": [[asdict(point) for point in trunk] for trunk in self.trunks],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = Text(f"Gradient flow through {printable(self.model, NAME_WIDTH)}", style="table.title")
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("depth", justify="right")
        table.add_column("parameter", overflow="fold")
        table.add_column("norm", justify="right")
        table.add_column("RMS", justify="right")
        table.add_column(f"log10 RMS, {_bar_range(self.layers)}", min_width=BAR_WIDTH, no_wrap=True)
        table.add_column("status")
        for layer in self.layers:
            table.add_row(
                str(layer.depth),
                Text(printable(layer.name, NAME_WIDTH)),
                f"{layer.norm:.2e}",
                f"{layer.rms:.2e}",
                _bar(layer.rms, self.layers),
                Text(layer.status, style=_STYLES.get(layer.status, "dim")),
            )
        yield table
        yield f"verdict: {self.verdict}"
        for finding in self.findings:
            yield Text(f"  {printable(finding.message, MESSAGE_WIDTH)} (source: {finding.source})")
        for note in self.notes:
            yield Text(f"note: {printable(note, MESSAGE_WIDTH)}")

    def __repr__(self) -> str:
        return f"FlowReport({self.model}: {self.verdict}, {counted(len(self.layers), 'parameter')})"

    def _repr_html_(self) -> str:
        bars = log_bars([layer.rms for layer in self.layers])
        rows: list[Cells] = [
            [layer.name, layer.depth, layer.norm, layer.rms, bar, layer.status]
            for layer, bar in zip(self.layers, bars, strict=True)
        ]
        parts = [grid(("gradient of", "depth", "norm", "rms", "log scale", "status"), rows)]
        parts += [paragraph(f"{note}.", "Note:") for note in self.notes]
        colour = HEALTHY if self.verdict == "healthy" else BROKEN
        cards = [card(finding) for finding in self.findings]
        return form(f"Gradient flow through {printable(self.model, NAME_WIDTH)}: {self.verdict}", cards + parts, colour)

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _bar_range(layers: Sequence[LayerFlow]) -> str:
    low, high = _log_range(layers)
    return f"{low} to {high}"


def _log_range(layers: Sequence[LayerFlow]) -> tuple[int, int]:
    logs = [math.log10(layer.rms) for layer in layers if 0 < layer.rms < math.inf]
    return (math.floor(min(logs)), math.floor(max(logs)) + 1) if logs else (0, 1)


def _bar(rms: float, layers: Sequence[LayerFlow]) -> str:
    low, high = _log_range(layers)
    if not 0 < rms < math.inf:
        return "" if rms == 0 else "?"
    return "█" * max(1, round(BAR_WIDTH * (math.log10(rms) - low) / (high - low)))
