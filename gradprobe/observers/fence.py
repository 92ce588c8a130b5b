"""Keeps the errors of measuring away from the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradprobe.errors import warn_user


class Fence:
    """Takes the errors that measuring raises inside hooks and optimizer steps: the training never sees them.

    Attributes:
        failures: What is no longer measured, and why.

    Args:
        strict: Raise the errors instead.

    Example:
        >>> import warnings
        >>> fence = Fence()
        >>> with warnings.catch_warnings(record=True):
        ...     with fence.around("gradients", switch_off=lambda: print("off")):
        ...         raise MemoryError("no memory")
        off
        >>> fence.failures
        {'gradients': 'MemoryError: no memory'}
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.failures: dict[str, str] = {}

    def caught(self, part: str, error: Exception) -> None:
        """Takes an error; the caller then switches off the part that failed.

        Args:
            part: What cannot be measured, e.g. "the output of layer1".
            error: The error.

        Raises:
            Exception: The error itself, if strict.
        """
        if self.strict:
            raise error
        if part not in self.failures:
            self.failures[part] = f"{type(error).__name__}: {error}"
            warn_user(
                f"measuring {part} failed and is switched off; the training goes on as without a probe. "
                f"{self.failures[part]}. With strict=True, attach lets the error through"
            )

    @contextmanager
    def around(self, part: str, switch_off: Callable[[], None]) -> Iterator[None]:
        """Takes any error raised inside the block.

        Args:
            part: As for `caught`.
            switch_off: Switches the part off; called after an error.

        Raises:
            Exception: The error itself, if strict.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.caught(part, error)
            switch_off()
