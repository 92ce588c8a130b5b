"""gradprobe: see what gradients do in deep networks. `probe = gradprobe.attach(model)`."""

from gradprobe import networks
from gradprobe.diagnose import Finding
from gradprobe.errors import ArgumentError, BackendError, GradprobeError, GradprobeWarning, StoreError
from gradprobe.flow import FlowReport, check_gradient_flow
from gradprobe.ops import STATS, backends, grad_stats
from gradprobe.probe import Coverage, Probe, attach
from gradprobe.snapshot import SiteStats, Snapshot

__all__ = [
    "STATS",
    "ArgumentError",
    "BackendError",
    "Coverage",
    "Finding",
    "FlowReport",
    "GradprobeError",
    "GradprobeWarning",
    "Probe",
    "SiteStats",
    "Snapshot",
    "StoreError",
    "attach",
    "backends",
    "check_gradient_flow",
    "grad_stats",
    "networks",
]
