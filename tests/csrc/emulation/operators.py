"""The operators of csrc/stable/register_cuda.cpp on CPU tensors, with emulated kernels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from emulation.building import build_operators, session_folder
from gradprobe.ops import schemas


@cache
def emulated_operators() -> Any:
    """Builds and loads the library once per process; returns its `torch.ops` namespace."""
    schemas.define_operators(_library)
    torch.ops.load_library(str(build_operators(session_folder(), Path(torch.__file__).parent)))
    return torch.ops.gradprobe_emulated


_library = torch.library.Library("gradprobe_emulated", "FRAGMENT")
