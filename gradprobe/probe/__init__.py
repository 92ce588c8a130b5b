"""Attaches to a model, and hands out what its hooks measured."""

from gradprobe.probe.probe import Probe, attach

__all__ = ["Probe", "attach"]
