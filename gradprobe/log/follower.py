"""Follows a run folder while it is written: each look reads only what is new, however long the run is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import StoreError
from gradprobe.log.folder import part_path, read_about
from gradprobe.log.formats import SUFFIXES, format_of
from gradprobe.log.reader import PARAMETER_COLUMNS, STEP_COLUMNS, UPDATE_COLUMNS, finding_of, snapshot_of
from gradprobe.snapshot.snapshot import Snapshot

_SIGNAL_COLUMNS = ("signal_table", "signal_scale", "signal_reduction", "execution")
_STEP_COLUMNS = (*(name for name in STEP_COLUMNS if name not in _SIGNAL_COLUMNS), "total_norm")

T = TypeVar("T")
_Stamp: TypeAlias = tuple[int, ...]  # changes whenever a file is replaced


@dataclass(frozen=True)
class News:
    """What is new in a run folder since the last look.

    Attributes:
        is_other: The folder was emptied, or made anew: everything of earlier looks is void.
        sessions: The sessions that begin among `steps`: their numbers, by the position of their first step.
        steps: Number, loss (None if it was not given) and total norm of the new steps, as they were written. One with
            the number of an earlier one, or a lower one, replaces the steps from there on.
        findings: The findings that were made, each with the number of its session.
        newest: The newest step, without activations and residual adds; None if there is no newer one.
    """

    is_other: bool = False
    sessions: Mapping[int, int] = field(default_factory=dict)
    steps: Sequence[tuple[int, float | None, float]] = ()
    findings: Sequence[tuple[int, Finding]] = ()
    newest: Snapshot | None = None


class RunFollower:
    """Reads a run folder again and again; the folder need not exist yet.

    A look reads new rows of the tables `steps` and `findings`, and of `parameters` and `updates` the newest step. It
    opens the newest part of a table only if it has changed, and no older one again.

    Attributes:
        about: What about.json says, None if there is none yet.

    Args:
        folder: The folder given to `attach(log_dir=...)`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.about: Mapping[str, Any] | None = None
        self._about_stamp: _Stamp | None = None
        self._folder_id: _Stamp | None = None
        self._tables = _Tables.of(folder)

    @property
    def stored_at(self) -> float | None:
        """When the newest step was stored, in seconds since the epoch; None if there is none."""
        return self._tables.steps.changed_at

    @property
    def sessions(self) -> Sequence[Mapping[str, Any]]:
        """What about.json says of the sessions so far."""
        return () if self.about is None else self.about["sessions"]

    def look(self) -> News:
        """Reads what is new.

        Raises:
            ArgumentError: The files are in Parquet, and pyarrow is not installed.
            StoreError: It is no run folder, or a file in it cannot be read.
        """
        is_other = self._read_about()
        if self.about is None:
            return News(is_other)
        n_sessions = len(self.sessions)
        tables = self._tables
        blocks = tables.steps.new(n_sessions)
        findings = tuple(
            (int(session), finding_of(text))
            for block in tables.findings.new(n_sessions)
            for session, text in zip(block["session"], block["finding"], strict=True)
        )
        if not blocks:
            return News(is_other, findings=findings)
        if self._read_about():  # a new row may refer to names that are newer than what was read above
            return News(is_other=True)
        starts: dict[int, int] = {}
        steps: list[tuple[int, float | None, float]] = []
        for block in blocks:  # of one part, so of one session
            if (session := int(block["session"][0])) != tables.session:
                tables.session = starts[len(steps)] = session
            columns = (block[name] for name in ("step", "loss", "total_norm"))
            steps += [(int(step), _number(loss), float(norm)) for step, loss, norm in zip(*columns, strict=True)]
        last = {name: values[-1] for name, values in blocks[-1].items()}
        return News(is_other, starts, steps, findings, self._snapshot(last, n_sessions))

    def _read_about(self) -> bool:
        """Reads about.json if it has changed; returns whether it is that of another run."""
        path = self._folder / "about.json"
        stamp, folder_id = _stamp(path), _stamp(self._folder, "st_dev", "st_ino")
        if stamp == self._about_stamp and folder_id == self._folder_id:
            return False
        about = read_about(self._folder)
        before = _starts(self.about)
        is_other = bool(before) and (_starts(about)[: len(before)] != before or folder_id != self._folder_id)
        if is_other:
            self._tables = _Tables.of(self._folder)
        self.about, self._about_stamp, self._folder_id = about, None if about is None else stamp, folder_id
        return is_other

    def _snapshot(self, step: Mapping[str, Any], n_sessions: int) -> Snapshot | None:
        """Returns a step from the ends of the tables, None if they have not come to it or are past it."""
        assert self.about is not None
        key = (int(step["session"]), int(step["step"]))
        n = len(self.about["parameter_tables"][int(step["parameter_table"])][0])
        parameters = self._tables.parameters.last(n_sessions, key, n)
        if parameters is None:
            return None
        updates: Mapping[str, Any] | None = None
        if step["update_table"] is not None:
            n = len(self.about["parameter_tables"][int(step["update_table"])][0])
            updates = self._tables.updates.last(n_sessions, key, n)
        return snapshot_of(step, self.about, parameters, updates)


