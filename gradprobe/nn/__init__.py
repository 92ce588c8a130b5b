"""Residual additions as modules, and finding them in other people's models."""

from gradprobe.nn.residual import ResidualAdd
from gradprobe.ops.residual import residual_add, residual_add_

__all__ = ["ResidualAdd", "residual_add", "residual_add_"]
