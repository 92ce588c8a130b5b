"""The device that a cell trains on, and the precision it trains in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch

from gradprobe.errors import ArgumentError, BackendError

Precision = Literal["float32", "bfloat16"]

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "bfloat16")


def resolve(device: str) -> str:
    """Returns the kind of device that an option means.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU if torch sees one and otherwise the CPU.

    Returns:
        ``"cpu"`` or ``"cuda"``.

    Raises:
        ArgumentError: The option has another value.
        BackendError: A GPU was asked for, and torch sees none.

    Example:
        >>> resolve("cpu")
        'cpu'
    """
    if device not in DEVICES:
        raise ArgumentError(f"device: needed one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu":
        return device
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise BackendError("device: cuda was asked for, but torch sees no CUDA device; use --device cpu")
    return "cuda" if has_gpu else "cpu"


def use(device: str, number: int) -> torch.device:
    """Makes this process use one of several devices from now on: with n GPUs, number modulo n.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        number: Number of the process.

    Returns:
        The device.

    Example:
        >>> use("cpu", 3)
        device(type='cpu')
    """
    if device != "cuda":
        return torch.device(device)
    number %= torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device(device, number)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Returns a context in which convolutions and linear layers compute in a precision.

    Args:
        device: Device of the network.
        precision: ``"float32"``, which changes nothing, or ``"bfloat16"``, in which the weights stay float32.

    Example:
        >>> with autocast(torch.device("cpu"), "bfloat16"):
        ...     torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def make_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Makes the stream on which a cell trains; None on a device without streams.

    A step can be captured as a CUDA graph only on another stream than the default one, and only if its gradients have
    been accumulated on that stream from the start.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Multiplies float32 matrices in float32, whatever torch's settings are; restores these at the end."""
    with ExitStack() as stack:
        for one in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            stack.callback(setattr, one, "fp32_precision", one.fp32_precision)
        with suppress(RuntimeError):  # the older setting cannot be read if only the newer ones were made
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def training(device: torch.device, stream: torch.cuda.Stream | None, seed: int) -> Iterator[None]:
    """Seeds torch, also on the device, for a part of a training; restores the random numbers and settings at the end.

    Denormals are not flushed at its start, nor after it, whatever was set in between.
    On a GPU the convolutions are those that give the same bits in every run, and float32 is not shortened to TF32.

    Args:
        device: Where the network is.
        stream: What `make_stream` made for the cell.
        seed: The seed.
    """
    with ExitStack() as stack:
        is_cuda = device.type == "cuda"
        stack.enter_context(torch.random.fork_rng(devices=[device] if is_cuda else []))
        if is_cuda:
            flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
            stack.enter_context(torch.backends.cudnn.flags(**flags))
            stack.enter_context(_exact_matmul())
        if stream is not None:
            outer = torch.cuda.current_stream(device)
            stream.wait_stream(outer)  # for what was copied to the device there
            stack.callback(outer.wait_stream, stream)
            stack.enter_context(torch.cuda.stream(stream))
        torch.set_flush_denormal(False)
        stack.callback(torch.set_flush_denormal, False)
        torch.manual_seed(seed)
        yield
