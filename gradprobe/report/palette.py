"""Colours of the charts: a hue per family, a shade per depth, and the counterpart of each on a dark page."""

from __future__ import annotations

from gradprobe.report.summary import Summary

BACKGROUND = "#ffffff"
INK = "#1f2328"
FAINT = "#656d76"
GRID = "#e4e7eb"

_DARK = {BACKGROUND: "#14171a", INK: "#e6e8ea", FAINT: "#9aa3ad", GRID: "#2b3036"}
"""Counterparts of the neutral colours on a dark page."""

# (on a light page, on a dark page). Orange and blue: readers with red-green blindness can tell them apart.
_FAMILY_COLOURS = {"plain": ("#b8480b", "#f59a5b"), "resnet": ("#1d5fae", "#6cb0ff")}
_OTHER_COLOURS = (
    ("#2e7d4f", "#6fcf97"),
    ("#7b4ba8", "#c39bf0"),
    ("#a3306b", "#f08bbb"),
    ("#5f6b00", "#c9d84a"),
    ("#00717a", "#4fc6cf"),
    ("#8a5a00", "#dba84a"),
    ("#4d5560", "#b6bfc8"),
)

FIRST, SECOND, THIRD = (light for light, _ in (*reversed(_FAMILY_COLOURS.values()), _OTHER_COLOURS[0]))
"""Colours of the lines of a run's charts."""

BROKEN = "#c0362c"
"""NaN, infinity and faults."""

ZERO = "#8c959f"
"""Zeros, which a logarithmic scale cannot show."""

# Share of the family's colour in that of the shallowest network; the rest is the background. The contrast of a line is
# then at least 3 on both pages (WCAG 1.4.11).
_LIGHTEST = 0.75


class Palette:
    """The colours of one sweep's families and networks."""

    def __init__(self, summary: Summary) -> None:
        others = [family for family in summary.families if family not in _FAMILY_COLOURS]
        self._families = {
            **_FAMILY_COLOURS,
            **{family: _OTHER_COLOURS[place % len(_OTHER_COLOURS)] for place, family in enumerate(others)},
        }
        depths = {family: [net.depth for net in summary.nets if net.family == family] for family in summary.families}
        self._nets: dict[tuple[str, int], tuple[str, str]] = {}
        for family, members in depths.items():
            light, dark = self._families[family]
            for depth, share in zip(members, _shares(len(members)), strict=True):
                self._nets[family, depth] = _mix(light, BACKGROUND, share), _mix(dark, _DARK[BACKGROUND], share)

    def family(self, family: str) -> str:
        """Returns the colour of a family."""
        return self._families[family][0]

    def net(self, family: str, depth: int) -> str:
        """Returns the colour of a network."""
        return self._nets[family, depth][0]

    def dark(self) -> dict[str, str]:
        """Maps every colour in use to its counterpart on a dark page."""
        return {**_DARK, **dict(self._families.values()), **dict(self._nets.values())}


def dark_of_run() -> dict[str, str]:
    """Maps the colours of a run's charts to their counterparts on a dark page."""
    return {**_DARK, **dict(_FAMILY_COLOURS.values()), **dict(_OTHER_COLOURS), BROKEN: "#ff7b72"}


def shades(count: int) -> list[str]:
    """Returns colours for ordered values, the lightest first."""
    colour = _FAMILY_COLOURS["resnet"][0]
    return [_mix(colour, BACKGROUND, share) for share in _shares(count)]


def _shares(count: int) -> list[float]:
    """Lists the share of the family's colour for each of ``count`` depths; the deepest has all of it."""
    return [1 - (1 - _LIGHTEST) * rank / max(count - 1, 1) for rank in reversed(range(count))]


def _mix(colour: str, ground: str, share: float) -> str:
    channels = zip(bytes.fromhex(colour[1:]), bytes.fromhex(ground[1:]), strict=True)
    return "#" + "".join(f"{round(share * over + (1 - share) * under):02x}" for over, under in channels)
