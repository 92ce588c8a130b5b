"""Parts shared by all pages: figures, tables, typeset sentences, and the colours of charts on a dark page."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradprobe.report.chart_parts import Chart, svg
from gradprobe.text.markup import escape
from gradprobe.text.words import number

_LINE = 16  # characters of a row's name that is not wrapped


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a text, or a number that is shown with few digits and sorted by its value."""

    value: str | float

    @property
    def is_text(self) -> bool:
        """Whether the value is a text."""
        return isinstance(self.value, str)

    def html(self) -> str:
        """Returns the cell as HTML."""
        if isinstance(self.value, str):
            return f'<td class="text">{escape(self.value)}</td>'
        shown = f"{self.value:,}" if isinstance(self.value, int) else number(self.value)
        if isinstance(self.value, float) and math.isnan(self.value):
            shown = "–"
        return f'<td data-value="{self.value!r}">{typeset(shown)}</td>'


def figure(
    title: str, charts: Sequence[Chart | None], caption: str, nothing: str, lead: str = "", data: str = ""
) -> str:
    """Lays out a chart under its title.

    Args:
        title: Title of the figure, as plain text.
        charts: The chart for a wide screen and the one for a phone; None if there is nothing to draw.
        caption: Text below the chart, as plain text.
        nothing: Text in place of a missing chart.
        lead: HTML above the chart.
        data: HTML inside the figure that holds what its tooltips say.

    Returns:
        HTML.
    """
    wide, narrow = charts
    if wide is None or narrow is None:
        return f'<h2>{escape(title)}</h2>\n{lead}<p class="note">{escape(nothing)}</p>'
    return (
        f'<h2>{escape(title)}</h2>\n{lead}<figure aria-label="{escape(title)}">\n<div class="wide">{inline(wide)}</div>'
        f'\n<div class="narrow">{inline(narrow)}</div>\n{data}<figcaption>{typeset(caption)}</figcaption>\n</figure>'
    )


def inline(chart: Chart) -> str:
    """Returns a chart as an SVG for the middle of a page: without namespaces, and with identifiers of its own."""
    # Inside a page an SVG needs no namespace; without it the page contains no URL.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg(chart))
    for place, name in enumerate(dict.fromkeys(re.findall(r' id="(clip\d+)"', text))):
        # The renderer counts them over all charts.
        text = text.replace(f' id="{name}"', f' id="clip-{place}"').replace(f"url(#{name})", f"url(#clip-{place})")
    prefix = f"chart-{zlib.crc32(text.encode()):x}-"
    text = re.sub(r'(<(?:linearGradient|clipPath)[^>]*? id=")', rf"\1{prefix}", text)
    text = text.replace("url(#", f"url(#{prefix}")
    text = re.sub(r' d="([^"]*)"', lambda path: f' d="{re.sub(_LONG, _shortened, path[1])}"', text)
    return re.sub(r'fill="rgb\((\d+), (\d+), (\d+)\)"', _hexadecimal, text)


_LONG = re.compile(r"\d+\.\d{3,}(e-\d+)?")


def _shortened(decimal: re.Match[str]) -> str:
    return f"{float(decimal[0]):.2f}".rstrip("0").rstrip(".")


def _hexadecimal(fill: re.Match[str]) -> str:
    return 'fill="#{:02x}{:02x}{:02x}"'.format(*map(int, fill.groups()))


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Lays out a table that the reader can sort by any column.

    Args:
        title: Title for screen readers, as plain text.
        columns: Titles of the columns, the first that of the rows' names.
        rows: The name of each row, and its cells.

    Returns:
        HTML.
    """
    cells = rows[0][1] if rows else [Cell("")] * (len(columns) - 1)
    kinds = ["text", *("text" if cell.is_text else "number" for cell in cells)]
    heads = "".join(head(column, kind) for column, kind in zip(columns, kinds, strict=True))
    body = "\n".join(
        f'<tr><th scope="row" class="{_length(name)}" data-value="{place}">{escape(name)}</th>'
        f"{''.join(cell.html() for cell in cells)}</tr>"
        for place, (name, cells) in enumerate(rows)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table class="sortable">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _length(name: str) -> str:
    return "long" if len(name) > _LINE else "short"


def head(title: str, kind: str = "number") -> str:
    """Returns the head of a column that the reader can sort by.

    Args:
        title: Title, as plain text; it may have several lines.
        kind: "text" or "number".
    """
    lines = [typeset(line) for line in title.split("\n")]
    # Chromium repeats no head with a button on the next page: paper shows the data-title instead.
    return (
        f'<th scope="col" class="{kind}" data-title="{escape(" ".join(title.split()))}">'
        f'<button type="button">{"<br>".join(lines)}</button></th>'
    )


def typeset(text: str) -> str:
    """Escapes a text, typesets powers of ten, and keeps each number on one line with its unit."""
    text = escape(text).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
    # Whole numbers only: a name may hold 2e5, too.
    text = re.sub(
        r"(?<![\w.])(\d(?:\.\d)?)e(-?)(\d+)\b",
        lambda m: f"{m[1]}&nbsp;×&nbsp;10<sup>{'−' if m[2] else ''}{m[3]}</sup>",
        text,
    )
    return re.sub(r"\b([a-z]\w{,30}-\d+)\b", r'<span class="net">\1</span>', text)


def dark_rules(colours: Mapping[str, str]) -> str:
    """Returns CSS that recolours the charts on a dark page; a rule overrides a mark's own colour.

    Args:
        colours: Each colour of the charts and its counterpart on a dark page.
    """
    rules = "".join(
        f'svg [{kind}="{light}"] {{ {kind}: {dark}; }}\n'
        for light, dark in colours.items()
        for kind in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme: dark) {{\n{rules}}}\n"
