"""The comparison of two runs as a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gradprobe.report.comparison.charts import HEAT_QUANTITY, both_chart, difference_chart, size_grid, size_heatmap
from gradprobe.report.comparison.compare import PARAMETER_KINDS, Comparison, Difference, Parting
from gradprobe.report.comparison.output import ComparisonView
from gradprobe.report.comparison.sentences import (
    counts_text,
    details,
    headline,
    kind_text,
    largest_size,
    method,
    notes,
)
from gradprobe.report.heat_chart import NARROW_HEAT, WIDE_HEAT, cell_texts
from gradprobe.report.page_parts import Cell, dark_rules, figure, table, typeset
from gradprobe.report.page_template import document
from gradprobe.report.palette import dark_of_run
from gradprobe.report.run_charts import NARROW_RUN, WIDE_RUN
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.text.markup import escape
from gradprobe.text.words import number


def write(view: ComparisonView, path: str | Path) -> Path:
    """Writes the page.

    Args:
        view: The comparison.
        path: The HTML file; missing folders are created, an existing file is replaced once the page is complete.

    Returns:
        The path written.

    Raises:
        StoreError: The file cannot be written.
    """
    path = Path(path)
    text = page(view)
    create_folder(path.parent)
    write_files({path: [text]})
    return path


def page(view: ComparisonView) -> str:
    """Returns the page as a complete HTML document."""
    found = view.found
    facts = "<br>".join(escape(f"{name}: {path}") for name, path in zip(found.names, view.paths, strict=True))
    parts = [
        f'<p class="facts">{facts}</p>',
        f'<p class="lead">{typeset(headline(found))}</p>',
        *(f"<p>{typeset(line)}</p>" for line in details(found)),
        *_figures(found),
        *_tables(found),
        _method(found),
    ]
    return document("Two training runs compared", dark_rules(dark_of_run()), "\n".join(parts))


def _figures(found: Comparison) -> Iterator[str]:
    marks = ""
    if found.first is not None:
        marks = " The dashed line is the first step that differs"
        if found.first_beyond is None:
            marks += "."
        elif found.first_beyond.step == found.first.step:
            marks += ", by more than rounding."
        else:
            marks += "; the red one is the first that differs by more than rounding."
    charts = [both_chart(found, size) for size in (WIDE_RUN, NARROW_RUN)]
    caption = f"{found.names[0]} is the thick line, {found.names[1]} the thin one on it." + marks
    yield figure("Loss and gradient norm of both runs", charts, caption, "Neither a loss nor a gradient was recorded.")
    if found.first is None:
        return
    charts = [difference_chart(found, size) for size in (WIDE_RUN, NARROW_RUN)]
    caption = (
        "Relative differences of the loss, of the norm of all gradients, and of the norm of the one gradient that "
        "differs most, except those that are negligible in their module. Steps without a difference are not drawn. "
        f"Horizontal lines: what is taken for rounding, up to {number(found.rounding.whole)} in the loss and all "
        f"gradients, and up to {number(found.rounding.single)} in one gradient. In the first step after equal ones, "
        "less is taken for rounding: see the end of the page." + marks
    )
    yield figure("How far the runs differ", charts, caption, "No loss and no norm differs.")
    charts = [size_heatmap(found, size) for size in (WIDE_HEAT, NARROW_HEAT)]
    caption = (
        "One row per parameter, from input (top) to output (bottom). Zero: the norms are equal. Point at a cell, or "
        "use the arrow keys, to read it."
    )
    texts = cell_texts(size_grid(found), HEAT_QUANTITY)
    yield figure("Where the gradients differ", charts, caption, "No parameter is in both runs.", "", texts)


def _tables(found: Comparison) -> Iterator[str]:
    partings = [one for one in (found.first, found.first_beyond) if one is not None]
    for parting in {one.step: one for one in partings}.values():
        yield from _parting(found, parting)


def _parting(found: Comparison, parting: Parting) -> Iterator[str]:
    parameters, modules = parting.by_parameter, parting.at_modules
    if parameters:
        title = f"Parameters that differ at step {parting.step}"
        columns = dict(_columns(found, list(parameters.values())))
        rows = [(name, [column[place] for column in columns.values()]) for place, name in enumerate(parameters)]
        yield f"<h2>{escape(title)}</h2>"
        yield table(title, ["parameter", *columns], rows)
    if modules:
        title = f"Modules that differ at step {parting.step}"
        heads = ["module", "what", *(f"norm in {name}" for name in found.names), "differ by"]
        rows = [(one.name, [Cell(kind_text(one)), *_norms(one), Cell(one.size)]) for one in modules]
        yield f"<h2>{escape(title)}</h2>"
        yield table(title, heads, rows)


def _columns(found: Comparison, rows: Sequence[Mapping[str, Difference]]) -> Iterator[tuple[str, list[Cell]]]:
    """Yields the columns that have something to say."""
    gradients = [kinds.get("parameter") for kinds in rows]
    for side, name in enumerate(found.names):
        norms = [None if one is None else one.norms[side] for one in gradients]
        yield f"gradient in {name}", [Cell(math.nan if norm is None else norm) for norm in norms]
    sizes: dict[str, Callable[[Difference], float]] = {
        "differ by": lambda one: one.size,
        "largest element by": largest_size,
        "mean by": lambda one: one.mean_size,
    }
    for head, size in sizes.items():
        yield head, [Cell(math.nan if one is None else size(one)) for one in gradients]
    for kind in PARAMETER_KINDS[1:]:
        if any(kind in kinds for kinds in rows):
            yield f"{kind} by", [Cell(kinds[kind].size if kind in kinds else math.nan) for kinds in rows]
    if any(one is not None and one.is_beyond for one in gradients):
        yield "beyond rounding", [Cell("yes" if one is not None and one.is_beyond else "no") for one in gradients]
    counts = ["" if one is None else counts_text(one) for one in gradients]
    if any(counts):
        yield "counts", [Cell(text) for text in counts]


def _norms(one: Difference) -> list[Cell]:
    return [Cell(math.nan if norm is None else norm) for norm in one.norms]


def _method(found: Comparison) -> str:
    lines = [*notes(found)]
    if found.first is not None:
        lines += [method(found.rounding), "The comparison says what differs; it does not know the cause."]
    items = "\n".join(f"<li>{typeset(line)}</li>" for line in lines)
    return f"<h2>What was compared</h2>\n<ul>\n{items}\n</ul>"
