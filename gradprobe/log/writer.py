"""Writes a run folder: tables in parts that are always whole, and about.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any

from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import StoreError
from gradprobe.log.folder import FORMAT, FolderLock, part_path, read_about
from gradprobe.log.formats import Format, best_format
from gradprobe.log.tables import SCHEMAS, Rows, TableIds, finding_rows, length, rows_of
from gradprobe.snapshot.export import strict
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.snapshot.signals import SignalTable
from gradprobe.snapshot.snapshot import Snapshot

_PART_ROWS = 2**15  # a part is written again while it grows, so it must stay small
_MOST_KNOWN = 64


class RunWriter:
    """Appends to a run folder, which is created if it does not exist.

    Each writer is a session with parts of its own, so what a folder holds is never overwritten. A part is written
    beside its target and renamed; the newest of each table is replaced by a longer one as it grows. When `write`
    returns, the steps are stored: killing the process loses none of them.

    Args:
        folder: The folder.
        about: What describes the session: options, versions, anything that JSON can hold.

    Raises:
        StoreError: The folder cannot be written, another writer uses it, or it is no run folder.
    """

    def __init__(self, folder: str | PathLike[str], about: Mapping[str, object] | None = None) -> None:
        self.folder = Path(folder)
        create_folder(self.folder)
        self._lock = FolderLock(self.folder)
        try:
            empty: dict[str, Any] = {"format": FORMAT, "sessions": [], "parameter_tables": [], "signal_tables": []}
            self._about: dict[str, Any] = read_about(self.folder) or empty
            self._sessions: list[dict[str, object]] = self._about["sessions"]
            self.session = len(self._sessions)
            self._sessions.append({"started": _now()})
            self._format = best_format()
            self._parts = {table: _Part(self.folder / table, self.session, self._format) for table in SCHEMAS}
            self._parameter_ids = {json.dumps(table): k for k, table in enumerate(self._about["parameter_tables"])}
            self._signal_ids = {json.dumps(table): k for k, table in enumerate(self._about["signal_tables"])}
            self._known: dict[int, tuple[object, int]] = {}  # number of a site table by its identity
            self._newest = -1
            self._is_closed = False
            for draft in self.folder.rglob(".*.unfinished"):  # of a process that was killed
                draft.unlink(missing_ok=True)
            self.describe(about or {})
        except BaseException:
            self._lock.release()
            raise

    def describe(self, about: Mapping[str, object]) -> None:
        """Adds to what describes the session.

        Args:
            about: Values that JSON can hold, by name.

        Raises:
            StoreError: The file cannot be written.
        """
        self._sessions[-1].update(about)
        self._write_about()

    def write(self, snapshots: Sequence[Snapshot]) -> None:
        """Appends steps. They are stored when this returns.

        Args:
            snapshots: Steps in order. One with the number of an earlier one, or a lower one, replaces the steps from
                there on when the run is read.

        Raises:
            StoreError: The files cannot be written; what they held before is still there.
        """
        if not snapshots:
            return
        n_tables = len(self._parameter_ids), len(self._signal_ids)
        blocks = rows_of(snapshots, self._table_ids, self.session)
        is_first = "first_step" not in self._sessions[-1]
        if is_first:
            self._sessions[-1]["first_step"] = snapshots[0].step
        if is_first or n_tables != (len(self._parameter_ids), len(self._signal_ids)):
            self._write_about()
        self._append(blocks)
        self._newest = snapshots[-1].step

    def tell(self, finding: Finding) -> None:
        """Appends a finding.

        Args:
            finding: The finding, made at the newest step.

        Raises:
            StoreError: The file cannot be written.
        """
        self._append({"findings": [finding_rows(max(self._newest, finding.steps[1]), finding, self.session)]})

    def close(self, fault: str = "") -> None:
        """Notes when the session ended, and lets go of the folder. A second call does nothing.

        Args:
            fault: Why nothing more is written although the training may go on; empty if it has ended.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            with contextlib.suppress(StoreError):  # a full disk: the steps so far are stored
                self.describe({"ended": _now(), **({"fault": fault} if fault else {})})
        finally:
            self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, blocks: Mapping[str, Sequence[Rows]]) -> None:
        grown = [(self._parts[table], blocks[table]) for table in SCHEMAS if table in blocks]
        for part, new in grown:
            part.extend(new)
        try:
            for part, _ in grown:
                create_folder(part.folder)
            write_files({part.path: part.contents() for part, _ in grown})
        except BaseException:
            for part, new in grown:
                part.take_back(len(new))
            raise
        for part, _ in grown:
            part.settle()

    def _write_about(self) -> None:
        text = json.dumps(strict(self._about), indent=1, allow_nan=False)
        write_files({self.folder / "about.json": [text + "\n"]})

    def _table_ids(self, snapshot: Snapshot) -> TableIds:
        table, updates, signals = snapshot.table, snapshot.parameter_updates, snapshot.signals
        parameters = self._id_of(table, lambda: [table.names, table.kinds, table.ndims, dict(table.index)])
        of_updates: int | None = None
        if updates is not None:
            same = updates.names == table.names
            of_updates = parameters if same else self._id_of(updates.names, lambda: [updates.names, (), (), {}])
        return TableIds(parameters, of_updates, None if signals is None else self._signal_id(signals.table))

    def _id_of(self, table: object, content: Callable[[], list[object]]) -> int:
        return self._remember(table, lambda: _intern(content(), self._parameter_ids, self._about["parameter_tables"]))

    def _signal_id(self, table: SignalTable) -> int:
        content: list[object] = [table.activations, table.junctions, table.module_types]
        return self._remember(table, lambda: _intern(content, self._signal_ids, self._about["signal_tables"]))

    def _remember(self, table: object, number: Callable[[], int]) -> int:
        if id(table) not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[id(table)] = (table, number())  # keeps the object, so that no other one gets its identity
        return self._known[id(table)][1]


class _Part:
    """The newest file of a table, with what it holds.

    Args:
        folder: That of the table.
        session: Number of the session.
        format: That of the file.
    """

    def __init__(self, folder: Path, session: int, format: Format) -> None:
        self.folder = folder
        self._session = session
        self._format = format
        self._number = 0
        self._blocks: list[tuple[object, int]] = []  # encoded rows, and how many they are

    @property
    def path(self) -> Path:
        return part_path(self.folder, self._session, self._number, self._format.suffix)

    def extend(self, blocks: Sequence[Rows]) -> None:
        schema = SCHEMAS[self.folder.name]
        self._blocks += [(self._format.encode(schema, rows), length(rows)) for rows in blocks]

    def take_back(self, n: int) -> None:
        del self._blocks[len(self._blocks) - n :]

    def contents(self) -> list[bytes]:
        return self._format.join([block for block, _ in self._blocks])

    def settle(self) -> None:
        if sum(n for _, n in self._blocks) >= _PART_ROWS:
            self._number += 1
            self._blocks = []


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _intern(content: list[object], known: dict[str, int], tables: list[object]) -> int:
    key = json.dumps(content)
    if key not in known:
        known[key] = len(tables)
        tables.append(json.loads(key))
    return known[key]
