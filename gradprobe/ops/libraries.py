"""Finds and loads the two compiled libraries, and reports which of their parts can run here.

`gradprobe._C` is a shared library without a Python entry point that registers kernels with torch's dispatcher.
`gradprobe._hooks` is a Python module. The build writes `gradprobe/_build_info.json`: for each part "built",
or the reason it was not.
"""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_BUILD_INFO = "_build_info.json"


def build_info() -> dict[str, str]:
    """Reads the build's report.

    Returns:
        Part to "built" or the reason it was not, and "torch", the version built against; empty if no build has run.

    Example:
        >>> build_info().get("torch", torch.__version__).startswith("2.")
        True
    """
    path = _PACKAGE / _BUILD_INFO
    if not path.is_file():
        return {}
    return {str(part): str(state) for part, state in json.loads(path.read_text(encoding="utf-8")).items()}


@cache
def parts() -> dict[str, str]:
    """Loads `gradprobe._C` once and reports on its parts.

    Returns:
        "cpu" and "cuda", each with "ready" or the reason why it cannot run here. "cuda" is ready if its kernels are
        loaded, whether or not torch sees a GPU.

    Example:
        >>> sorted(parts())
        ['cpu', 'cuda']
    """
    # Only in this package's folder: the library of another installation may be built from other sources.
    library = next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)
    info = build_info()
    if library is None:
        state = info.get("native", "not built: no build of gradprobe._C has run for this installation")
        reason = "gradprobe._C is missing" if state == "built" else state
        return {"cpu": reason, "cuda": reason}
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        reason = f"{library.name} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
        return {"cpu": reason, "cuda": reason}
    return {part: _registered(key, info) for part, key in (("cpu", "CPU"), ("cuda", "CUDA"))}


@cache
def native_hooks() -> tuple[Any | None, str]:
    """Loads the C++ hooks, `gradprobe._hooks`, which need the exact torch they were built against.

    Returns:
        The module and "ready", or None and the reason.

    Example:
        >>> module, state = native_hooks()
        >>> (module is not None) == (state == "ready")
        True
    """
    info = build_info()
    built_against = info.get("torch")
    if built_against and built_against != torch.__version__:
        return None, f"built against torch {built_against}, and this is torch {torch.__version__}"
    try:
        return importlib.import_module("gradprobe._hooks"), "ready"
    except ImportError as error:
        state = info.get("hooks", "not built: no build of gradprobe._hooks has run for this installation")
        return None, f"does not load: {error}" if state == "built" else state


def _registered(key: str, info: dict[str, str]) -> str:
    """Returns "ready" if the library has kernels for the dispatch key, else the reason from the build's report."""
    for operator in ("gradprobe::grad_stats_into", "gradprobe::scale_"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            state = info.get(key.lower(), "not built: the build left no reason")
            return f"the library has no {key} kernels, although the build says so" if state == "built" else state
    return (_driver_too_old(info) if key == "CUDA" else None) or "ready"


def _driver_too_old(info: dict[str, str]) -> str | None:
    """Returns why the driver cannot run the kernels, which link the CUDA runtime they were built with, else None."""
    built = re.search(r"release (\d+)\.", info.get("nvcc", ""))
    if built is None or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12040 for CUDA 12.4
    if driver // 1000 >= int(built[1]):
        return None
    return f"built for CUDA {built[1]}, but the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}: update it"
