"""Colours of the charts: a hue for each family, a shade for each depth, with a twin of every colour for a dark page."""

from __future__ import annotations

from gradprobe.report.summary import Summary

PAPER = "#ffffff"
INK = "#1f2328"
FAINT = "#656d76"
GRID = "#e4e7eb"

_DARK = {PAPER: "#14171a", INK: "#e6e8ea", FAINT: "#9aa3ad", GRID: "#2b3036"}
"""Twins of the neutral colours on a dark page."""

# Orange and blue first: readers who see no red or no green still tell them apart.
_NAMED = {"plain": ("#b8480b", "#f59a5b"), "resnet": ("#1d5fae", "#6cb0ff")}
_OTHERS = (("#2e7d4f", "#6fcf97"), ("#7b4ba8", "#c39bf0"), ("#a3306b", "#f08bbb"), ("#5f6b00", "#c9d84a"))

# How much of a colour the shallowest net keeps; the rest is the page.
_LIGHTEST = 0.6


class Palette:
    """Colours of one sweep.

    Args:
        summary: The sweep; its families and depths get the colours.
    """

    def __init__(self, summary: Summary) -> None:
        others = [family for family in summary.families if family not in _NAMED]
        self._families = {
            **_NAMED,
            **{family: _OTHERS[place % len(_OTHERS)] for place, family in enumerate(others)},
        }
        depths = {family: [net.depth for net in summary.nets if net.family == family] for family in summary.families}
        self._nets: dict[tuple[str, int], tuple[str, str]] = {}
        for family, members in depths.items():
            light, dark = self._families[family]
            for depth, share in zip(members, _shares(len(members)), strict=True):
                self._nets[family, depth] = _mix(light, PAPER, share), _mix(dark, _DARK[PAPER], share)

    def family(self, family: str) -> str:
        """Colour of a family."""
        return self._families[family][0]

    def net(self, family: str, depth: int) -> str:
        """Colour of a network."""
        return self._nets[family, depth][0]

    def dark(self) -> dict[str, str]:
        """Every colour in use with its twin for a dark page."""
        return {**_DARK, **dict(self._families.values()), **dict(self._nets.values())}


def shades(count: int) -> list[str]:
    """Colours for what only has an order, the lightest first."""
    colour = _NAMED["resnet"][0]
    return [_mix(colour, PAPER, share) for share in _shares(count)]


def _shares(count: int) -> list[float]:
    """How much each of so many nets keeps of a colour, from the shallowest to the deepest, which keeps all."""
    return [1 - (1 - _LIGHTEST) * rank / max(count - 1, 1) for rank in reversed(range(count))]


def _mix(colour: str, ground: str, share: float) -> str:
    channels = zip(bytes.fromhex(colour[1:]), bytes.fromhex(ground[1:]), strict=True)
    return "#" + "".join(f"{round(share * over + (1 - share) * under):02x}" for over, under in channels)
