"""The report of a sweep for a terminal, for a program (`as_dict`) and for a spreadsheet (`write_csv`)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradprobe.errors import StoreError
from gradprobe.report.paper import beside_the_paper
from gradprobe.report.records import SweepRun
from gradprobe.report.spread import Spread
from gradprobe.report.summary import (
    DEGRADED,
    NOT_LEARNING,
    OVERFITTING,
    Moment,
    NetSummary,
    Sharing,
    Summary,
    summarise,
)
from gradprobe.report.words import explain, headline, number, percent, shortcuts
from gradprobe.snapshot.export import strict

_STYLES = {
    "healthy": "green",
    DEGRADED: "yellow",
    OVERFITTING: "yellow",
    NOT_LEARNING: "yellow",
    "vanishing": "red",
    "exploding": "red",
    "non-finite": "bold red",
}


def render(run: SweepRun) -> RenderableType:
    """Lays a run out as two tables and one explanation for each network.

    Args:
        run: The recorded sweep, finished or not.

    Returns:
        What `rich.console.Console.print` shows; it fits 80 columns.
    """
    summary = summarise(run)
    if not summary.nets:
        return Text("The run holds no cells.")
    wanting = [net for net in summary.nets if net.verdict != "healthy" or not net.finished]
    blocks: list[list[RenderableType]] = [
        [_title(summary)],
        [Text("Error, mean ± standard deviation over seeds", style="italic"), _errors(summary)],
        [
            Text("Gradient's L2 norm, first and last weight layer, median over seeds", style="italic"),
            _gradients(summary),
        ],
        [Text(line, style="bold") for line in headline(summary)],
        [Text(line) for line in shortcuts(summary)],
        [Text(line) for line in beside_the_paper(summary)],
        [Text.assemble((f"{net.name}  ", "bold"), explain(net)) for net in wanting],
    ]
    return Group(*(part for block in blocks if block for part in (*block, Text())))


def as_dict(run: SweepRun) -> dict[str, object]:
    """The report as values that strict JSON can hold.

    Args:
        run: The recorded sweep, finished or not.

    Returns:
        `config`, `meta`, `headline`, `shortcuts`, `paper` and `nets`; each net has its parameters, progress, errors
        (`mean`, `std`, `values` over seeds), the gradient norms at the first step and at the end, the residual
        junctions, the comparison with the shallower nets of the lowest training and test error, that with its own
        lowest test error, the verdict and its explanation. None is what is not recorded (yet), or has no meaning (`std`
        of one seed); a number that is not finite is one of the strings "nan", "inf" and "-inf".
    """
    summary = summarise(run)
    return {
        "config": strict(dict(summary.config)),
        "meta": {key: value for key, value in summary.meta.items() if key != "config"},
        "cells_finished": summary.cells_finished,
        "cells_planned": summary.cells_planned,
        "headline": headline(summary),
        "shortcuts": shortcuts(summary),
        "paper": beside_the_paper(summary),
        "nets": [_net_dict(net) for net in summary.nets],
    }


def write_csv(run: SweepRun, folder: str | Path) -> list[Path]:
    """Writes the run as tables: `nets.csv` (the report), and all that was recorded, tidy.

    Which is `epochs.csv`, `layers.csv` and `junctions.csv`.

    Args:
        run: The recorded sweep, finished or not.
        folder: Where to; made if missing.

    Returns:
        The files written. Not-a-number is `nan` in them, infinity `inf`, and what is not recorded an empty field.

    Raises:
        StoreError: The folder or a file in it cannot be written.
    """
    summary = summarise(run)
    folder = Path(folder)
    cells = run.cells()
    keys = ("family", "depth", "seed")
    epochs = ("epoch", "train_loss", "train_error_pct", "test_error_pct", "seconds")
    layers = ("position", "site", "norm_l2", "rms", "abs_max", "zero_fraction", "nonfinite", "numel")
    junctions = ("position", "site", "shortcut_norm_l2", "branch_norm_l2", "cosine", "shortcut_share")
    recorded = [((cell.family, cell.depth, cell.seed), cell.id, row) for cell in cells for row in run.epochs(cell.id)]
    tables: dict[str, tuple[Sequence[str], Iterable[Sequence[object]]]] = {
        "nets.csv": (_NET_COLUMNS, map(_net_row, summary.nets)),
        "epochs.csv": ((*keys, *epochs), ((*cell, *_values(row, epochs)) for cell, _, row in recorded)),
        "layers.csv": (
            (*keys, "epoch", *layers),
            (
                (*cell, row.epoch, *_values(layer, layers))
                for cell, id, row in recorded
                for layer in run.layers(id, row.epoch)
            ),
        ),
        "junctions.csv": (
            (*keys, "epoch", *junctions),
            (
                (*cell, row.epoch, *_values(junction, junctions))
                for cell, id, row in recorded
                for junction in run.junctions(id, row.epoch)
            ),
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (columns, rows) in tables.items():
            with (folder / name).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(rows)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write the tables: {error}") from error
    return [folder / name for name in tables]


def _values(row: object, columns: Sequence[str]) -> list[object]:
    return [getattr(row, column) for column in columns]


def _title(summary: Summary) -> Text:
    done, planned = summary.cells_finished, summary.cells_planned
    facts = [f"{key} {value}" for key, value in summary.config.items() if key in ("data", "epochs")]
    facts.append(f"{planned} runs" if done == planned else f"{done} of {planned} runs finished")
    return Text.assemble(("Degradation sweep", "bold"), ("  " + ", ".join(facts), "dim"))


def _table(*columns: str, numeric: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left")
    return table


def _errors(summary: Summary) -> Table:
    numeric = ("params", "train %", "test %")
    table = _table("net", "seeds", *numeric, "verdict, at epoch", numeric=numeric)
    for net in summary.nets:
        at = "" if net.verdict_moment is None else f", {net.verdict_moment.epoch}"
        verdict = Text(f"{net.verdict or '–'}{at}", style=_STYLES.get(net.verdict or "", ""))
        errors = percent(net.train_error_pct), percent(net.test_error_pct)
        table.add_row(net.name, net.progress, f"{net.parameters:,}", *errors, verdict)
    return table


def _gradients(summary: Summary) -> Table:
    numeric = ("first", "last", "first/last")
    table = _table("net", "at", *numeric, "gradient", numeric=numeric)
    for net in summary.nets:
        name = net.name
        for moment in (net.initial, net.end):
            if moment is not None:
                flow = Text(", ".join(_votes(moment)), style=_STYLES[moment.verdict])
                table.add_row(name, moment.when, number(moment.first), number(moment.last), number(moment.ratio), flow)
                name = ""
        if name:
            table.add_row(name, *"–––––")
    return table


def _votes(moment: Moment) -> list[str]:
    if len(moment.votes) == 1:
        return [moment.verdict]
    seeds = sum(moment.votes.values())
    return [f"{word} ({count} of {seeds} seeds)" for word, count in moment.votes.items()]


_NET_COLUMNS = (
    "family", "depth", "seeds", "seeds_done", "seeds_diverged", "parameters", "epoch",
    "train_error_pct_mean", "train_error_pct_std", "test_error_pct_mean", "test_error_pct_std",
    "initial_first_norm_l2", "initial_last_norm_l2", "initial_ratio", "initial_verdict",
    "end_first_norm_l2", "end_last_norm_l2", "end_ratio", "end_verdict", "verdict", "explanation",
)  # fmt: skip


def _net_row(net: NetSummary) -> tuple[object, ...]:
    row: list[object] = [net.family, net.depth, len(net.results), net.n_done, net.n_diverged, net.parameters, net.epoch]
    for spread in (net.train_error_pct, net.test_error_pct):
        row += [None, None] if spread is None else [spread.mean, spread.std]
    for moment in (net.initial, net.end):
        row += [None] * 4 if moment is None else [moment.first, moment.last, moment.ratio, moment.verdict]
    return (*row, net.verdict, explain(net))


def _net_dict(net: NetSummary) -> dict[str, object]:
    compared, tested, rise = net.comparison, net.test_comparison, net.rise
    return {
        "net": net.name,
        "family": net.family,
        "depth": net.depth,
        "parameters": net.parameters,
        "seeds": [result.cell.seed for result in net.results],
        "seeds_done": net.n_done,
        "seeds_diverged": net.n_diverged,
        "epoch": net.epoch,
        "seconds": strict(net.seconds),
        "train_error_pct": _spread_dict(net.train_error_pct),
        "test_error_pct": _spread_dict(net.test_error_pct),
        "gradient": {"first_step": _moment_dict(net.initial), "end": _moment_dict(net.end)},
        "junctions": [_sharing_dict(sharing) for sharing in net.sharings],
        "compared_with": None
        if compared is None
        else {
            "net": compared.other,
            "epoch": compared.epoch,
            "train_error_pct": _spread_dict(compared.errors.train),
            "its_train_error_pct": _spread_dict(compared.other_errors.train),
            "clearly_above": compared.clearly_above,
        },
        "test_compared_with": None
        if tested is None
        else {
            "net": tested.other,
            "epoch": tested.epoch,
            "test_error_pct": _spread_dict(tested.errors.test),
            "its_test_error_pct": _spread_dict(tested.other_errors.test),
            "gap_pct": _spread_dict(tested.errors.gap),
            "its_gap_pct": _spread_dict(tested.other_errors.gap),
            "overfits": tested.overfits,
        },
        "lowest_test_error": None
        if rise is None
        else {
            "epoch": rise.lowest_epoch,
            "train_error_pct": _spread_dict(rise.lowest.train),
            "test_error_pct": _spread_dict(rise.lowest.test),
            "overfits": rise.overfits,
        },
        "verdict": net.verdict,
        "verdict_epoch": net.verdict_moment.epoch if net.verdict_moment else None,
        "explanation": explain(net),
    }


def _spread_dict(spread: Spread | None) -> object:
    return None if spread is None else strict({"mean": spread.mean, "std": spread.std, "values": list(spread.values)})


def _moment_dict(moment: Moment | None) -> object:
    if moment is None:
        return None
    layers = [
        {"position": rows[0].position, "site": rows[0].site, "norm_l2": [row.norm_l2 for row in rows]}
        for rows in zip(*moment.profiles, strict=True)
    ]
    ends = {"first_norm_l2": moment.first, "last_norm_l2": moment.last, "ratio": moment.ratio}
    judged = {"verdict": moment.verdict, "seeds_by_verdict": dict(moment.votes)}
    return strict({"epoch": moment.epoch, **ends, **judged, "layers": layers})


def _sharing_dict(sharing: Sharing) -> object:
    columns = ("shortcut_norm_l2", "branch_norm_l2", "cosine", "shortcut_share")
    junctions = [
        {
            "position": rows[0].position,
            "site": rows[0].site,
            **{column: [getattr(row, column) for row in rows] for column in columns},
        }
        for rows in zip(*sharing.profiles, strict=True)
    ]
    return strict({"epoch": sharing.epoch, "junctions": junctions})
