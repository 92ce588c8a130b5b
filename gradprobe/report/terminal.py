"""Lays out a sweep's report for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradprobe.errors import printable
from gradprobe.report.formatting import RUNNING_NOTE, percent
from gradprobe.report.paired_tests import opening
from gradprobe.report.profiles import GradientProfile
from gradprobe.report.published_errors import published_paragraphs
from gradprobe.report.records import SweepRun
from gradprobe.report.sentences import explain_verdict, headline, shortcut_sentences, zero_start_sentences
from gradprobe.report.summary import (
    DEGRADED,
    MORE_SEEDS,
    NOT_LEARNING,
    OVERFITTING,
    TOO_EARLY,
    Summary,
    summarise,
)
from gradprobe.text.words import number

# Longest name that is shown in full.
NAME_WIDTH = 40

_STYLES = {
    "healthy": "green",
    DEGRADED: "yellow",
    OVERFITTING: "yellow",
    NOT_LEARNING: "yellow",
    MORE_SEEDS: "cyan",
    TOO_EARLY: "cyan",
    "vanishing": "red",
    "exploding": "red",
    "non-finite": "bold red",
}


def render(run: SweepRun) -> RenderableType:
    """Lays out a run as two tables, its conclusions, and an explanation for each network that is not healthy.

    Args:
        run: The recorded sweep, finished or not.

    Returns:
        A renderable for `rich.console.Console.print`; it fits 80 columns.
    """
    summary = summarise(run)
    if not summary.nets:
        return Text("The run has no networks yet.")
    unhealthy = [net for net in summary.nets if net.verdict != "healthy" or not net.finished]
    blocks: list[list[RenderableType]] = [
        [_title(summary)],
        [Text(line, style="bold") for line in [opening(summary, _shown)] if line],
        [
            Text("Error, mean ± standard deviation over seeds", style="italic"),
            _errors(summary),
            *([Text(RUNNING_NOTE)] if summary.has_running_errors else []),
        ],
        [
            Text("Gradient norm (L2), first and last weight layer, median over seeds", style="italic"),
            _gradients(summary),
            *map(Text, zero_start_sentences(summary, _shown)),
        ],
        [Text(line, style="bold") for line in headline(summary, _shown)],
        [Text(line) for line in shortcut_sentences(summary, _shown)],
        [Text(line) for line in published_paragraphs(summary)],
        [Text.assemble((f"{_shown(net.name)}  ", "bold"), explain_verdict(net, _shown)) for net in unhealthy],
    ]
    return Group(*(part for block in blocks if block for part in (*block, Text())))


def _shown(name: str) -> str:
    return printable(name, NAME_WIDTH)


def _title(summary: Summary) -> Text:
    done, planned = summary.cells_finished, summary.cells_planned
    facts = [f"{key} {_shown(str(value))}" for key, value in summary.config.items() if key in ("data", "epochs")]
    facts.append(f"{planned} runs" if done == planned else f"{done} of {planned} runs finished")
    return Text.assemble(("Degradation sweep", "bold"), ("  " + ", ".join(facts), "dim"))


def plain_table(*columns: str, numeric: Sequence[str]) -> Table:
    """Returns an empty table without lines between its columns, those with numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left")
    return table


def _errors(summary: Summary) -> Table:
    numeric = ("params", "train %", "test %")
    table = plain_table("network", "seeds", *numeric, "verdict, at epoch", numeric=numeric)
    for net in summary.nets:
        at = "" if net.verdict_profile is None else f", {net.verdict_profile.epoch}"
        verdict = Text(f"{net.verdict or '–'}{at}", style=_STYLES.get(net.verdict or "", ""))
        mark = "*" if net.has_running_error else ""
        errors = percent(net.train_error_pct) + mark, percent(net.test_error_pct)
        table.add_row(Text(_shown(net.name)), net.progress, f"{net.parameters:,}", *errors, verdict)
    return table


def _gradients(summary: Summary) -> Table:
    numeric = ("first", "last", "first/last")
    table = plain_table("network", "at", *numeric, "gradient", numeric=numeric)
    for net in summary.nets:
        name = _shown(net.name)
        for profile in (net.initial, net.end):
            if profile is not None:
                flow = Text(", ".join(_verdicts_by_seed(profile)), style=_STYLES[profile.verdict])
                table.add_row(
                    Text(name), profile.when, number(profile.first), number(profile.last), number(profile.ratio), flow
                )
                name = ""
        if name:
            table.add_row(Text(name), *"–––––")
    return table


def _verdicts_by_seed(profile: GradientProfile) -> list[str]:
    if len(profile.verdict_counts) == 1:
        return [profile.verdict]
    seeds = sum(profile.verdict_counts.values())
    return [f"{word} ({count} of {seeds} seeds)" for word, count in profile.verdict_counts.items()]
