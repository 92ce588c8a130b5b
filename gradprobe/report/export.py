"""Exports a sweep's report as JSON values (`as_dict`) and as CSV tables (`write_csv`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, fields
from itertools import chain
from pathlib import Path

from gradprobe.errors import printable
from gradprobe.report.paired_tests import Contrast, contrasts, opening
from gradprobe.report.profiles import GradientProfile, ShortcutProfile
from gradprobe.report.published_errors import published_paragraphs
from gradprobe.report.records import EpochRow, JunctionRow, LayerRow, SweepRun
from gradprobe.report.seed_statistics import Spread
from gradprobe.report.sentences import explain_verdict, headline, shortcut_sentences
from gradprobe.report.summary import NetSummary, summarise
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.files import create_folder, write_files


def as_dict(run: SweepRun) -> dict[str, object]:
    """Converts the report to values that strict JSON can represent.

    Args:
        run: The recorded sweep, finished or not.

    Returns:
        `config`, `meta`, `cells_finished`, `cells_planned`, `opening`, `headline`, `shortcuts`, `paper`, `nets` and
        `paired_tests` (differences of training errors over seeds, with their p value and effect). Each network
        has its parameters, progress, errors (`mean`, `std`, `values` over seeds), gradient norms at the first step and
        at the end, residual adds, comparisons with the shallower networks of the lowest training and test error and
        with its own lowest test error, and its verdict with an explanation. Values not recorded yet, and the `std` of
        one seed, are None; numbers that are not finite are the strings "nan", "inf" and "-inf".
    """
    summary = summarise(run)
    return {
        "config": strict(dict(summary.config)),
        "meta": {key: value for key, value in summary.meta.items() if key != "config"},
        "cells_finished": summary.cells_finished,
        "cells_planned": summary.cells_planned,
        "opening": opening(summary),
        "headline": headline(summary),
        "shortcuts": shortcut_sentences(summary),
        "paper": published_paragraphs(summary),
        "nets": [_net_dict(net) for net in summary.nets],
        "paired_tests": [_contrast_dict(one) for one in contrasts(summary)],
    }


def write_csv(run: SweepRun, folder: str | Path) -> list[Path]:
    """Writes the report as `nets.csv`, and every recorded row in `epochs.csv`, `layers.csv` and `junctions.csv`.

    Args:
        run: The recorded sweep, finished or not.
        folder: Folder to write to; created if missing.

    Returns:
        The files written. NaN is written as `nan`, infinity as `inf`, and a value that is not recorded as empty.
        Control characters in names are spelled out, and a name that a spreadsheet would take for a formula starts with
        an apostrophe; `as_dict` has the exact names.

    Raises:
        StoreError: The folder or a file in it cannot be written; the old files are unchanged.
    """
    summary = summarise(run)
    folder = Path(folder)
    epochs = [(cell.id, (*cell.net, cell.seed), row) for cell in run.cells() for row in run.epochs(cell.id)]
    tables: dict[str, tuple[Sequence[str], Iterable[Sequence[object]]]] = {
        "nets.csv": (_NET_COLUMNS, map(_net_row, summary.nets)),
        "epochs.csv": (_columns(EpochRow), ((*key, *astuple(row)) for _, key, row in epochs)),
        "layers.csv": (
            _columns(LayerRow),
            ((*key, *astuple(layer)) for id, key, row in epochs for layer in run.layers(id, row.epoch)),
        ),
        "junctions.csv": (
            _columns(JunctionRow),
            ((*key, *astuple(junction)) for id, key, row in epochs for junction in run.junctions(id, row.epoch)),
        ),
    }
    create_folder(folder)
    files = {folder / name: _csv_lines(columns, rows) for name, (columns, rows) in tables.items()}
    write_files(files)
    return list(files)


def _csv_lines(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.writer(line)
    for row in chain([columns], rows):
        writer.writerow([_cell(value) if isinstance(value, str) else value for value in row])
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _cell(text: str) -> str:
    # A spreadsheet takes a text that starts so for a formula, unless an apostrophe is before it.
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _columns(row: type[EpochRow | LayerRow | JunctionRow]) -> tuple[str, ...]:
    return ("family", "depth", "seed", *(field.name for field in fields(row)))


_NET_COLUMNS = (
    "family", "depth", "seeds", "seeds_done", "seeds_diverged", "parameters", "epoch",
    "train_error_is_running", "train_error_pct_mean", "train_error_pct_std",
    "test_error_pct_mean", "test_error_pct_std",
    "initial_first_norm_l2", "initial_last_norm_l2", "initial_ratio", "initial_verdict",
    "end_first_norm_l2", "end_last_norm_l2", "end_ratio", "end_verdict", "verdict", "explanation",
)  # fmt: skip


def _net_row(net: NetSummary) -> tuple[object, ...]:
    row: list[object] = [net.family, net.depth, len(net.results), net.n_done, net.n_diverged, net.parameters, net.epoch]
    row.append(net.has_running_error)
    for spread in (net.train_error_pct, net.test_error_pct):
        row += [None, None] if spread is None else [spread.mean, spread.std]
    for profile in (net.initial, net.end):
        row += [None] * 4 if profile is None else [profile.first, profile.last, profile.ratio, profile.verdict]
    return (*row, net.verdict, explain_verdict(net))


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
        "train_error_is_running": net.has_running_error,
        "test_error_pct": _spread_dict(net.test_error_pct),
        "gradient": {"first_step": _profile_dict(net.initial), "end": _profile_dict(net.end)},
        "junctions": [_shortcut_dict(profile) for profile in net.shortcut_profiles],
        "compared_with": None
        if compared is None
        else {
            "net": compared.other,
            "epoch": compared.epoch,
            "train_error_pct": _spread_dict(compared.errors.train),
            "its_train_error_pct": _spread_dict(compared.other_errors.train),
            "difference_pct": strict(compared.difference_pct),
            "clearly_above": compared.outcome == "clearly above",
            "outcome": compared.outcome,
            "too_early_because": compared.prematurity,
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
        "verdict_epoch": net.verdict_profile.epoch if net.verdict_profile else None,
        "explanation": explain_verdict(net),
    }


def _contrast_dict(one: Contrast) -> dict[str, object]:
    test = one.test
    result = {} if test is None else {"p_value": test.p_value, "effect": test.effect, "interval95": [*test.interval]}
    differences = None if test is None else {"mean": test.mean, **result, "values": [*test.differences]}
    return {
        "net": one.name,
        "other": one.other,
        "epoch": one.epoch,
        "seeds": list(one.seeds),
        "too_early": bool(one.early),
        "train_error_difference_pct": strict(differences),
    }


def _spread_dict(spread: Spread | None) -> object:
    return None if spread is None else strict({"mean": spread.mean, "std": spread.std, "values": list(spread.values)})


def _profile_dict(profile: GradientProfile | None) -> object:
    if profile is None:
        return None
    layers = _values_by_seed(profile.layers_by_seed, "norm_l2")
    ends = {"first_norm_l2": profile.first, "last_norm_l2": profile.last, "ratio": profile.ratio}
    judged = {"verdict": profile.verdict, "seeds_by_verdict": dict(profile.verdict_counts)}
    return strict({"epoch": profile.epoch, **ends, **judged, "layers": layers})


def _shortcut_dict(profile: ShortcutProfile) -> object:
    columns = ("shortcut_norm_l2", "branch_norm_l2", "cosine", "shortcut_share")
    return strict({"epoch": profile.epoch, "junctions": _values_by_seed(profile.junctions_by_seed, *columns)})


def _values_by_seed(seeds: Sequence[Sequence[LayerRow | JunctionRow]], *columns: str) -> list[dict[str, object]]:
    return [
        {"position": rows[0].position, "site": rows[0].site}
        | {column: [getattr(row, column) for row in rows] for column in columns}
        for rows in zip(*seeds, strict=True)
    ]
