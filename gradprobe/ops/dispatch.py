"""The back ends of `grad_stats` and `scale_`, which of them can run here, and the choice of one for a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradprobe.errors import ArgumentError, BackendError, warn_user
from gradprobe.ops import libraries, reference, schemas
from gradprobe.ops.rows import STATS
from gradprobe.ops.schemas import GRAD_STATS_INTO, SCALE
from gradprobe.ops.transfer import to_host
from gradprobe.ops.triton import launcher as triton_launcher


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: "native", "triton" or "reference".
        grad_stats_into: Writes the raw rows of K tensors into a [K, 6] float64 tensor on their device.
        scale_: Multiplies tensors in place by a one-element tensor on their device.
    """

    name: str
    grad_stats_into: Callable[[Sequence[Tensor], Tensor], None]
    scale_: Callable[[Sequence[Tensor], Tensor], None]


_REFERENCE = Backend("reference", reference.grad_stats_into, reference.scale_)

_TRITON = Backend("triton", triton_launcher.grad_stats_into, triton_launcher.scale_)


def _native_grad_stats_into(tensors: Sequence[Tensor], out: Tensor) -> None:
    if not torch.compiler.is_compiling():
        module, _ = libraries.native_hooks()
        if module is not None and module.grad_stats_into(tensors, out):  # plain CPU tensors bypass the dispatcher
            return
    GRAD_STATS_INTO(tensors, out)


_NATIVE = Backend("native", _native_grad_stats_into, SCALE)


def _native_state(device_type: str) -> str:
    """Returns "ready" if the compiled library has kernels for the device type, otherwise the reason."""
    return libraries.parts().get(device_type, f"has no kernels for {device_type} tensors")


def _triton_state(device_type: str) -> str:
    """Returns "ready" if the Triton kernels can run on the device type, otherwise the reason."""
    return triton_launcher.unavailable(device_type) or "ready"


# In order of preference. The reference runs on every device.
_CHOICES: dict[str, tuple[Backend, Callable[[str], str]]] = {
    "native": (_NATIVE, _native_state),
    "triton": (_TRITON, _triton_state),
    "reference": (_REFERENCE, lambda device_type: "ready"),
}


def backends() -> dict[str, str]:
    """Lists the back ends and whether they can run here.

    This uses no GPU. Kernels are loaded and tried on a GPU when the first probe with parameters there is attached, and
    what they could not do is listed from then on.

    Returns:
        Name to "ready", or to the reason it is not. "native" reads "ready for cpu; cuda: <reason>" if only its CPU
        kernels are available.

    Example:
        >>> backends()["reference"]
        'ready'
    """
    parts = libraries.parts()
    if parts["cpu"] == parts["cuda"]:
        native = parts["cpu"]
    elif parts["cpu"] == "ready":
        native = f"ready for cpu; cuda: {parts['cuda']}"
    else:
        native = f"cpu: {parts['cpu']}; cuda: {parts['cuda']}"
    failed = [
        (device, state) for (name, device), state in list(_tried.items()) if name == "triton" and state != "ready"
    ]
    triton = "; ".join(f"cannot run on {device}: {state}" for device, state in failed) or _triton_state("cuda")
    return {"native": native, "triton": triton, "reference": "ready"}


# Results of the trials: "ready", or why the back end of that name cannot run on that device.
_tried: dict[tuple[str, torch.device], str] = {}
_warned: set[torch.device] = set()  # where another back end than the first that says it is ready had to be taken

# More tensors than the small table of csrc/cuda/table.cuh holds, so that the launch needs the longest list of kernel
# parameters. Python loops over tensors in the other back ends.
_N_TENSORS = {"native": 130, "triton": 2, "reference": 2}


def resolve(backend: str, device: torch.device) -> Backend:
    """Chooses the back end for tensors on a device.

    The first choice of a back end for a device loads its kernels and runs it there once on small tensors: the library
    may be there and still fail, e.g. because it was not built for this GPU.

    Args:
        backend: "auto" for the first that is ready and passes its trial (native, then Triton, then reference), or a
            name. A named back end is never replaced by another.
        device: The device of the tensors.

    Returns:
        The back end.

    Raises:
        ArgumentError: There is no back end of that name.
        BackendError: The named back end, or with "auto" every back end, cannot run on that device; the message says
            why.

    Example:
        >>> resolve("reference", torch.device("cpu")).name
        'reference'
    """
    if backend != "auto" and backend not in _CHOICES:
        names = ", ".join(("auto", *_CHOICES))
        raise ArgumentError(f"backend: needed one of {names}, got {backend!r}")
    if device.type == "cuda" and _state("native", device) != "ready":
        _state("triton", device)  # whatever is asked for: residual adds run the kernels that the dispatcher has
    reasons: list[str] = []
    has_failed = False
    for name, (choice, _) in _CHOICES.items():
        if backend not in ("auto", name):
            continue
        state = _state(name, device)
        if state == "ready":
            if has_failed and device not in _warned:
                _warned.add(device)
                warn_user(f"{'; '.join(reasons)}; using the back end {name!r}")
            return choice
        is_tried = (name, device) in _tried
        has_failed = has_failed or is_tried
        reasons.append(f"backend {name!r} cannot run on {device if is_tried else device.type}: {state}")
    raise BackendError("; ".join(reasons))


