"""The two file formats of a run folder: Parquet if pyarrow is installed, otherwise JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradprobe.errors import ArgumentError, StoreError
from gradprobe.log.tables import Column, Kind, Nullable, Rows, Texts
from gradprobe.snapshot.export import strict

INSTALL = "pip install 'gradprobe[log]'"

_CHUNK = 2**20  # bytes read at once from the end of a file


class Format(Protocol):
    """Encodes rows, and reads them back."""

    suffix: str

    def encode(self, schema: Mapping[str, Kind], rows: Rows) -> object:
        """Encodes a block of rows."""

    def join(self, blocks: Sequence[object]) -> list[bytes]:
        """Returns the contents of a file of these blocks."""

    def read(self, path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Reads some columns of a file; missing values are None."""

    def read_new(self, path: Path, columns: Sequence[str], past: int) -> tuple[dict[str, list[Any]], int]:
        """Reads the rows after a place in a file that grows.

        Args:
            path: The file.
            columns: The columns to read.
            past: The place: 0, or what an earlier call returned.

        Returns:
            The columns as `read` gives them, and the place where the file ends.
        """

    def read_last(self, path: Path, columns: Sequence[str], n: int) -> dict[str, list[Any]]:
        """Reads some columns of the last n rows of a file, or of all if it has fewer."""


class JsonLines:
    """One JSON object per row; NaN and infinities are the strings "nan", "inf" and "-inf", missing values null."""

    suffix = ".jsonl"

    def encode(self, schema: Mapping[str, Kind], rows: Rows) -> object:
        """Encodes a block of rows."""
        template = "{" + ", ".join(f'"{name}": %s' for name in schema) + "}\n"
        columns = [_as_json(rows[name]) for name in schema]
        return "".join([template % row for row in zip(*columns, strict=True)]).encode()

    def join(self, blocks: Sequence[object]) -> list[bytes]:
        """Returns the contents of a file of these blocks."""
        return [block for block in blocks if isinstance(block, bytes)]

    def read(self, path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Reads some columns of a file; missing values are None."""
        return self.read_new(path, columns, 0)[0]

    def read_new(self, path: Path, columns: Sequence[str], past: int) -> tuple[dict[str, list[Any]], int]:
        """Reads the rows after a place, which is a number of bytes, and the place where the file ends."""
        with path.open("rb") as file:
            file.seek(past)
            found: dict[str, list[Any]] = {name: [] for name in columns}
            for line in file:
                past += len(line)
                row = json.loads(line)
                for name, values in found.items():
                    values.append(row[name])
        return found, past

    def read_last(self, path: Path, columns: Sequence[str], n: int) -> dict[str, list[Any]]:
        """Reads some columns of the last n rows of a file, or of all if it has fewer."""
        with path.open("rb") as file:
            start, tail = file.seek(0, os.SEEK_END), b""
            while start > 0 and tail.count(b"\n") <= n:
                end, start = start, max(0, start - _CHUNK)
                file.seek(start)
                tail = file.read(end - start) + tail
        lines = tail.splitlines()
        rows = [json.loads(line) for line in lines[max(0, len(lines) - n) :]]
        return {name: [row[name] for row in rows] for name in columns}


class Parquet:
    """Parquet, compressed by zstd.

    Raises:
        ImportError: pyarrow is not installed.
    """

    suffix = ".parquet"

    def __init__(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self._pa: Any = pyarrow
        self._types: dict[Kind, Any] = {
            "int": pyarrow.int64(),
            "float": pyarrow.float64(),
            "bool": pyarrow.bool_(),
            "text": pyarrow.string(),
            "ints": pyarrow.list_(pyarrow.int64()),
            "texts": pyarrow.list_(pyarrow.string()),
        }

    def encode(self, schema: Mapping[str, Kind], rows: Rows) -> object:
        """Encodes a block of rows."""
        arrays = [self._array(rows[name], self._types[kind]) for name, kind in schema.items()]
        return self._pa.table(arrays, names=list(schema))

    def join(self, blocks: Sequence[object]) -> list[bytes]:
        """Returns the contents of a file of these blocks."""
        whole = self._pa.concat_tables(blocks)
        texts = [field.name for field in whole.schema if self._pa.types.is_string(field.type)]
        file = self._pa.BufferOutputStream()
        self._pa.parquet.write_table(whole, file, compression="zstd", use_dictionary=texts)
        return [file.getvalue()]

    def read(self, path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Reads some columns of a file; missing values are None."""
        return self.read_new(path, columns, 0)[0]

    def read_new(self, path: Path, columns: Sequence[str], past: int) -> tuple[dict[str, list[Any]], int]:
        """Reads the rows after a place, which is a number of rows, and the place where the file ends."""
        table = self._table(path, columns)
        return self._columns(table.slice(past), columns), table.num_rows

    def read_last(self, path: Path, columns: Sequence[str], n: int) -> dict[str, list[Any]]:
        """Reads some columns of the last n rows of a file, or of all if it has fewer."""
        table = self._table(path, columns)
        return self._columns(table.slice(max(0, table.num_rows - n)), columns)

    def _table(self, path: Path, columns: Sequence[str]) -> Any:
        with path.open("rb") as file:
            return self._pa.parquet.read_table(file, columns=list(columns))

    def _columns(self, table: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
        return {name: self._values(table.column(name)) for name in columns}

    def _array(self, column: Column, kind: Any) -> Any:
        if isinstance(column, Texts):
            return self._pa.array([_encodable(text) for text in column.levels], kind).take(self._pa.array(column.codes))
        if isinstance(column, Nullable):
            return self._pa.array(column.values, kind, mask=~column.valid)
        if isinstance(column, list):
            return self._pa.array([_encodable(value) for value in column], kind)
        return self._pa.array(column, kind)

    def _values(self, column: Any) -> Any:
        if column.null_count == 0 and not self._pa.types.is_nested(column.type):
            return column.to_numpy()
        return column.to_pylist()


SUFFIXES = (Parquet.suffix, JsonLines.suffix)


def best_format() -> Format:
    """Returns the format to write."""
    try:
        return Parquet()
    except ImportError:
        return JsonLines()


def format_of(path: Path) -> Format:
    """Returns the format of a file.

    Raises:
        ArgumentError: It needs pyarrow, which is not installed.
        StoreError: It is of neither format.
    """
    if path.suffix == JsonLines.suffix:
        return JsonLines()
    if path.suffix != Parquet.suffix:
        raise StoreError(f"{path}: needed a .parquet or .jsonl file")
    try:
        return Parquet()
    except ImportError as error:
        raise ArgumentError(f"{path}: reading Parquet needs pyarrow; install it with: {INSTALL}") from error


def _encodable(value: object) -> object:
    """Spells out the halves of surrogate pairs, which UTF-8 cannot represent."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def _as_json(column: Column) -> list[str]:
    if isinstance(column, Texts):
        levels = [json.dumps(text) for text in column.levels]
        return [levels[code] for code in column.codes.tolist()]
    if isinstance(column, Nullable):
        texts = _as_json(column.values)
        return [text if valid else "null" for text, valid in zip(texts, column.valid.tolist(), strict=True)]
    if isinstance(column, list):
        return [json.dumps(strict(value)) for value in column]
    values = column.tolist()
    if column.dtype == np.bool_:
        return ["true" if value else "false" for value in values]
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        return [json.dumps(strict(value)) for value in values]
    return [repr(value) for value in values]
