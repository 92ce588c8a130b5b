"""Event rows as on a GPU, on the CPU."""

from collections.abc import Callable

import torch

from gradprobe.observers import event_rows
from gradprobe.ops import libraries


def make_device_rows(
    device: torch.device,
    backend: str,
    n_sites: int,
    strict: bool = False,
    is_capturing: Callable[[], bool] | None = None,
) -> event_rows.EventRows:
    """Stands in for `make_rows`."""
    module, _ = libraries.native_hooks()
    rows: event_rows.EventRows = module.DeviceEventRows(event_rows.MOST_EVENTS, n_sites, strict, device, is_capturing)
    return rows
