"""Residual additions that a model writes inline: finding them in its source, and having them call a module."""
