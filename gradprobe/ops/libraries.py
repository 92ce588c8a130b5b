"""Finds and loads the two compiled libraries, and reports which of their parts can run here.

`gradprobe._C` is a shared library without a Python entry point that registers kernels with torch's dispatcher.
`gradprobe._hooks` is a Python module. The build writes `gradprobe/_build_info.json`: for each part "built",
or the reason it was not.
"""

from __future__ import annotations

import ctypes
import importlib
import json
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
    library = _library()
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


def cuda_refusal(device: torch.device | None = None) -> str | None:
    """Asks the compiled library, which must have CUDA kernels, whether they can run here.

    Args:
        device: A GPU. Every kernel is loaded there, so that none is loaded during a capture. With None only the driver
            is checked, and no GPU is used.

    Returns:
        The reason why they cannot run, or "ready"; None if there is no memory to find out.
    """
    library = ctypes.CDLL(str(_library()))
    library.gradprobe_cuda_refusal.restype = ctypes.c_char_p
    reason: bytes | None = library.gradprobe_cuda_refusal(-1 if device is None else device.index or 0)
    return None if reason is None else reason.decode(errors="replace") or "ready"


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
    return cuda_refusal() or "ready" if key == "CUDA" and torch.cuda.is_available() else "ready"


def _library() -> Path | None:
    """Returns the path of the compiled library."""
    # Only in this package's folder: the library of another installation may be built from other sources.
    return next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)
