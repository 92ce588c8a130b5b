"""Attaches to a model, and hands out what its hooks measured."""

from gradprobe.observers.activations import Selection
from gradprobe.probe.options import Options, When
from gradprobe.probe.probe import Probe, attach

__all__ = ["Options", "Probe", "Selection", "When", "attach"]
