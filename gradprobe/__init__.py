"""gradprobe: see what gradients do in deep networks. `probe = gradprobe.attach(model)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gradprobe.ops import namespace as _namespace
from gradprobe.version import VERSION as __version__

if TYPE_CHECKING:
    from gradprobe import log, networks, nn, sinks
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.errors import ArgumentError, BackendError, GradprobeError, GradprobeWarning, StoreError
    from gradprobe.nn.instrument import Instrumented, instrument
    from gradprobe.ops import STATS, backends, grad_stats
    from gradprobe.ops.residual import residual_add, residual_add_
    from gradprobe.probe.check import FlowReport, check_gradient_flow
    from gradprobe.probe.coverage import Coverage
    from gradprobe.probe.probe import Probe, attach
    from gradprobe.snapshot.signals import Activation, Junction
    from gradprobe.snapshot.snapshot import Snapshot
    from gradprobe.snapshot.stats import SiteStats

_namespace.install()

# Imported on first use: a report or a help text needs no torch.
_HOMES = {
    "gradprobe.probe.coverage": ("Coverage",),
    "gradprobe.errors": ("ArgumentError", "BackendError", "GradprobeError", "GradprobeWarning", "StoreError"),
    "gradprobe.diagnosis.finding": ("Finding",),
    "gradprobe.probe.check": ("FlowReport", "check_gradient_flow"),
    "gradprobe.nn.instrument": ("Instrumented", "instrument"),
    "gradprobe.ops": ("STATS", "backends", "grad_stats"),
    "gradprobe.ops.residual": ("residual_add", "residual_add_"),
    "gradprobe.probe.probe": ("Probe", "attach"),
    "gradprobe.snapshot.signals": ("Activation", "Junction"),
    "gradprobe.snapshot.snapshot": ("Snapshot",),
    "gradprobe.snapshot.stats": ("SiteStats",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "STATS",
    "Activation",
    "ArgumentError",
    "BackendError",
    "Coverage",
    "Finding",
    "FlowReport",
    "GradprobeError",
    "GradprobeWarning",
    "Instrumented",
    "Junction",
    "Probe",
    "SiteStats",
    "Snapshot",
    "StoreError",
    "__version__",
    "attach",
    "backends",
    "check_gradient_flow",
    "grad_stats",
    "instrument",
    "log",
    "networks",
    "nn",
    "residual_add",
    "residual_add_",
    "sinks",
]


def __getattr__(name: str) -> object:
    if name in ("log", "networks", "nn", "sinks"):
        return import_module(f"gradprobe.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gradprobe' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
