"""Reads the file of an offline W&B run, which holds W&B's own messages in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 15
_HEADER = struct.Struct("<IHB")  # checksum, length, whole (1), first (2), middle (3) or last (4) part


def records(path: Path, kind: str) -> list[Any]:
    """Returns the messages of a kind, such as "history" or "alert"."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in _payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == kind:
            found.append(getattr(record, kind))
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's history."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for history in records(path, "history")
    ]


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, payload = 7, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, part = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        payload += data[position : position + length]
        position += length
        if part in (1, 4):
            yield payload
            payload = b""
