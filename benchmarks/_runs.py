"""The labelled runs of benchmarks/diagnosis.py: small networks that are healthy or have a planted fault."""

from __future__ import annotations

from _faulty import FAULTY
from _healthy import HEALTHY

RUNS = (*HEALTHY, *FAULTY)
