"""Formats what peers.py has measured as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from _intervals import interval

BARE, OURS = "bare step", "attach"
CLIP, CLIP_BY_PROBE = "clip_grad_norm_", "attach and probe.clip_grad_norm_"
BEGIN, END = "<!-- tables of benchmarks/peers.py: begin -->", "<!-- end -->"


def tables(measured: Mapping[str, Any]) -> str:
    """Formats the results as Markdown.

    Args:
        measured: The content of the JSON file.

    Returns:
        The conditions, a table for each network, and the cases in which gradprobe adds more than another way.
    """
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    left_out = ", ".join(measured["left_out"]) or "nothing"
    conditions = f"Measured on {measured['date']}: {measured['machine']}; {versions}. Not installed: {left_out}."
    networks = measured["times_ms"]
    return "\n\n".join([conditions, *(_table(*network) for network in networks.items()), _losses(networks)])


def added_share(times_ms: Mapping[str, list[float]], name: str) -> float:
    """Returns the median time that a way adds to a network's bare step, as a share of it."""
    without = np.array(times_ms[BARE])  # [n_rounds]
    return float(np.median(np.array(times_ms[name]) - without) / np.median(without))


def fill(page: str, measured: Mapping[str, Any]) -> str:
    """Returns a page with the tables between its marks.

    Raises:
        ValueError: The page lacks the marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{tables(measured)}\n{end}{after}"


def _table(title: str, times_ms: Mapping[str, list[float]]) -> str:
    without = np.array(times_ms[BARE])  # [n_rounds]
    bare = np.median(without)
    lines = [f"### {title}", "", f"Bare step {bare:.2f} ms, {len(without)} rounds.", ""]
    lines += ["| way | added, ms | 90 % interval | of the step |", "|---|--:|--:|--:|"]
    for name, taken in times_ms.items():
        if name != BARE:
            added = np.array(taken) - without
            middle, (low, high) = np.median(added), interval(added)
            share = added_share(times_ms, name)
            lines.append(f"| {name} | {middle:.2f} | {low:.2f} … {high:.2f} | {share:.1%} |")
    return "\n".join(lines)


def _losses(networks: Mapping[str, Mapping[str, list[float]]]) -> str:
    lines = ["### Where gradprobe adds more", ""]
    for title, times_ms in networks.items():
        for other in times_ms:
            if other == BARE or other.startswith(("attach", "a second")):
                continue
            ours = CLIP_BY_PROBE if other == CLIP else OURS
            more = np.array(times_ms[ours]) - np.array(times_ms[other])  # [n_rounds]
            low, high = interval(more)
            if low > 0:
                lines.append(f"- {title}: `{ours}` {np.median(more):.2f} ms ({low:.2f} … {high:.2f}) more than {other}")
    return "\n".join(lines if len(lines) > 2 else [*lines, "In no case, beyond the noise."])
