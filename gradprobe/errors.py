"""The exceptions and the warning that gradprobe raises, so that callers can catch them by kind."""

from __future__ import annotations


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
