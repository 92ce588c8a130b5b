"""Ranks that attach to parts of one model meet in the store: each learns what the others hold, and none can hang."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from gradprobe.errors import ArgumentError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_S = 0.02
_MOST_NAMED = 8  # ranks in a message


class Part(NamedTuple):
    """What one rank tells of a parameter of which it holds a part.

    Attributes:
        name: Its name.
        shape: Shape of the whole; of the part if `group_size` is not 0.
        group_size: Number of ranks whose parts make up one whole, 0 if the parameter says its shape itself.
        is_wide: It is float64, whose sums may need an exponent.
        n_padding: Number of zeros at the end of the whole that are no elements of it.
    """

    name: str
    shape: tuple[int, ...]
    group_size: int
    is_wide: bool
    n_padding: int


def meet(ranks: Sequence[int], options: dict[str, Any], parts: Sequence[Part]) -> list[Part]:
    """Waits until all ranks have attached, and tells each which parameters all of them hold.

    A rank writes and reads as much as there are different lists of parts, however many ranks there are.

    Args:
        ranks: The ranks, in order; this one is among them.
        options: Options of `attach` that must be the same on all.
        parts: The parameters of this rank.

    Returns:
        The parameters of all ranks, each once, in the same order on every rank.

    Raises:
        ArgumentError: Some ranks did not come in time (the environment variable GRADPROBE_MEET_TIMEOUT_S, 30 s by
            default), came with other options, or give the same parameter another shape. The message names them.
    """
    timeout_s = float(os.environ.get("GRADPROBE_MEET_TIMEOUT_S", "30"))
    me, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    among = f"gradprobe/{hashlib.sha256(repr(tuple(ranks)).encode()).hexdigest()[:16]}/"
    turn = store.add(f"{among}turn/{me}", 1)  # the same on all ranks that attach together
    at = f"{among}{turn}/"

    shown = json.dumps(options, sort_keys=True)
    packed = zlib.compress(json.dumps(parts).encode())
    mine = [
        _publish(store, f"{at}options", shown, f"rank {me} has {shown}"),
        _publish(store, f"{at}parts", packed, packed),
    ]
    store.set(f"{at}here/{me}", "1")
    if store.add(f"{at}count", 1) == len(ranks):
        store.set(f"{at}complete", "1")
    try:
        _wait(store, at, ranks, timeout_s)
    except BaseException:
        for key in mine:
            store.add(key, -1)
        store.delete_key(f"{at}here/{me}")
        store.add(f"{among}turn/{me}", -1)  # a later attach may still meet the others
        raise
    different = _published(store, f"{at}options")
    if len(different) > 1:
        raise ArgumentError(f"options: needed the same on all ranks; {', '.join(sorted(map(bytes.decode, different)))}")
    return _merged([_unpacked(each) for each in _published(store, f"{at}parts")])


def _publish(store: Store, at: str, value: str | bytes, shown: str | bytes) -> str:
    """Writes what this rank has, unless another rank has the same; returns the key that counts such ranks."""
    digest = hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()
    key = f"{at}/{digest}"
    if store.add(f"{key}/seen", 1) == 1:
        store.set(key, shown)  # type: ignore[arg-type]
        store.append(f"{at}/digests", digest)  # type: ignore[attr-defined]
    store.add(f"{key}/n", 1)
    return f"{key}/n"


def _published(store: Store, at: str) -> list[bytes]:
    """Reads what the ranks that have come have, each different one once, in the same order on every rank."""
    digests = store.get(f"{at}/digests").decode()
    size = hashlib.sha256().digest_size * 2
    different = sorted({digests[k : k + size] for k in range(0, len(digests), size)})
    return [store.get(f"{at}/{digest}") for digest in different if store.add(f"{at}/{digest}/n", 0) > 0]


def _wait(store: Store, at: str, ranks: Sequence[int], timeout_s: float) -> None:
    """Waits until all ranks have come; raises if they do not in time."""
    end = time.monotonic() + timeout_s
    is_counted = True
    try:
        while not store.check([f"{at}complete"]):  # `store.wait` writes warnings of its own when the time is over
            if time.monotonic() > end:
                is_counted = False
                if store.add(f"{at}count", -1) == len(ranks) - 1:  # the last one came just now
                    store.add(f"{at}count", 1)
                    return
                raise ArgumentError(_missing(store, at, ranks, timeout_s))
            time.sleep(_POLL_S)
    except BaseException:
        if is_counted:  # interrupted
            store.add(f"{at}count", -1)
        raise


def _missing(store: Store, at: str, ranks: Sequence[int], timeout_s: float) -> str:
    missing = [rank for rank in ranks if not store.check([f"{at}here/{rank}"])]
    shown = ", ".join(map(str, missing[:_MOST_NAMED])) + (", …" if len(missing) > _MOST_NAMED else "")
    return (
        f"model: its parameters are sharded, so needed attach on all {len(ranks)} ranks that hold a part of it; within "
        f"{timeout_s:g} s, {len(missing)} did not attach: {shown}. With process_group='local' a rank measures its own "
        "part alone"
    )


def _unpacked(packed: bytes) -> list[Part]:
    return [Part(name, tuple(shape), *rest) for name, shape, *rest in json.loads(zlib.decompress(packed))]


def _merged(lists: list[list[Part]]) -> list[Part]:
    """Merges the parameters of all ranks, in the natural order of the first name of each list."""
    merged: dict[str, Part] = {}
    for parts in sorted(lists, key=lambda parts: _natural(parts[0].name) if parts else []):
        for part in parts:
            known = merged.setdefault(part.name, part)
            is_other = len(part.shape) != len(known.shape) if part.group_size else part.shape != known.shape
            if part.group_size != known.group_size or is_other:
                raise ArgumentError(
                    f"parameter {part.name!r}: needed the same on all ranks, got the shapes {known.shape} and "
                    f"{part.shape}, in pieces over {known.group_size or 'no'} and {part.group_size or 'no'} ranks"
                )
            if part.is_wide and not known.is_wide:
                merged[part.name] = part
    return list(merged.values())


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
