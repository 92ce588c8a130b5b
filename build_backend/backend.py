"""PEP 517 backend: setuptools', but an isolated build uses the torch of the environment that gradprobe goes into.

With ``requires = ["torch"]`` pip would fetch a second torch of several gigabytes and build against that one, while
another runs. Here torch is asked for only where the target has none, and then it is the pinned one.
"""

from __future__ import annotations

from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from toolchain import PINNED_TORCH, ToolchainError, find_cxx, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

if tuple(int(part) for part in setuptools.__version__.split(".")[:2]) < (77, 0):
    raise ToolchainError(
        f"building gradprobe needs setuptools 77 or newer, here is {setuptools.__version__}: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation"
    )


def _with_torch(requirements: list[str]) -> list[str]:
    # Without a compiler nothing is built, so nothing is fetched for it either.
    needed = find_torch() is None and find_cxx()[0] is not None
    return [*requirements, f"torch=={PINNED_TORCH}"] if needed else requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns setuptools' requirements, and the pinned torch where the target environment has none."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns what ``get_requires_for_build_wheel`` returns, for an editable install."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
