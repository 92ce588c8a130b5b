"""Numbers as text: significant digits, percentages with their spread, durations."""

from __future__ import annotations

import math

from gradprobe.report.seed_statistics import Spread


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


def percent(spread: Spread | None) -> str:
    """Formats the mean and standard deviation of an error, without a percent sign; a dash if nothing is recorded.

    >>> percent(Spread((1.0, 2.0, 3.0))), percent(Spread((67.04,))), percent(None)
    ('2.0 ± 1.0', '67.0', '–')
    """
    if spread is None:
        return "–"
    mean = "NaN" if math.isnan(spread.mean) else f"{spread.mean:.1f}"
    return mean if spread.std is None or math.isnan(spread.std) else f"{mean} ± {spread.std:.1f}"


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units.

    >>> duration(0.42), duration(71.8), duration(7384)
    ('0.4 s', '1 min 12 s', '2 h 3 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
