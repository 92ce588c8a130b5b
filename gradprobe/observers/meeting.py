"""Ranks that attach to parts of one model meet in the store: each learns what the others hold, and none can hang."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from gradprobe.errors import ArgumentError

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

    mine = json.dumps(options, sort_keys=True)
    first = store.compare_set(at + "options", "", mine).decode()
    if first != mine:
        store.set(at + "disagree", f"rank {me} has {mine}, another rank has {first}")
    packed = zlib.compress(json.dumps(parts).encode())
    name = hashlib.sha256(packed).hexdigest()
    if store.add(at + "n/" + name, 1) == 1:  # the first with these parts
        store.set(at + "parts/" + name, packed)  # type: ignore[arg-type]
        store.append(at + "names", name)  # type: ignore[attr-defined]
    store.set(at + f"here/{me}", "1")
    if store.add(at + "count", 1) == len(ranks):
        store.set(at + "complete", "1")
    end = time.monotonic() + timeout_s
    while not store.check([at + "complete"]):  # `store.wait` writes warnings of its own when the time is over
        if time.monotonic() > end:
            missing = [rank for rank in ranks if not store.check([at + f"here/{rank}"])]
            store.add(at + "count", -1)  # a later attach may still meet the others
            store.delete_key(at + f"here/{me}")
            store.add(f"{among}turn/{me}", -1)
            shown = ", ".join(map(str, missing[:_MOST_NAMED])) + (", …" if len(missing) > _MOST_NAMED else "")
            raise ArgumentError(
                f"model: its parameters are sharded, so needed attach on all {len(ranks)} ranks that hold a part of "
                f"it; within {timeout_s:g} s, {len(missing)} did not attach: {shown}. With process_group='local' a "
                "rank measures its own part alone"
            )
        time.sleep(_POLL_S)
    if store.check([at + "disagree"]):
        raise ArgumentError(f"options: needed the same on all ranks; {store.get(at + 'disagree').decode()}")
    found = store.get(at + "names").decode()
    names = sorted(found[k : k + len(name)] for k in range(0, len(found), len(name)))
    return _merged([_unpacked(store.get(at + "parts/" + name)) for name in names])


def _unpacked(packed: bytes) -> list[Part]:
    return [Part(name, tuple(shape), *rest) for name, shape, *rest in json.loads(zlib.decompress(packed))]


def _merged(lists: list[list[Part]]) -> list[Part]:
    """Merges the parameters of all ranks, in the natural order of the first name of each list."""
    merged: dict[str, Part] = {}
    for parts in sorted(lists, key=lambda parts: _natural(parts[0].name) if parts else []):
        for part in parts:
            known = merged.setdefault(part.name, part)
            if part.group_size != known.group_size or (part.group_size == 0 and part.shape != known.shape):
                raise ArgumentError(
                    f"parameter {part.name!r}: needed the same on all ranks, got the shapes {known.shape} and "
                    f"{part.shape}, in pieces over {known.group_size or 'no'} and {part.group_size or 'no'} ranks"
                )
            if part.is_wide and not known.is_wide:
                merged[part.name] = part
    return list(merged.values())


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
