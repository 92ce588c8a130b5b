"""Times an event, i.e. one output of a module or one gradient of an output, with each kind of hooks and rows.

"C++, CPU" is what a CPU takes. "C++, any device" is what a GPU takes, here with rows on the CPU: through torch's
dispatcher, without the time of launching a kernel. "Python" is their twin. The network is 100 Linear(8), so the
statistics themselves take almost no time. The kinds run in turn; times are CPU times of one thread.

Columns: µs per event, i.e. what a kind adds to a bare forward and backward pass, divided by the number of events
(median over the rounds, and quartiles).

    python benchmarks/event_rows.py [--rounds 100]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from _machine import processor
from torch import nn

import gradprobe
from gradprobe.observers import event_rows, signal_buffer
from gradprobe.ops import libraries

N_LAYERS = 100
N_EVENTS = 2 * N_LAYERS

MakeRows = Callable[..., event_rows.EventRows]


def device_rows(
    device: torch.device, backend: str, n_sites: int, strict: bool, is_capturing: object
) -> event_rows.EventRows:
    """Makes the rows of a GPU on another device."""
    module, state = libraries.native_hooks()
    if module is None:
        raise SystemExit(f"the C++ hooks are needed: {state}")
    rows: event_rows.EventRows = module.DeviceEventRows(event_rows.MOST_EVENTS, n_sites, strict, device, is_capturing)
    return rows


KINDS: dict[str, MakeRows] = {
    "C++, CPU": event_rows.make_rows,
    "C++, any device": device_rows,
    "Python": lambda device, *_: event_rows.PythonEventRows(device),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, 1 thread; torch {torch.__version__}, python {platform.python_version()}\n")
    models: dict[str, nn.Module] = {kind: network() for kind in ("bare", *KINDS)}
    probes = {kind: attached(models[kind], make) for kind, make in KINDS.items()}
    batch = torch.randn(4, 8)
    taken_us: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(options.rounds):
        for kind, model in models.items():
            start = time.process_time()
            model(batch).sum().backward()
            taken_us[kind].append((time.process_time() - start) * 1e6)
            if kind in probes:
                probes[kind].step()
            model.zero_grad()
    bare = np.median(taken_us.pop("bare"))
    print(f"{'':20}{'µs per event':>14}{'quartiles':>18}")
    for kind, taken in taken_us.items():
        low, middle, high = np.percentile((np.array(taken) - bare) / N_EVENTS, [25, 50, 75])
        print(f"{kind:20}{middle:14.1f}{f'{low:.1f} … {high:.1f}':>18}")


def network() -> nn.Module:
    """Returns the network, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(N_LAYERS)))


def attached(model: nn.Module, make: MakeRows) -> gradprobe.Probe:
    """Attaches a probe whose signals have rows made by `make`."""
    usual = signal_buffer.make_rows
    signal_buffer.make_rows = make
    try:
        return gradprobe.attach(model, activations=True)
    finally:
        signal_buffer.make_rows = usual


if __name__ == "__main__":
    main()
