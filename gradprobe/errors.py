"""The exceptions and the warning that gradprobe raises."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterable

# Control characters act on a terminal, direction marks reorder the text around them, halves of surrogate pairs cannot
# be encoded, and the rest cannot be seen.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


class GradprobeError(Exception):
    """Base class of the errors that gradprobe raises on purpose."""


class ArgumentError(GradprobeError, ValueError):
    """An argument is invalid; the message names it, says what was needed and what was given."""


def not_among(argument: str, value: object, allowed: Iterable[str], needed: str = "one of") -> ArgumentError:
    """Makes the error for a value that is none of those allowed; names the closest of these if one is similar.

    Args:
        argument: Name of the argument.
        value: The value that was given.
        allowed: The values that it takes.
        needed: What the argument needs of these values.

    Returns:
        The error.

    Example:
        >>> print(not_among("norm", "bath", ("batch", "none")))
        norm: needed one of batch, none, got 'bath'; did you mean batch?
    """
    import difflib

    allowed = list(allowed)
    similar = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return ArgumentError(f"{argument}: needed {needed} {', '.join(allowed)}, got {value!r}{hint}")


class BackendError(GradprobeError, RuntimeError):
    """The requested back end cannot run here; the message says why."""


class StoreError(GradprobeError, OSError):
    """A results file cannot be read or written, or was not written by gradprobe."""


class WorkerTraceback(Exception):
    """The traceback of an exception in another process, as text; the cause of the error that is raised in this one."""


class GradprobeWarning(UserWarning):
    """The probe does not see something that the user would expect it to see."""


def printable(text: str, width: int | None = None) -> str:
    r"""Spells out the characters of a name or message that would act on the terminal or page that shows it.

    Args:
        text: Any text.
        width: Largest number of characters, at least 3; a longer text loses its middle. None: any number.

    Returns:
        The text with such characters as escape sequences of Python.

    Example:
        >>> print(printable("fc\x1b[31m"), printable("features.0.conv.weight", width=13))
        fc\x1b[31m featur…weight
    """
    shown = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
    if width is None or len(shown) <= width:
        return shown
    tail = (width - 1) // 2
    return f"{shown[: width - 1 - tail]}…{shown[len(shown) - tail :]}"


def warn_user(message: str) -> None:
    """Issues a `GradprobeWarning` that points to the line of user code that led to it.

    If the user's filter turns it into an error, it is logged instead: it may be issued inside a hook or an optimizer's
    step, where an error would stop the training.

    Args:
        message: The warning, which says what the probe does not see or do.
    """
    shown = "\n".join(map(printable, message.split("\n")))
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradprobe", "torch"):
        frame = frame.f_back
        level += 1
    try:
        warnings.warn(f"gradprobe: {shown}", GradprobeWarning, stacklevel=level)
    except GradprobeWarning:
        logging.getLogger("gradprobe").warning("%s", shown)
