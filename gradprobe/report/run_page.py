"""The report of one run as a self-contained HTML page: what is wrong, pictures of it, and all numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gradprobe.diagnosis.diagnosis import Diagnosis
from gradprobe.diagnosis.finding import Finding
from gradprobe.report.heat_chart import cell_texts
from gradprobe.report.page_parts import Cell, dark_rules, figure, table, typeset
from gradprobe.report.page_template import document
from gradprobe.report.palette import dark_of_run
from gradprobe.report.run_charts import KINDS, NEEDS
from gradprobe.report.run_view import Grid, RunView, middle
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.snapshot.records import FloatArray
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.markup import escape
from gradprobe.text.words import number

_N_LEADING = 3  # findings that are on top

_TITLES = {
    "loss": "Loss, and when each finding holds",
    "heatmap": "Gradient norm of every layer at every step",
    "update_ratio": "How far each step moves the weights",
    "magnitude": "Magnitudes, and the range of the data type",
    "shortcut_share": "The gradient that arrives by the shortcut",
    "dead_units": "Dead units",
}


def write(snapshots: Sequence[Snapshot], diagnosis: Diagnosis, path: str | Path) -> Path:
    """Writes the page.

    Args:
        snapshots: Steps in order, of one probe.
        diagnosis: The findings of the run.
        path: The HTML file; missing folders are created, an existing file is replaced once the page is complete.

    Returns:
        The path written.

    Raises:
        StoreError: The file cannot be written.
    """
    path = Path(path)
    text = page(snapshots, diagnosis)
    create_folder(path.parent)
    write_files({path: [text]})
    return path


def page(snapshots: Sequence[Snapshot], diagnosis: Diagnosis) -> str:
    """Returns the page as a complete HTML document."""
    view = RunView(snapshots)
    parts = [
        f'<p class="facts">{escape(_facts(view))}</p>',
        f'<p class="lead">{typeset(diagnosis.headline)}</p>',
        *_findings(diagnosis),
        *_figures(view, diagnosis),
        *_tables(view),
        _judged(diagnosis),
        _method(),
    ]
    return document("A training run", dark_rules(dark_of_run()), "\n".join(part for part in parts if part))


def _facts(view: RunView) -> str:
    snapshots = view.snapshots
    if not snapshots:
        return "no steps measured"
    first, last = snapshots[0].step, snapshots[-1].step
    facts = [f"steps {first} to {last}, {len(snapshots):,} measured", f"{len(view.norms.names)} weights"]
    if view.signals:
        facts.append(f"{len(view.signals):,} steps with activations or residual adds")
    finite = [loss for _, loss in view.losses if math.isfinite(loss)]
    if finite:
        facts.append(f"loss {number(finite[0])} to {number(finite[-1])}")
    return " · ".join(facts)


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    items = [_finding(place, one, diagnosis) for place, one in enumerate(diagnosis.roots, start=1)]
    if not items:
        return
    yield f'<ol class="findings">\n{"".join(items[:_N_LEADING])}</ol>'
    if items[_N_LEADING:]:
        more = len(items) - _N_LEADING
        faults = "1 more finding" if more == 1 else f"{more} more findings"
        rest = "".join(items[_N_LEADING:])
        yield f'<details><summary>{faults}</summary>\n<ol class="findings">\n{rest}</ol></details>'


def _finding(place: int, one: Finding, diagnosis: Diagnosis) -> str:
    symptoms = [f"{other.title}: {other.meaning}" for other in diagnosis.symptoms_of(one)]
    points = "".join(f"<li>{typeset(symptom)}</li>" for symptom in symptoms)
    explains = f"<p><b>It explains:</b></p>\n<ul>{points}</ul>\n" if symptoms else ""
    hint = diagnosis.hint(one)
    why = f"<p><b>To learn why:</b> {typeset(hint)}.</p>\n" if hint else ""
    return (
        f"<li><h2>{place}. {escape(one.title)}: {typeset(one.meaning)}</h2>\n<p>{typeset(one.sentence)}</p>\n"
        f"<p><b>Usual cause:</b> {typeset(one.cause)}.</p>\n<p><b>Try first:</b> {typeset(one.remedies[0])}.</p>\n"
        f"{why}{explains}<p>More: <code>{escape(one.explain_command)}</code></p></li>\n"
    )


def _figures(view: RunView, diagnosis: Diagnosis) -> Iterator[str]:
    captions = _captions(view)
    texts = {
        "heatmap": cell_texts(view.norms, "gradient norm"),
        "dead_units": cell_texts(view.zero_shares, "share of zeros in the output", as_share=True),
    }
    for kind, (draw, *sizes) in KINDS.items():
        charts = [draw(view, diagnosis, size) for size in sizes]
        yield figure(
            _TITLES[kind], charts, captions[kind], f"Not recorded. It needs {NEEDS[kind]}.", "", texts.get(kind, "")
        )


def _captions(view: RunView) -> dict[str, str]:
    n_odd = sum(not math.isfinite(loss) for _, loss in view.losses)
    loss = "The band is the range of the steps that share a point; the line is their median."
    if n_odd:
        loss += f" Not drawn: {n_odd} losses that are NaN or infinite."
    heat = (
        "One row per weight of more than one dimension, from input (top) to output (bottom); one column per step, or "
        "per few steps. A cell of several steps shows their median or, if they differ tenfold, the outlier. "
        "Point at a cell, or use the arrow keys, to read it."
    )
    ranges = "; ".join(f"{one.name}, {number(one.smallest)} to {number(one.largest)}" for one in view.dtype_ranges)
    magnitude = "Root mean square (median over steps) and largest magnitude of all steps. "
    if ranges:
        magnitude += f"Outputs are {ranges}. Ends of a range that are far from the values are not drawn. "
        magnitude += "Gradients at outputs include loss scaling, as the data type had to hold them."
    else:
        magnitude += "With attach(activations=True), outputs are shown against the range of their data type."
    return {
        "loss": loss,
        "heatmap": heat,
        "update_ratio": "Norm of the update over the norm of the weight. The line is the median of the weights, the "
        "bands are their quartiles and their range. About 0.001 is healthy.",
        "magnitude": magnitude,
        "shortcut_share": "At every residual add, the norm of the part of the gradient that arrives by the shortcut, "
        "divided by the sum of this norm and that of the part that arrives through the branch. Medians over each third "
        "of the run.",
        "dead_units": "Share of zeros in the outputs of the modules whose outputs have any, such as ReLU: at 100 % no "
        "unit is active. One row per module, from input (top) to output (bottom).",
    }


def _tables(view: RunView) -> Iterator[str]:
    if view.norms.names:
        yield "<h2>Gradients of the weights</h2>"
        columns = (
            "weight",
            "elements",
            "first norm",
            "median",
            "last",
            "largest element",
            "zero",
            "not finite",
            "update ratio",
        )
        yield table("Gradients of the weights", columns, _weight_rows(view))
    rows = _module_rows(view)
    if rows:
        yield "<h2>Outputs of the modules</h2>"
        heads = ("module", "class", "rms, median", "rms, last", "largest element", "zeros, last", "not finite, steps")
        yield table("Outputs of the modules", heads, rows)
    shares = view.shares
    if np.isfinite(shares.values).any():
        yield "<h2>Residual adds</h2>"
        ends = zip(shares.names, _first(shares), middle(shares.values), _last(shares), strict=True)
        cells = [(name, [Cell(float(value)) for value in values]) for name, *values in ends]
        yield table("Residual adds", ("residual add", "shortcut's share, first", "median", "last"), cells)


def _weight_rows(view: RunView) -> list[tuple[str, list[Cell]]]:
    norms, largest = view.norms, view.largest
    newest = {}
    for one in view.snapshots:
        for name, k in zip(one.table.names, range(len(one.table.names)), strict=True):
            if one.measured.present[k]:
                newest[name] = (one, k)
    ratios = dict(zip(view.update_ratios.names, middle(view.update_ratios.values).tolist(), strict=True))
    columns = zip(norms.names, _first(norms), middle(norms.values), _last(norms), _greatest(largest), strict=True)
    rows: list[tuple[str, list[Cell]]] = []
    for place, (name, first, centre, last, most) in enumerate(columns):
        one, k = newest[name]
        n_odd = int(np.isinf(norms.values[:, place]).sum())
        zeros = float(one.columns["zero_fraction"][k])
        numbers = [Cell(float(value)) for value in (first, centre, last, most)]
        ratio = Cell(float(ratios.get(name, math.nan)))
        rows.append((name, [Cell(int(one.measured.numels[k])), *numbers, Cell(zeros), Cell(n_odd), ratio]))
    return rows


def _module_rows(view: RunView) -> list[tuple[str, list[Cell]]]:
    rms, largest, zeros = view.outputs("rms"), view.outputs("abs_max"), view.outputs("zero_fraction")
    columns = zip(rms.names, middle(rms.values), _last(rms), _greatest(largest), _last(zeros), strict=True)
    return [
        (
            name,
            [
                Cell(view.module_types.get(name, "")),
                *(Cell(float(value)) for value in values),
                Cell(int(np.isinf(rms.values[:, place]).sum())),
            ],
        )
        for place, (name, *values) in enumerate(columns)
    ]


def _first(grid: Grid) -> FloatArray:
    """Returns the first measured value of each place."""
    if not len(grid.steps):
        return np.zeros(0)
    known = ~np.isnan(grid.values)
    return np.asarray(np.take_along_axis(grid.values, np.asarray(known.argmax(axis=0))[None], axis=0)[0])


def _last(grid: Grid) -> FloatArray:
    return _first(Grid(grid.steps, grid.names, grid.values[::-1]))


def _greatest(grid: Grid) -> FloatArray:
    return np.asarray(np.where(np.isfinite(grid.values), grid.values, 0.0).max(axis=0, initial=0.0))


def _judged(diagnosis: Diagnosis) -> str:
    items = [f"<li>Judged: {escape(', '.join(diagnosis.judged))}.</li>"] if diagnosis.judged else []
    items += [
        f"<li>Not judged without {escape(need)}: {escape(', '.join(rules))}.</li>"
        for need, rules in diagnosis.needs.items()
    ]
    if diagnosis.note:
        items.append(f"<li>Note: {escape(diagnosis.note)}.</li>")
    return "<h2>What was judged</h2>\n<ul>\n" + "\n".join(items) + "\n</ul>" if items else ""


def _method() -> str:
    return (
        "<h2>How the numbers were measured</h2>\n<ul>\n<li>gradprobe recorded the gradients while the network trained, "
        "with loss scaling undone. The norm is the Euclidean norm of a weight’s gradient.</li>\n<li>Layers are in the "
        "order of the model, modules in the order in which they ran.</li>\n</ul>"
    )
