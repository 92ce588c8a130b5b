"""The exceptions and the warning that gradprobe raises."""

from __future__ import annotations

import logging
import sys
import warnings


class GradprobeError(Exception):
    """Base class of the errors that gradprobe raises on purpose."""


class ArgumentError(GradprobeError, ValueError):
    """An argument is invalid; the message names it, says what was needed and what was given."""


class BackendError(GradprobeError, RuntimeError):
    """The requested back end cannot run here; the message says why."""


class StoreError(GradprobeError, OSError):
    """A results file cannot be read or written, or was not written by gradprobe."""


class GradprobeWarning(UserWarning):
    """The probe does not see something that the user would expect it to see."""


def warn_user(message: str) -> None:
    """Issues a `GradprobeWarning` that points to the line of user code that led to it.

    If the user's filter turns it into an error, it is logged instead: it may be issued inside a hook or an optimizer's
    step, where an error would stop the training.

    Args:
        message: The warning, which says what the probe does not see or do.
    """
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradprobe", "torch"):
        frame = frame.f_back
        level += 1
    try:
        warnings.warn(f"gradprobe: {message}", GradprobeWarning, stacklevel=level)
    except GradprobeWarning:
        logging.getLogger("gradprobe").warning(message)
