"""PEP 517 backend: setuptools, except that an isolated build uses the torch of the target environment.

With ``requires = ["torch"]`` pip would download a second torch of several gigabytes and build against that, although
gradprobe runs with another. This backend requires torch only if the target environment has none, in the pinned version.
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
        f"building gradprobe: needed setuptools 77 or newer, got {setuptools.__version__}: "
        "pip install --upgrade setuptools, or leave out --no-build-isolation"
    )


def _with_torch(requirements: list[str]) -> list[str]:
    # Without a compiler nothing is built, so no torch is needed.
    needed = find_torch() is None and find_cxx()[0] is not None
    return [*requirements, f"torch=={PINNED_TORCH}"] if needed else requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns setuptools' requirements, and the pinned torch if the target environment has none."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns the same as ``get_requires_for_build_wheel``, for an editable install."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
