"""The exceptions and the warning that gradprobe raises, so that callers can catch them by kind."""

from __future__ import annotations

import sys
import warnings


class GradprobeError(Exception):
    """Base of every error that gradprobe raises on purpose."""


class ArgumentError(GradprobeError, ValueError):
    """An argument is not what was needed; the message names it, the need and what came."""


class BackendError(GradprobeError, RuntimeError):
    """A backend was asked for that cannot run here; the message gives the reason."""


class StoreError(GradprobeError, OSError):
    """A file of results cannot be read or written, or is not one of ours."""


class GradprobeWarning(UserWarning):
    """The probe is blind to something that the user would expect it to see."""


def warn_blind(message: str) -> None:
    """Gives a `GradprobeWarning` at the line of the user's code that led to it.

    Args:
        message: What the probe does not see.
    """
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradprobe", "torch"):
        frame = frame.f_back
        level += 1
    warnings.warn(f"gradprobe: {message}", GradprobeWarning, stacklevel=level)
