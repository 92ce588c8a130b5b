"""A comparison of two runs for the terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gradprobe.errors import printable
from gradprobe.report.comparison.compare import PARAMETER_KINDS, Comparison, Difference, Only, Parting
from gradprobe.report.comparison.rounding import FORMATS
from gradprobe.report.comparison.sentences import details, headline, kind_text, method, notes, other_text, size_text
from gradprobe.text.words import number

_MOST_ROWS = 20
_NAME_WIDTH = 40
_LEAST_NAME = 12
_OTHER_WIDTH = 20
_UNLIMITED = 1000  # a measured minimum is at most the width that the console offers


@dataclass(frozen=True)
class ComparisonView:
    """Prints a comparison of two runs as sentences and tables.

    Attributes:
        found: The comparison.
        paths: Where the runs are.
    """

    found: Comparison
    paths: tuple[str, str]

    @property
    def equal(self) -> bool:
        """Whether the runs are equal."""
        return self.found.equal

    def as_dict(self) -> dict[str, object]:
        """Returns the comparison as plain data."""
        found, rounding = self.found, self.found.rounding
        steps = found.steps
        return {
            "runs": dict(zip(("a", "b"), self.paths, strict=True)),
            "equal": found.equal,
            "headline": headline(found),
            "steps": {"compared": len(steps), "first": steps[0], "last": steps[-1]},
            "first_difference": _parting(found.first),
            "first_beyond_rounding": _parting(found.first_beyond),
            "different_steps": int(found.is_different.sum()),
            "steps_beyond_rounding": int(found.is_beyond.sum()),
            "compared": list(found.compared),
            "only_a": _only(found.only[0]),
            "only_b": _only(found.only[1]),
            "notes": list(found.notes),
            "rounding": {
                "format": FORMATS[rounding.bits],
                "loss_and_total_norm": rounding.whole,
                "first_difference": rounding.one_step,
                "norm": rounding.single,
            },
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        for name, path in zip(found.names, self.paths, strict=True):
            yield Text(f"{name}: {printable(path)}", style="dim")
        yield Text(printable(headline(found)), style="bold")
        for line in details(found):
            yield Text(printable(line))
        partings = [found.first, found.first_beyond]
        if found.first is not None and found.first_beyond is not None and found.first.step == found.first_beyond.step:
            partings.pop()
        for parting in partings:
            if parting is not None and parting.differences:
                yield from self._tables(parting, console, options)
        yield Text()
        for line in notes(found):
            yield Text(printable(line), style="dim")
        if found.first is not None:
            yield Text(method(found.rounding), style="dim")

    def _tables(self, parting: Parting, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        parameters, modules = parting.by_parameter, parting.at_modules
        if parameters:
            yield Text(f"\nParameters that differ at step {parting.step}", style="italic")
            shown = list(parameters.items())[:_MOST_ROWS]
            names = []
            for name, kinds in shown:
                is_beyond = "parameter" in kinds and kinds["parameter"].is_beyond
                names.append(Text(printable(name, _NAME_WIDTH), style="bold" if is_beyond else ""))
            columns = self._parameter_columns([kinds for _, kinds in shown])
            yield from _fitting("parameter", names, columns, console, options)
            yield from _rest(len(parameters))
        if modules:
            yield Text(f"\nModules that differ at step {parting.step}", style="italic")
            shown_modules = modules[:_MOST_ROWS]
            names = [Text(printable(one.name, _NAME_WIDTH)) for one in shown_modules]
            columns = [
                *_norm_columns("norm", self.found.names, shown_modules),
                _Column("differ\nby", [size_text(one) for one in shown_modules]),
                _Column("what", [kind_text(one) for one in shown_modules], is_number=False),
            ]
            yield from _fitting("module", names, columns, console, options)
            yield from _rest(len(modules))

    def _parameter_columns(self, rows: Sequence[Mapping[str, Difference]]) -> list[_Column]:
        gradients = [kinds.get("parameter") for kinds in rows]
        more = [kind for kind in PARAMETER_KINDS[1:] if kind in self.found.compared]
        return [
            *_norm_columns("gradient", self.found.names, gradients),
            _Column("differ\nby", ["–" if one is None else size_text(one) for one in gradients]),
            *(
                _Column(f"{kind}\nby", [size_text(kinds[kind]) if kind in kinds else "–" for kinds in rows], rank=1)
                for kind in more
            ),
            _Column(
                "other statistics\nof the gradient",
                ["" if one is None else other_text(one) for one in gradients],
                is_number=False,
                least=_OTHER_WIDTH,
                rank=3,
            ),
        ]


@dataclass(frozen=True)
class _Column:
    """A column of a table: its head, its cells, its least width, and when it goes: the highest rank first, 0 never."""

    head: str
    cells: Sequence[str]
    is_number: bool = True
    least: int | None = None
    rank: int = 0


def _norm_columns(what: str, names: Sequence[str], rows: Sequence[Difference | None]) -> Iterator[_Column]:
    for side, name in enumerate(names):
        norms = [None if one is None else one.norms[side] for one in rows]
        yield _Column(f"{what}\nin {name}", ["–" if norm is None else number(norm) for norm in norms], rank=2)


def _fitting(
    first: str, names: Sequence[Text], columns: Sequence[_Column], console: Console, options: ConsoleOptions
) -> Iterator[RenderableType]:
    """Yields the table without the columns for which the terminal is too narrow, and says so."""
    ranks = sorted({column.rank for column in columns}, reverse=True)
    for rank in ranks:
        table = _table(first, names, [column for column in columns if column.rank <= rank])
        if console.measure(table, options=options.update(width=_UNLIMITED)).minimum <= options.max_width:
            break
    yield table
    if rank < ranks[0]:
        yield Text("a wider terminal shows more columns; --json and --html have all", style="dim")


def _table(first: str, names: Sequence[Text], columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=min(max(map(len, names)), _LEAST_NAME))
    for column in columns:
        if column.is_number:
            width = max(map(len, [*column.head.split("\n"), *column.cells]))
            table.add_column(column.head, justify="right", min_width=width, no_wrap=True)
        else:
            table.add_column(column.head, min_width=column.least)
    for name, *cells in zip(names, *(column.cells for column in columns), strict=True):
        table.add_row(name, *cells)
    return table


def _rest(count: int) -> Iterator[Text]:
    if count > _MOST_ROWS:
        yield Text(f"and {count - _MOST_ROWS:,} more; --json and --html have all", style="dim")


def _parting(one: Parting | None) -> dict[str, object] | None:
    if one is None:
        return None
    return {
        "step": one.step,
        "step_before": one.before,
        "facts": {name: list(values) for name, values in one.facts.items()},
        "loss_difference": one.loss_size,
        "total_norms": list(one.total_norms),
        "parameters": one.n_parameters,
        "differences": [
            {
                "name": each.name,
                "kind": each.kind,
                "norms": list(each.norms),
                "difference": each.size,
                "beyond_rounding": each.is_beyond,
                "statistics": {name: list(values) for name, values in each.statistics.items()},
            }
            for each in one.differences
        ],
    }


def _only(one: Only) -> dict[str, object]:
    return {"parameters": list(one.parameters), "modules": list(one.modules), "kinds": list(one.kinds)}
