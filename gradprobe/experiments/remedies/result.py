"""The result of `remedies`: its cells, its conclusions, and its printed table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe.experiments.remedies.networks import CHANNELS, GROUPS, WIDTH
from gradprobe.report.records import RemedyCell
from gradprobe.text.words import number

BATCH_SIZE = 64
MAX_NORM = 1.0
# A loss has fallen if it is below this share of its start and of the loss of a constant output: a network in which only
# the last layer gets gradients learns the constant output.
FELL_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Remedies:
    """The result of `remedies`; prints as one table with its conclusions.

    Attributes:
        data: The training data, in one line.
        layers: ``"linear"`` or ``"conv"``.
        seeds: Seeds of the weights and of the order of the images.
        steps: Training steps of each network.
        learning_rate: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        constant_loss: Loss of the best output that ignores the image.
        cells: All remedies for each activation and depth.
    """

    data: str
    layers: str
    seeds: tuple[int, ...]
    steps: int
    learning_rate: float
    momentum: float
    weight_decay: float
    constant_loss: float
    cells: tuple[RemedyCell, ...]

    def as_dict(self) -> dict[str, object]:
        """Converts the result to plain data, with the ratios and the conclusions."""
        cells = [
            {**asdict(cell), "ratio": cell.ratio, "growth": cell.growth, "expected_growth": cell.expected_growth}
            for cell in self.cells
        ]
        return {**asdict(self), "cells": cells, "conclusions": list(self.conclusions)}

    def of(self, remedy: str, activation: str, depth: int) -> RemedyCell | None:
        """Finds a cell; None if there is none."""
        wanted = (remedy, activation, depth)
        return next((one for one in self.cells if (one.remedy, one.activation, one.depth) == wanted), None)

    @property
    def conclusions(self) -> tuple[str, ...]:
        """The conclusions from the numbers, in sentences."""
        sentences = []
        nets = list(dict.fromkeys((cell.activation, cell.depth) for cell in self.cells))
        whole = [
            remedy
            for remedy in dict.fromkeys(cell.remedy for cell in self.cells)
            if all(cell.n_fell == len(self.seeds) for cell in self.cells if cell.remedy == remedy)
        ]
        sentences.append(
            f"The loss fell for all {len(nets)} networks and every seed with: {', '.join(whole)}."
            if whole
            else f"No remedy made the loss fall for all {len(nets)} networks and every seed."
        )
        pairs = [(cell, self._unclipped(cell)) for cell in self.cells]
        clipped = [(cell, twin) for cell, twin in pairs if twin is not None and math.isfinite(cell.ratio)]
        if clipped:
            changes = [abs(cell.ratio / twin.ratio - 1) if twin.ratio else 0.0 for cell, twin in clipped]
            cell, twin = max(clipped, key=lambda pair: pair[1].total_norm)
            text = (
                f"Clipping changes first/last by a relative {max(changes):.1g} at most, and the total norm from "
                f"{number(twin.total_norm)} to {number(cell.total_norm)} ({cell.remedy}, {cell.activation}, "
                f"{cell.depth} layers)"
            )
            same = max(changes) < 1e-6
            sentences.append(text + (": it changes the size of the step, not the ratio over depth." if same else "."))
        predicted = [cell for cell in self.cells if cell.theory is not None and math.isfinite(cell.factor)]
        if predicted:
            worst = max(predicted, key=lambda cell: abs(cell.factor - (cell.theory or 0.0)))
            sentences.append(
                f"The factor per layer differs from theory by at most {abs(worst.factor - (worst.theory or 0.0)):.2f}; "
                f"theory assumes wide layers and groups and large batches ({worst.remedy}, {worst.activation}, "
                f"{worst.depth} layers: {worst.factor:.2f}, theory {worst.theory:.2f})."
            )
        grown = [(cell, cell.growth or 0.0, cell.expected_growth or 0.0) for cell in self.cells]
        paired = [one for one in grown if 0 < one[1] < math.inf and 0 < one[2] < math.inf]
        if paired:
            cell, growth, expected = max(paired, key=lambda one: abs(math.log(one[1] / one[2])))
            factor = math.exp(abs(math.log(growth / expected)))
            sentences.append(
                f"The growth of the variance differs from theory by a factor of {factor:.2f} at most ({cell.remedy}, "
                f"{cell.activation}, {cell.depth} layers: {number(growth)}, theory {number(expected)})."
            )
        return tuple(sentences)

    def _unclipped(self, cell: RemedyCell) -> RemedyCell | None:
        parts = cell.remedy.split("+")
        if "clipping" not in parts:
            return None
        return self.of("+".join(part for part in parts if part != "clipping") or "none", cell.activation, cell.depth)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("remedy", "at the start", title="Remedies at initialisation and after a short training")
        table.title_justify = "left"
        for head in ("first", "first/last", "per layer", "theory", "loss", "after", "fell", "NaN"):
            table.add_column(head, justify="right", no_wrap=True)
        net = ""
        for cell in self.cells:
            name = f"{cell.activation}, {cell.depth} layers"
            if name != net:
                table.add_section()
                table.add_row(Text(name, style="bold"))
                net = name
            std_error = "" if math.isnan(cell.std_error) else f" ± {cell.std_error:.3f}"
            table.add_row(
                cell.remedy,
                Text(cell.verdict, style="green" if cell.verdict == "healthy" else "bold red"),
                number(cell.norms[0]),
                number(cell.ratio),
                "–" if math.isnan(cell.factor) else f"{cell.factor:.3f}{std_error}",
                "–" if cell.theory is None else f"{cell.theory:.3f}",
                number(cell.start_loss),
                number(cell.final_loss),
                f"{cell.n_fell}/{len(self.seeds)}",
                ", ".join(map(str, cell.nan_after)) or "–",
            )
        yield table
        nets = f"3x3 convolutions, {CHANNELS} channels" if self.layers == "conv" else f"fully connected, width {WIDTH}"
        yield Text(
            f"{self.data}; {nets}; {len(self.seeds)} seeds, batch {BATCH_SIZE}, {self.steps} steps of SGD "
            f"{self.learning_rate:g} with momentum {self.momentum:g}, weight decay {self.weight_decay:g}; clipping to "
            f"{MAX_NORM:g}; groupnorm with {GROUPS} groups; without xavier or he, PyTorch's default initialisation. "
            "first: norm of the gradient of the weight next to the input; first/last: that over the norm next to the "
            "loss; per layer: factor of the norm per layer towards the input, least squares over the hidden layers, "
            "± standard error; theory: its prediction for fully connected networks of wide layers and groups; "
            f"fell: seeds whose loss ended below {FELL_SHARE:g} of its start and of {self.constant_loss:.2f}, the loss "
            "of a constant output; NaN: steps completed before the loss became NaN or infinite."
        )
        if any(cell.variances for cell in self.cells):
            yield Text()
            yield self._growth_table()
            yield Text(
                "Mean square of the signal behind the last residual add over that behind the first layer. A ReLU "
                "without normalisation adds in proportion to the signal, which grows exponentially with depth; behind "
                "a normalisation, or with tanh or sigmoid, each branch adds about the same. Factors or weights of zero "
                "(fixup, skipinit, rezero) add nothing; the weights behind them, with fixup all but the classifier's, "
                "then have no gradient until the first step."
            )
        yield Text(
            f"For scale: over 20 layers, a factor of 0.5 per layer gives 0.5^20 = {0.5**20:.1e}, a factor of 2 gives "
            f"2^20 = {2**20:,}."
        )
        yield from (Text(sentence) for sentence in self.conclusions)

    def _growth_table(self) -> Table:
        """Makes the table of the variance of the signal, with a column for each depth and its theory."""
        depths = sorted({cell.depth for cell in self.cells})
        table = Table("remedy", title="Growth of the variance")
        table.title_justify = "left"
        for depth in depths:
            table.add_column(f"{depth} layers", justify="right", no_wrap=True)
            table.add_column("theory", justify="right", no_wrap=True)
        rows: dict[str, dict[str, dict[int, RemedyCell]]] = {}
        for cell in self.cells:
            if cell.variances:
                rows.setdefault(cell.activation, {}).setdefault(cell.remedy, {})[cell.depth] = cell
        for activation, remedies in rows.items():
            table.add_section()
            table.add_row(Text(activation, style="bold"))
            for remedy, cells in remedies.items():
                values: list[float | None] = []
                for depth in depths:
                    one = cells.get(depth)
                    values += [None, None] if one is None else [one.growth, one.expected_growth]
                table.add_row(remedy, *("–" if value is None else number(value) for value in values))
        return table
