"""Defines the operators and loads the compiled library on the first access to `torch.ops.gradprobe`. Needs no torch.

`import gradprobe` must not import torch, yet `torch.ops.gradprobe.grad_stats_into` must work after it, whichever is
imported first. So `install` puts a namespace into `torch.ops` that imports `gradprobe.ops.schemas` when an operator is
first looked up. If torch has not been imported, a finder does so at the end of the import of `torch._ops`, and removes
itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """Makes `torch.ops.gradprobe` define the operators on first access, now or as soon as torch is imported."""
    # The finder goes first, and then an import that waits: another thread may be importing torch right now.
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if "torch" in sys.modules:
        importlib.import_module("torch")
        if hasattr(sys.modules.get("torch._ops"), "ops"):
            _install_into(sys.modules["torch._ops"])


def _install_into(torch_ops: Any) -> None:
    """Puts the namespace into `torch.ops` unless it is there already, and removes the finder."""

    class GradprobeNamespace(torch_ops._OpNamespace):  # type: ignore[misc]
        __module__ = torch_ops.__name__  # generated code names operators by it

        def __getattr__(self, name: str) -> Any:  # called once per operator: torch caches it as an attribute
            if not name.startswith("__"):
                importlib.import_module("gradprobe.ops.schemas")
            return super().__getattr__(name)

    with suppress(ValueError):  # removed already
        sys.meta_path.remove(_finder)
    if type(vars(torch_ops.ops).get("gradprobe")).__name__ != GradprobeNamespace.__name__:
        torch_ops.ops.gradprobe = GradprobeNamespace("gradprobe")


class _Finder:
    """Finds `torch._ops` with the other finders, and calls `_install_into` after the module has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch._ops":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def run_and_install(module: ModuleType) -> None:
                run_module(module)
                _install_into(module)

            spec.loader.exec_module = run_and_install  # type: ignore[method-assign]
        return spec


_finder = _Finder()