def _state(name: str, device: torch.device) -> str:
    """Returns "ready" or why a back end cannot run on a device; tries it there if it says that it is ready."""
    state = _tried.get((name, device))
    if state is not None:
        return state
    choice, state_of = _CHOICES[name]
    state = state_of(device.type)
    if state != "ready" or torch.compiler.is_compiling():
        return state
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return state  # a trial would become part of the graph
    found = _try(choice, device)
    if found is None:
        return state
    _tried[name, device] = found
    if found != "ready" and device.type == "cuda":
        if name == "native":
            libraries.parts()["cuda"] = f"cannot run on {device}: {found}"
            # The dispatcher has one set of kernels for all GPUs.
            for other in [key for key in _tried if key[0] == name and key[1].type == "cuda" and key[1] != device]:
                del _tried[other]
        if libraries.parts()["cuda"] != "ready":  # the dispatcher has the kernels that have just failed
            schemas.register_for_cuda("triton" if _state("triton", device) == "ready" else "reference")
    return found


def _try(backend: Backend, device: torch.device) -> str | None:
    """Runs a back end once on a device; loads all compiled kernels first if it is the native one on a GPU.

    Returns:
        "ready" if its kernels load and its numbers are right, otherwise what went wrong; None if that cannot be told:
        there is no such device here, or no memory or thread for the trial.
    """
    found: list[str | None] = []
    # None of the caller's contexts reaches another thread: inference mode, autocast, a default device, modes that see
    # every call, transforms.
    thread = threading.Thread(
        target=lambda: found.append(_load_and_run(backend, device)), name="gradprobe-trial", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the interpreter is exiting
        return None
    thread.join()
    return found[0]


def _load_and_run(backend: Backend, device: torch.device) -> str | None:
    """Returns what `_try` returns, in this thread."""
    try:
        if backend.name == "native" and device.type == "cuda" and torch.cuda.is_available():
            state = libraries.cuda_refusal(device)
            if state != "ready":
                return state
    except Exception as error:  # noqa: BLE001
        return _first_line(error)
    try:
        # [K, 4], whole numbers whose sums are exact
        values = torch.arange(4 * _N_TENSORS[backend.name], dtype=torch.float32, device=device).view(-1, 4) - 5
    except Exception:  # noqa: BLE001
        return None
    try:
        return _run(backend, values)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except Exception as error:  # noqa: BLE001
        return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _run(backend: Backend, values: Tensor) -> str:
    """Measures tensors, scales them by 1/2 and measures them again; returns "ready" if all rows are right."""
    device = values.device
    n_tensors = len(values)
    tensors = [*values.unbind(), values[0, :0]]  # rows of empty tensors come from a kernel of their own
    out = torch.full((2, n_tensors + 1, len(STATS)), torch.nan, dtype=torch.float64, device=device)
    backend.grad_stats_into(tensors, out[0])
    backend.scale_(tensors, torch.full((), 0.5, dtype=torch.float32, device=device))
    backend.grad_stats_into(tensors, out[1])
    x = np.arange(4 * n_tensors, dtype=np.float64).reshape(-1, 4) - 5
    needed = np.zeros(out.shape)
    for rows, scaled in zip(needed, (x, x / 2), strict=True):
        magnitude = np.abs(scaled)
        columns = (scaled.sum(1), magnitude.sum(1), (scaled**2).sum(1), magnitude.max(1), (x == 0).sum(1), 0 * x[:, 0])
        rows[:-1] = np.stack(columns, axis=1)
    got = to_host(out).numpy()
    wrong = np.argwhere(got != needed)
    if not len(wrong):
        return "ready"
    at = tuple(wrong[0])
    return f"it computes wrong numbers: needed a {STATS[at[2]]} of {needed[at]:g}, got {got[at]:g}"
