"""Finds the residual additions that a model writes inline by following values through its source."""
