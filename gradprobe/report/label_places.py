"""Where the names of lines go, so that they cover neither each other nor a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LABEL_PX = 13.0  # height of one label
_LABEL_WIDTH_PX = 66.0


@dataclass(frozen=True)
class Label:
    """A label to the right of its line's end (x_px, y_px), in pixels from the panel's upper left corner."""

    text: str
    colour: str
    x: float
    x_px: float
    y_px: float


def label_heights(labels: Sequence[Label], height: float, obstacles: Sequence[tuple[float, float]]) -> list[float]:
    """Places each label as near to its line's end as lines and earlier labels allow.

    If no height is clear of both, labels keep clear of each other. Labels of lines that end together, with no line
    beyond them, keep the order of the lines.

    Args:
        labels: The labels.
        height: Height of the panel in pixels.
        obstacles: Points of lines to keep clear of, in pixels from the panel's upper left corner.

    Returns:
        The vertical place of each label, in pixels from the top.
    """
    lowest = height - _LABEL_PX / 2  # half a label above the axis, so that the text does not touch it
    taken: list[tuple[float, float]] = []
    places: dict[int, float] = {}
    for x_px in {label.x_px for label in labels}:
        ending = [index for index in range(len(labels)) if labels[index].x_px == x_px]
        if not any(0 < x - x_px < _LABEL_WIDTH_PX for x, _ in obstacles):
            ending.sort(key=lambda index: labels[index].y_px)
            places |= dict(zip(ending, _spread_out([labels[index].y_px for index in ending], lowest), strict=True))
    taken += [(labels[index].x_px, y_px) for index, y_px in places.items()]
    offsets = sorted(range(-round(height), round(height) + 1), key=abs)
    for index in sorted(set(range(len(labels))) - places.keys(), key=lambda index: (labels[index].y_px, index)):
        label = labels[index]
        lines = [y for x, y in obstacles if 0 < x - label.x_px < _LABEL_WIDTH_PX]
        others = [y for x, y in taken if abs(x - label.x_px) < _LABEL_WIDTH_PX]
        inside = [y for y in (label.y_px + offset for offset in offsets) if 0 <= y <= lowest]
        apart = [y for y in inside if all(abs(y - other) >= _LABEL_PX for other in others)]
        clear = (y for y in apart if all(abs(y - line) >= _LABEL_PX / 2 + 2 for line in lines))
        places[index] = next(clear, next(iter(apart), label.y_px))
        taken.append((label.x_px, places[index]))
    return [places[index] for index in range(len(labels))]


def _spread_out(heights: Sequence[float], lowest: float) -> list[float]:
    """Moves sorted heights as little as possible so that labels do not overlap and stay between 0 and `lowest`."""
    groups: list[tuple[float, int]] = []  # middle and number of labels that touch
    for y in heights:
        middle, count = y, 1
        while True:
            half = _LABEL_PX * (count - 1) / 2
            middle = max(half, min(middle, lowest - half))
            if not groups or middle - half - _LABEL_PX >= groups[-1][0] + _LABEL_PX * (groups[-1][1] - 1) / 2 - 1e-9:
                break
            above, n_above = groups.pop()
            middle, count = (above * n_above + middle * count) / (n_above + count), n_above + count
        groups.append((middle, count))
    return [middle + _LABEL_PX * (k - (count - 1) / 2) for middle, count in groups for k in range(count)]
