"""Residual additions as modules, and their detection in models that write them inline."""

from gradprobe.nn.residual import ResidualAdd

__all__ = ["ResidualAdd"]
