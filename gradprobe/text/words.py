"""Names, numbers and steps as they stand in sentences and tables."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def number(value: float) -> str:
    """Formats with three significant digits, or with two and an exponent outside [0.001, 100000).

    >>> number(449.7), number(2.13e-6), number(0.0), number(1.0), number(float("nan"))
    ('450', '2.1e-6', '0', '1.00', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 99_999.5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{digits}f}"


def quoted(name: str) -> str:
    """Returns a name for a sentence, in quotation marks if it would read as a number, as in `nn.Sequential`.

    >>> quoted("0"), quoted("0.weight"), quoted("layer1")
    ("'0'", '0.weight', 'layer1')
    """
    return f"'{name}'" if name.isdigit() else name


def split_target(target: str) -> tuple[str, str]:
    r"""Splits MODULE:CALLABLE or FILE.py:CALLABLE, which may begin with the letter of a drive.

    >>> split_target("my:net(2)"), split_target(r"C:\my\net.py:net"), split_target("plain")
    (('my', 'net(2)'), ('C:\\my\\net.py', 'net'), ('plain', ''))
    """
    drive = re.match(r"[A-Za-z]:[\\/]", target)
    colon = target.find(":", drive.end() if drive else 0)
    return (target, "") if colon < 0 else (target[:colon], target[colon + 1 :])


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names of a list, and an ellipsis if there are more.

    >>> listed(["0", "1.weight", "head"], most=2)
    "'0', 1.weight, …"
    """
    return ", ".join(map(quoted, names[:most])) + (", …" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """Returns a number of things.

    >>> counted(1, "step"), counted(3000, "step")
    ('1 step', '3,000 steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def steps(first: int, last: int) -> str:
    """Returns a range of steps.

    >>> steps(7, 7), steps(0, 99)
    ('step 7', 'steps 0 to 99')
    """
    return f"step {first}" if first == last else f"steps {first} to {last}"
