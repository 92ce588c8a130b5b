"""What `gradprobe watch` shows of a training: its state, curves, the profile over depth and the findings so far."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from rich.text import Text

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import printable
from gradprobe.report.formatting import duration
from gradprobe.report.run_view import Grid, RunView, cells, spread
from gradprobe.report.spark import Curve, bars, is_logarithmic
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.words import counted, number

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

NAME_WIDTH = 60
"""Longest name that is shown in full."""

_LABEL, _VALUE = 13, 9  # characters of a line before its curve
_RANGE, _WIDE = 24, 60  # characters of the range behind a curve, and width of the screen from which there is one
_LEAST_CURVE = 4
_WIDEST_BAR = 3  # characters of a layer
_DECADES = 2.0  # least range of the layers' norms, in powers of ten
_RATE_S = 60.0  # the number of steps per second is that of the last minute
_PATIENCE_S, _PATIENCE_STEPS = 30.0, 5.0  # without a new step, whichever is longer


class TrainingNews(Protocol):
    """What is new in the log of a training, such as `gradprobe.log.follower.News`."""

    @property
    def is_other(self) -> bool:
        """Whether it is the log of another run now."""

    @property
    def sessions(self) -> Mapping[int, int]:
        """The sessions that begin among the steps: their numbers, by the position of their first step."""

    @property
    def steps(self) -> Sequence[tuple[int, float | None, float]]:
        """Number, loss and total norm of the new steps."""

    @property
    def findings(self) -> Sequence[tuple[int, Finding]]:
        """The new findings, each with the number of its session."""

    @property
    def newest(self) -> Snapshot | None:
        """The newest step."""


class LiveTraining:
    """A training as it runs, for `rich`. Its size does not grow with the number of steps.

    Args:
        name: Name of the run.

    Attributes:
        n_steps: Number of steps read so far, repeated ones included.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._forget()

    def _forget(self) -> None:
        self.n_steps = 0
        self._session: Mapping[str, Any] = {}
        self._begun: dict[int, int] = {}  # first step of each session
        self._findings: dict[str, tuple[int, Finding]] = {}
        self._losses, self._norms = Curve(), Curve(peaks=True)
        self._step = -1
        self._stride = 1  # between measured steps
        self._stored_at: float | None = None
        self._paces: deque[tuple[float, int]] = deque()  # when a step was stored, and its number
        self._layers: Grid | None = None
        self._ratios: Grid | None = None

    def take(self, news: TrainingNews, sessions: Sequence[Mapping[str, Any]], stored_at: float | None) -> None:
        """Takes what is new.

        Args:
            news: The news.
            sessions: What the log says of its sessions so far.
            stored_at: When the newest step was stored, in seconds since the epoch.
        """
        if news.is_other:
            self._forget()
        self._session = sessions[-1] if sessions else {}
        for place, (step, loss, norm) in enumerate(news.steps):
            if place in news.sessions:
                self._begin(news.sessions[place], step, sessions)
            if loss is not None:
                self._losses.add(step, loss)
            self._norms.add(step, norm)
            self._stride = max(1, step - self._step) if self._step >= 0 else 1
            self._step = step
        self.n_steps += len(news.steps)
        for session, finding in news.findings:
            self._findings.pop(finding.title, None)  # so that the newest comes last
            self._findings[finding.title] = (session, finding)
        if news.steps and stored_at is not None:
            self._stored_at = stored_at
            self._paces.append((stored_at, self._step))
            while len(self._paces) > 2 and self._paces[1][0] <= stored_at - _RATE_S:
                self._paces.popleft()
        if news.newest is not None:
            view = RunView([news.newest])
            self._layers = view.norms
            self._ratios = view.update_ratios if len(view.update_ratios.steps) else self._ratios

    def _begin(self, session: int, step: int, sessions: Sequence[Mapping[str, Any]]) -> None:
        self._begun[session] = step
        self._step = -1
        self._paces.clear()
        started = _time(sessions[session].get("started"))
        if started is not None:
            self._paces.append((started, step - 1))

    @property
    def is_over(self) -> bool:
        """Whether the log has ended."""
        return "ended" in self._session

    @property
    def findings(self) -> list[Finding]:
        """The findings in the steps that no later session has repeated."""
        return [
            finding
            for session, finding in self._findings.values()
            if not any(later > session and first <= finding.steps[0] for later, first in self._begun.items())
        ]

    @property
    def steps_per_s(self) -> float:
        """Training steps per second in the last minute; NaN if it is not known."""
        if len(self._paces) < 2:
            return math.nan
        (start, first), (end, last) = self._paces[0], self._paces[-1]
        return (last - first) / (end - start) if end > start and last > first else math.nan

    @property
    def mark(self) -> object:
        """Equal for two moments between which nothing has happened."""
        return self.n_steps, self.is_over, self._is_stale

    @property
    def _is_stale(self) -> bool:
        if self._stored_at is None:
            return False
        usual = 0.0 if math.isnan(self.steps_per_s) else self._stride / self.steps_per_s
        return time.time() - self._stored_at > max(_PATIENCE_S, _PATIENCE_STEPS * usual)

    def state(self) -> Text:
        """Says whether the training runs."""
        fault, started, ended = (self._session.get(name) for name in ("fault", "started", "ended"))
        if fault:
            return Text(f"log switched off; the training may go on: {printable(str(fault), 200)}", "bold red")
        if ended is not None:
            begin, end = _time(started), _time(ended)
            after = "" if begin is None or end is None else f" after {duration(max(0.0, end - begin))}"
            return Text(f"ended{after}", "bold")
        if self._stored_at is None:
            return Text("waiting for the first step", "cyan")
        if self._is_stale:
            age = time.time() - self._stored_at
            return Text(f"no new step for {duration(age)}: the training may have ended or been killed", "bold yellow")
        return Text("running", "green")

    def line(self) -> str:
        """Returns the state in one line, for where there is no screen."""
        parts = [self.state().plain] if self._step < 0 else [*self._facts(), self.state().plain]
        if self.findings:
            parts.append(counted(len(self.findings), "finding"))
        return ", ".join(parts)

    def _facts(self) -> list[str]:
        facts = [f"step {self._step}"]
        if not math.isnan(self.steps_per_s):
            facts.append(f"{number(self.steps_per_s)} steps/s")
        facts += [f"{name} {number(curve.last)}" for name, curve in self._curves().items() if not curve.is_empty]
        if self._ratios is not None:
            facts.append(f"update ratio {number(_typical(self._ratios)[1])}")
        return facts

    def _curves(self) -> dict[str, Curve]:
        return {"loss": self._losses, "total norm": self._norms}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, ascii_only = options.max_width, options.ascii_only
        model = self._session.get("model")
        name = Text(printable(self._name, NAME_WIDTH), "bold")
        lines = [name if model is None else Text.assemble(name, f"  {printable(str(model), NAME_WIDTH)}")]
        if self._step >= 0:
            lines.append(self._pace(width))
            lines += [self._curve(label, curve, width, ascii_only) for label, curve in self._curves().items()]
            lines += self._depth(width, ascii_only)
        for line in lines:
            _cut(line, width)
        state = self.state().wrap(console, width)
        lines[1:1] = state
        room = None if options.height is None else max(1, options.height - len(lines))
        yield from (*lines, *self._found(width, room))

    def _pace(self, width: int) -> Text:
        rate = "" if math.isnan(self.steps_per_s) else f"  {number(self.steps_per_s)} steps/s"
        session = f"  session {len(self._begun)} from step {self._first}" if len(self._begun) > 1 else ""
        line = f"step {self._step:,}{rate}"
        return Text(line + session if len(line + session) <= width else line)

    @property
    def _first(self) -> int:
        return next(reversed(self._begun.values()), 0)

    def _curve(self, label: str, curve: Curve, width: int, ascii_only: bool) -> Text:
        if curve.is_empty:
            return _labelled(label, Text("–"), Text("not given to probe.step" if label == "loss" else "none", "dim"))
        low, high = curve.low, curve.high
        is_log = is_logarithmic(low, high)
        extent = f"{number(low)} to {number(high)}{', log' if is_log else ''}" if low <= high else ""
        room = width - _LABEL - _VALUE - 1
        has_extent = width >= _WIDE and extent != ""
        drawn = room - _RANGE - 2 if has_extent else room
        line = bars(curve.shown(drawn), is_log, ascii_only) if drawn >= _LEAST_CURVE else Text()
        if has_extent:
            line.append(f"  {extent}", "dim")
        value = number(curve.last)
        return _labelled(label, Text(value, "" if math.isfinite(curve.last) else "bold red"), line)

    def _depth(self, width: int, ascii_only: bool) -> list[Text]:
        lines = []
        if self._ratios is not None and len(self._ratios.names):
            low, typical, high = map(number, _typical(self._ratios))
            about = f"{low} to {high} over the weights" if width >= _WIDE else f"{low} to {high}"
            lines.append(_labelled("update ratio", Text(typical), Text(about, "dim")))
        if self._layers is None or not self._layers.names:
            return lines
        joined = cells(self._layers, 1, width)
        values = joined.values[0].tolist()
        size = max(1, min(_WIDEST_BAR, width // len(values)))
        finite = [value for value in values if math.isfinite(value)]
        extent = f", {number(min(finite))} to {number(max(finite))}" if finite else ""
        title = f"gradient norm by layer, step {int(self._layers.steps[-1]):,}"
        full = f"{title}{extent}, log scale"
        lines.append(Text(full if len(full) <= width else title, "italic"))
        wide = [value for value in values for _ in range(size)]
        strip = bars(wide, log=True, ascii_only=ascii_only, decades=_DECADES)
        strip.style = "cyan"
        first, last = _ends(joined.names[0][0], joined.names[-1][-1], width)
        gap = max(1, min(width, max(len(wide), first.cell_len + last.cell_len + 1)) - first.cell_len - last.cell_len)
        return [*lines, strip, Text.assemble(first, " " * gap, last) if len(values) > 1 else first]

    def _found(self, width: int, room: int | None) -> list[Text]:
        """Lists the findings, the newest ones if there is no room for all."""
        found = self.findings
        if not found:
            return [Text("no finding so far", "dim")] if self._step >= 0 else []
        n_shown = len(found) if room is None else max(0, room - 1)
        n_left_out = len(found) - min(n_shown, len(found))
        more = f", the newest {n_shown}" if n_left_out else ""
        lines = [Text(f"{counted(len(found), 'finding')}{more}, see gradprobe diagnose", "bold")]
        lines += [
            Text.assemble(f"step {one.steps[0]:,}  ", (printable(one.title), "bold red"), printable(f": {one.meaning}"))
            for one in found[n_left_out:]
        ]
        for line in lines:
            _cut(line, width)
        return lines


def finding_line(finding: Finding) -> str:
    """Returns a finding in one line."""
    return printable(f"finding in step {finding.steps[0]}: {finding.title}: {finding.meaning}")


def _typical(grid: Grid) -> tuple[float, float, float]:
    """Returns the least value of a step, its median and the greatest."""
    low, _, middle, _, high = spread(grid.values)[:, -1].tolist()
    return low, middle, high


def _labelled(label: str, value: Text, rest: Text) -> Text:
    blanks = " " * max(1, _VALUE - value.cell_len)
    return Text.assemble(f"{label:<{_LABEL}}", blanks, value, " ", rest)


def _ends(first: str, last: str, width: int) -> tuple[Text, Text]:
    """Returns the names of the first and the last layer, cut so that both fit into a line."""
    most = max(1, (width - 1) // 2)
    texts = Text(printable(first, NAME_WIDTH), "dim"), Text(printable(last, NAME_WIDTH), "dim")
    for text in texts:
        _cut(text, most)
    return texts


def _cut(text: Text, width: int) -> None:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")


def _time(text: object) -> float | None:
    """Returns a time of about.json in seconds since the epoch, None if it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
