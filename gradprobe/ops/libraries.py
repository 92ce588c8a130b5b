"""Finds and loads the compiled parts, and says which of them can run here.

`gradprobe._C` is a plain shared library that registers implementations of the operators with torch's dispatcher; it
has no Python entry point. `gradprobe._hooks` is a Python module. `gradprobe/_build_info.json`, written by the build,
says for each part "built" or why it was left out.
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
    """Reads what the build wrote about its parts.

    Returns:
        Part to "built" or the reason why not, and "torch", the version built against; empty where no build has run.

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
    """Loads the compiled part once, and reports on its parts.

    Returns:
        "cpu" and "cuda", each with "ready" or the reason why it cannot run here. "cuda" is ready where its kernels are
        loaded; whether there is a GPU is for torch to say.

    Example:
        >>> sorted(parts())
        ['cpu', 'cuda']
    """
    # Beside the package itself: another installation's library would belong to other sources.
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
    """Loads the C++ hooks, `gradprobe._hooks`, which fit one exact torch.

    Returns:
        The module and "ready", or None and the reason why not.

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
    """Returns "ready" if the library implements every operator for the dispatch key, else the reason from the build."""
    for operator in ("gradprobe::grad_stats_into", "gradprobe::scale_"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            state = info.get(key.lower(), "not built: the build left no reason")
            return f"the library has no {key} kernels, although the build says so" if state == "built" else state
    return (_driver_too_old(info) if key == "CUDA" else None) or "ready"


def _driver_too_old(info: dict[str, str]) -> str | None:
    """Says why the driver cannot run the kernels: their CUDA runtime is linked in, whatever torch was built for."""
    built = re.search(r"release (\d+)\.", info.get("nvcc", ""))
    if built is None or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12040 for CUDA 12.4
    if driver // 1000 >= int(built[1]):
        return None
    return f"built for CUDA {built[1]}, but the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}: update it"
