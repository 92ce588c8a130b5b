"""Copies between the host and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a device; the host does not wait for the device.

    Args:
        values: Any tensor on the host.
        device: Where the copy is needed.

    Returns:
        The copy, or `values` if the device is the host.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Copies a tensor to the host and waits for it, also where `torch.cuda.set_sync_debug_mode` forbids to.

    Args:
        values: Any tensor.

    Returns:
        The copy, or `values` if it is on the host.
    """
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).record_event().synchronize()
    return host
