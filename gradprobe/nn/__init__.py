"""Residual additions as modules, and finding them in other people's models."""

from gradprobe.nn.residual import ResidualAdd

__all__ = ["ResidualAdd"]