class _Table:
    """A table that grows: rows are added to its newest part, and parts to the table.

    Attributes:
        changed_at: When the newest part was written, in seconds since the epoch; None before anything was read.

    Args:
        folder: That of the table.
        columns: The columns to read.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.changed_at: float | None = None
        self._folder = folder
        self._columns = columns
        self._session, self._number = -1, 0
        self._part: Path | None = None
        self._stamp: _Stamp | None = None
        self._past = 0  # place in the newest part up to which it was read

    def new(self, n_sessions: int) -> list[dict[str, Any]]:
        """Returns the columns of the rows that were added since the last call, in blocks that are not empty.

        Args:
            n_sessions: Number of sessions so far.
        """
        blocks: list[dict[str, Any]] = []
        is_newest = False
        while not is_newest:
            # Looked for before the part is read: a part that is followed by another one has all its rows.
            following = self._following(n_sessions)
            is_newest = following is None
            stamp = None if self._part is None else _stamp(self._part)
            if stamp is not None and stamp != self._stamp:
                read = self._read(lambda part: format_of(part).read_new(part, self._columns, self._past))
                if read is not None:
                    columns, self._past = read
                    self._stamp, self.changed_at = stamp, stamp[0] / 1e9
                    if len(columns[self._columns[0]]) > 0:
                        blocks.append(columns)
            if following is not None:
                self._move(*following)
        return blocks

    def last(self, n_sessions: int, key: tuple[int, int], n: int) -> dict[str, Any] | None:
        """Returns the last rows of the table if they are those of a step, None if they are of another one.

        Args:
            n_sessions: Number of sessions so far.
            key: Session and step.
            n: Number of rows of a step.
        """
        while (following := self._following(n_sessions)) is not None:
            self._move(*following)
        columns = self._read(lambda part: format_of(part).read_last(part, self._columns, n)) if n else None
        if columns is None or len(columns["step"]) != n:
            return None
        places = [columns[name] for name in ("session", "step", "position")]
        ends = [tuple(int(values[k]) for values in places) for k in (0, -1)]
        return columns if ends == [(*key, 0), (*key, n - 1)] else None

    def _following(self, n_sessions: int) -> tuple[int, int, Path] | None:
        """Returns session, number and path of the part after the newest known one, None if there is none."""
        places = [(self._session, self._number + 1)] if self._part is not None else []
        places += [(session, 0) for session in range(self._session + 1, n_sessions)]
        for session, number in places:
            for suffix in SUFFIXES:
                path = part_path(self._folder, session, number, suffix)
                if path.exists():
                    return session, number, path
        return None

    def _move(self, session: int, number: int, part: Path) -> None:
        self._session, self._number, self._part = session, number, part
        self._past, self._stamp = 0, None

    def _read(self, read: Callable[[Path], T]) -> T | None:
        """Reads from the newest part, None if there is none."""
        if self._part is None:
            return None
        try:
            return read(self._part)
        except FileNotFoundError:  # the folder is being removed
            return None
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{self._part}: cannot read this file: {error}") from error


@dataclass
class _Tables:
    """The tables of one run, and the session of its newest step."""

    steps: _Table
    findings: _Table
    parameters: _Table
    updates: _Table
    session: int = -1

    @classmethod
    def of(cls, folder: Path) -> _Tables:
        return cls(
            _Table(folder / "steps", _STEP_COLUMNS),
            _Table(folder / "findings", ("session", "finding")),
            _Table(folder / "parameters", PARAMETER_COLUMNS),
            _Table(folder / "updates", UPDATE_COLUMNS),
        )


def _stamp(path: Path, *names: str) -> _Stamp | None:
    """Returns what tells two states of a file apart, None if it does not exist."""
    try:
        found: os.stat_result = path.stat()
    except OSError:
        return None
    return tuple(getattr(found, name) for name in names or ("st_mtime_ns", "st_ino", "st_size"))


def _starts(about: Mapping[str, Any] | None) -> list[object]:
    return [] if about is None else [session["started"] for session in about["sessions"]]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
