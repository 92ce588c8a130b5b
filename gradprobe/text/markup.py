"""HTML: texts made inert, and the small forms that objects show in a notebook.

Notebooks strip style sheets, and a page cannot tell whether its notebook is dark. So the forms carry their own style on
each element, inherit the notebook's text colour, and mark with colours whose contrast is at least 3 on white and on
black (WCAG 1.4.11).
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gradprobe.errors import printable
from gradprobe.text.words import number

BROKEN, HEALTHY, UNKNOWN, BAR = "#d1493f", "#2f8f5b", "#7d8590", "#3f83cc"
"""Colours of a fault, of a healthy run, of one that is not judged, and of a bar."""

_END_ROWS = 6  # at either end of a table; those between are left out
_NAME_LENGTH = 60  # characters; a longer name loses its middle
_BAR_PX = 96
_LINE = "1px solid rgba(127,127,127,.35)"


@dataclass(frozen=True)
class Bar:
    """A bar in a cell.

    Attributes:
        share: Length as a share of the longest bar.
    """

    share: float


Cells: TypeAlias = "list[str | float | Bar]"
"""The cells of a row: a name first, then texts, numbers and bars."""


def escape(text: str) -> str:
    r"""Makes a text inert in a page: neither markup nor control characters and direction marks act in it.

    Example:
        >>> print(escape("<b>\u202e"))
        &lt;b&gt;\u202e
    """
    return html.escape(printable(text))


def form(headline: str, parts: Iterable[str] = (), colour: str = UNKNOWN) -> str:
    """Lays out an object for a notebook.

    Args:
        headline: What matters most, as plain text.
        parts: HTML below it.
        colour: Colour of the mark in front of the headline.

    Returns:
        HTML.
    """
    dot = (
        '<span aria-hidden="true" style="display:inline-block;width:.6em;height:.6em;border-radius:50%;'
        f'background:{colour};margin-right:.5em"></span>'
    )
    top = f'<div style="font-weight:600;margin:.3em 0">{dot}{escape(headline)}</div>'
    return f'<div style="max-width:60em;line-height:1.45">{top}{"".join(parts)}</div>'


def paragraph(text: str, label: str = "") -> str:
    """Returns a paragraph, in front of which a label may stand in bold type."""
    head = f"<b>{escape(label)}</b> " if label else ""
    return f'<div style="margin:.25em 0;overflow-wrap:anywhere">{head}{escape(text)}</div>'


def points(texts: Iterable[str]) -> str:
    """Returns a list of points."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul style="margin:.2em 0;padding-left:1.4em">{items}</ul>'


def marked(parts: Iterable[str], colour: str = BROKEN) -> str:
    """Returns parts with a coloured line at their left."""
    style = f"border-left:3px solid {colour};padding:.1em 0 .1em .8em;margin:.7em 0;max-width:60em;line-height:1.45"
    return f'<div style="{style}">{"".join(parts)}</div>'


def folded(summary: str, parts: Iterable[str]) -> str:
    """Returns parts that show when the reader opens them."""
    return f'<details><summary style="cursor:pointer">{escape(summary)}</summary>{"".join(parts)}</details>'


def grid(columns: Sequence[str], rows: Sequence[Cells]) -> str:
    """Lays out a table; of a long one, the rows at both ends.

    Args:
        columns: Titles of the columns.
        rows: Their cells.

    Returns:
        HTML.
    """
    sides = [_side(cell) for cell in rows[0]] if rows else ["left"] * len(columns)
    heads = "".join(
        f'<th scope="col" style="{_cell(side)};font-weight:600;border-bottom:{_LINE}">{escape(column)}</th>'
        for column, side in zip(columns, sides, strict=True)
    )
    is_long = len(rows) > 2 * _END_ROWS + 1
    body = [_row(row) for row in (rows[:_END_ROWS] if is_long else rows)]
    if is_long:
        left_out = f"… {len(rows) - 2 * _END_ROWS} more …"
        body.append(f'<tr style="background:none"><td colspan="{len(columns)}" style="{_cell()}">{left_out}</td></tr>')
        body += [_row(row) for row in rows[-_END_ROWS:]]
    return (
        f'<div style="overflow-x:auto" tabindex="0" role="group" aria-label="{escape(columns[0])}">'
        '<table style="border-collapse:collapse;margin:.4em 0;font-variant-numeric:tabular-nums">'
        f'<thead><tr style="background:none">{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def log_bars(values: Sequence[float]) -> list[Bar]:
    """Returns bars on a logarithmic scale that ends at the largest value; zero, NaN and infinity have none."""
    logs = [math.log10(value) if 0 < value < math.inf else None for value in values]
    known = [log for log in logs if log is not None]
    if not known:
        return [Bar(0.0)] * len(logs)
    low = min(math.floor(min(known)), math.floor(max(known)) - 1)
    return [Bar(0.0 if log is None else max(0.02, (log - low) / (max(known) - low))) for log in logs]


def _row(cells: Cells) -> str:
    name = f'<th scope="row" style="{_cell()};font-weight:400">{_shown(cells[0])}</th>'
    others = "".join(f'<td style="{_cell(_side(cell))}">{_shown(cell)}</td>' for cell in cells[1:])
    return f'<tr style="background:none">{name}{others}</tr>'


def _side(cell: str | float | Bar) -> str:
    is_number = isinstance(cell, int | float) or (isinstance(cell, str) and cell.endswith("%"))
    return "right" if is_number else "left"


def _cell(side: str = "left") -> str:
    return f"text-align:{side};padding:.15em 1em .15em 0;vertical-align:baseline;border:0;white-space:nowrap"


def _shown(cell: str | float | Bar) -> str:
    if isinstance(cell, str):
        return escape(printable(cell, _NAME_LENGTH))
    if isinstance(cell, Bar):
        size = f"width:{round(_BAR_PX * cell.share)}px;height:.65em"
        return f'<span aria-hidden="true" style="display:inline-block;{size};background:{BAR}"></span>'
    return f"{cell:,}" if isinstance(cell, int) else number(cell)
