"""The back ends of `grad_stats` and `scale_`, which of them can run here, and the choice of one for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprobe.errors import ArgumentError, BackendError
from gradprobe.ops import libraries, reference
from gradprobe.ops.schemas import GRAD_STATS_INTO, SCALE
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
    return {"native": native, "triton": _triton_state("cuda"), "reference": "ready"}


def resolve(backend: str, device: torch.device) -> Backend:
    """Chooses the back end for tensors on a device.

    Args:
        backend: "auto" for the first that is ready (native, then Triton, then reference), or a name. A named back end
            is never replaced by another.
        device: The device of the tensors.

    Returns:
        The back end.

    Raises:
        ArgumentError: There is no back end of that name.
        BackendError: The named back end cannot run on that device; the message says why.

    Example:
        >>> resolve("reference", torch.device("cpu")).name
        'reference'
    """
    if backend != "auto" and backend not in _CHOICES:
        names = ", ".join(("auto", *_CHOICES))
        raise ArgumentError(f"backend: needed one of {names}, got {backend!r}")
    for name, (choice, state_of) in _CHOICES.items():
        if backend not in ("auto", name):
            continue
        state = state_of(device.type)
        if state == "ready":
            return choice
        if backend == name:
            raise BackendError(f"backend {name!r} cannot run on {device.type}: {state}")
    raise BackendError(f"no back end can run on {device.type}")
